"""The demo from end to end, with a base that is hardly trained."""

from __future__ import annotations

import json

import pytest
import torch

from dts_fast import demo, demo_lm
from dts_fast.errors import DTSError


def test_the_corpus_is_real_split_by_file_and_the_same_every_time():
    corpus = demo_lm.collect_corpus(limit_bytes=60_000)
    again = demo_lm.collect_corpus(limit_bytes=60_000)
    assert corpus.train == again.train
    for kind in demo_lm.KINDS:
        assert corpus.train[kind]
        assert corpus.held_out[kind]
        assert not set(corpus.train[kind]) & set(corpus.held_out[kind])


def test_bits_per_byte_of_a_uniform_model():
    """Equal logits cost log2(vocabulary) bits a token."""
    corpus = demo_lm.collect_corpus(limit_bytes=60_000)
    tokenizer = demo_lm.train_tokenizer(corpus)
    model = demo_lm.train_base(corpus, tokenizer, steps=1, seed=0)
    torch.nn.init.zeros_(model.get_input_embeddings().weight)  # the head is tied to it
    text = corpus.held_out["prose"][0][:2000]
    tokens = len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
    expected = tokens * torch.log2(torch.tensor(float(len(tokenizer)))) / len(text.encode())
    assert demo_lm.bits_per_byte(model, tokenizer, [text]) == pytest.approx(float(expected), rel=1e-4)


def test_the_main_job(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "BUDGETS", (0.04,))
    monkeypatch.setattr(demo, "DISTILLED", (0.04,))
    monkeypatch.setattr(demo, "DISTILL_STEPS", 6)
    monkeypatch.setattr(demo, "DISTILL_BATCH", 4)
    monkeypatch.setattr(demo_lm, "bits_per_byte", _short(demo_lm.bits_per_byte))
    variants = demo.run(tmp_path / "out", steps=45)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [v["kind"] for v in results["variants"]] == list(demo_lm.KINDS) == [v.kind for v in variants]
    for v in results["variants"]:
        # Hardly trained models need more than a good one's 2 bits, and less than a random one's 8.
        assert 2 < v["bits_per_byte"]["fine_tune"] < v["bits_per_byte"]["base"] < 8
        adapter = v["adapters"]["4%"]
        assert 0.03 < adapter["share"] <= 0.04
        assert 0.03 < v["distilled"]["4%"]["share"] <= 0.04
        assert v["distilled"]["4%"]["bits_per_byte"] < v["bits_per_byte"]["base"]
        assert v["bits_per_byte"]["fine_tune"] - 0.05 < adapter["bits_per_byte"] < v["bits_per_byte"]["base"]
    assert set(results["texts"]) == {*demo_lm.KINDS, "__base__"}
    assert results["header"]["torch"] == torch.__version__
    assert (tmp_path / "out" / "plot.png").stat().st_size > 1000
    assert (tmp_path / "out" / "table.md").read_text().strip() in capsys.readouterr().out
    # A second run may replace the first one's folder, and nothing else.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    for kept in ("other", "file"):
        with pytest.raises(DTSError, match="not written by the demo"):
            demo.run(tmp_path / kept, steps=1)
    assert (tmp_path / "other" / "thesis.tex").exists()


def _short(original):
    return lambda model, tokenizer, texts: original(model, tokenizer, texts, max_bytes=8_000)

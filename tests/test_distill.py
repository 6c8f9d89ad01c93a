"""Distillation: predictions nearer to the fine-tune's, at the same size and in the same format."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import kl_div

from dts_fast import DTSConfig, DTSModel, compress, fit, fuse
from dts_fast.adapter_file import CONFIG_NAME, load_adapter, save_adapter
from dts_fast.cli import main
from dts_fast.distill import DistillConfig, _Run, _trainable, distill
from dts_fast.divergence import default_loss, divergence
from dts_fast.errors import AdapterFormatError, BaseMismatchError, CheckpointError, DTSError
from dts_fast.export import export_full
from dts_fast.generated import generated_batches
from dts_fast.lora import export_lora
from dts_fast.texts import read_texts, text_batches
from dts_fast.trainable import TrainableDelta
from dts_fast.verify import verify


def llama():
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=60,
        tie_word_embeddings=True, attention_bias=True, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=32, initializer_range=0.2, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=60,
        max_position_embeddings=32, num_labels=5, initializer_range=0.2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def mixtral():
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=60, num_local_experts=4, initializer_range=0.2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def bart():
    config = transformers.BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=32, vocab_size=60, init_std=0.2,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


MODELS = (llama, gpt2, bert, mixtral)


def tuning(matrix: torch.Tensor) -> torch.Tensor:
    """A delta with some strong directions, as fine-tunes have them, and some noise."""
    n, k = matrix.shape[-2:]
    strong = torch.randn(*matrix.shape[:-2], n, 6) @ torch.randn(*matrix.shape[:-2], 6, k) / 6**0.5
    return 0.4 * matrix.std() * (strong + 0.2 * torch.randn_like(matrix))


class Case:
    """A base, a fine-tune of it, and the adapter that `compress` makes of that."""

    def __init__(self, folder, make, **settings):
        torch.manual_seed(0)
        self.base, self.tuned, self.adapter = folder / "base", folder / "tuned", folder / "adapter"
        model = make()
        model.save_pretrained(self.base)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter) if parameter.dim() == 1 else tuning(parameter)
        model.save_pretrained(self.tuned)
        compress(self.base, self.tuned, self.adapter, DTSConfig(**(settings or {"density": 0.2})))

    def batches(self, count=8, rows=32, length=12):
        """Half of the rows are padded."""
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[: rows // 2, -3:] = 0
        return [{"input_ids": torch.randint(1, 60, (rows, length)), "attention_mask": mask} for _ in range(count)]

    def distill(self, out, batches=None, steps=30, **more):
        config = DistillConfig(**{"steps": steps, "held_out": 0.25} | more.pop("config", {}))
        return distill(self.adapter, self.base, self.tuned, batches or self.batches(), out, config, **more)


@pytest.mark.filterwarnings("ignore:no fast path")
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_predictions_come_nearer_and_are_those_of_the_file(tmp_path, make):
    case = Case(tmp_path, make)
    batches = case.batches()
    report = case.distill(tmp_path / "new", batches, steps=60)
    assert report.after < 0.85 * report.before
    before, after = load_adapter(case.adapter), load_adapter(tmp_path / "new")
    assert before.parameters.keys() == after.parameters.keys() == {*report.trained, *report.kept}
    assert before.nbytes == after.nbytes
    changed = {n for n, p in after.deltas.items() if not torch.equal(p.dequantize(), before.deltas[n].dequantize())}
    assert changed == set(report.trained)
    assert verify(tmp_path / "new", case.base, case.tuned).matches
    assert after.config["compression"]["distilled"] == 60
    # What serves the file has the divergence that was reported: the held-out batches are two of these eight.
    teacher = type(make()).from_pretrained(case.tuned).eval()
    served = []
    with torch.no_grad():
        model = DTSModel.from_pretrained(case.base, tmp_path / "new", "new")
        served = [float(default_loss(model(**b), teacher(**b), b)[0]) for b in batches]
    pairs = [(a + b) / 2 for i, a in enumerate(served) for b in served[i + 1 :]]
    assert min(abs(pair - report.after) for pair in pairs) < 1e-4 * report.after + 1e-6  # sums in another order


def test_models_in_16_bits(tmp_path):
    report = Case(tmp_path, llama).distill(tmp_path / "new", config={"dtype": "bfloat16"})
    assert report.after < 0.95 * report.before


@pytest.mark.filterwarnings("ignore:no fast path")
@pytest.mark.parametrize("make", [*MODELS, bart], ids=lambda make: make.__name__)
def test_gradients_are_those_of_the_dense_model(tmp_path, make):
    """Through all the layers behind, whose norms, biases and experts are the adapter's too."""
    case = Case(tmp_path, make)
    (batch,) = case.batches(1)
    export_full(case.adapter, case.base, tmp_path / "dense")
    dense, teacher = (type(make()).from_pretrained(path).eval() for path in (tmp_path / "dense", case.tuned))
    with torch.no_grad():
        wanted = teacher(**batch)
    default_loss(dense(**batch), wanted, batch)[0].backward()
    student, source = DTSModel.from_pretrained(case.base, case.adapter, "distilled"), load_adapter(case.adapter)
    student.requires_grad_(False)
    run = _Run(teacher, student, default_loss)
    gradients = {name: p.grad for name, p in dense.named_parameters()}
    with _trainable(student, source, run, batch, 1.0) as deltas:
        run(batch)[0].backward()
        for name, trained in deltas.items():
            delta, own = source.parameters[name], gradients[name]
            u, v, s = delta.u.dequantize(), delta.v.dequantize(), delta.s
            for got, expected in (
                (trained.u.values.grad.t() / trained.u.unit, own @ v * s),
                (trained.v.values.grad.t() / trained.v.unit, own.t() @ u * s),
                (trained.change.grad / s, (u.t() @ own @ v).diagonal()),
            ):
                # Float32 sums of base and delta apart instead of together, through a few layers.
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert len(deltas) > 4


def test_what_is_trained_is_the_delta():
    delta = fit(torch.randn(13, 22), rank=3)
    trained = TrainableDelta(delta)
    back = trained.coded()
    assert torch.equal(back.dequantize(), delta.dequantize())
    x, y = torch.randn(4, 5, 22), torch.randn(4, 5, 13)
    torch.testing.assert_close(trained.times(x), x @ delta.dequantize().t())
    torch.testing.assert_close(trained.times(y, transposed=True), y @ delta.dequantize())
    torch.testing.assert_close(
        trained.rows(torch.tensor([[3], [0]]), torch.float32), delta.dequantize()[torch.tensor([[3], [0]])]
    )
    assert trained.times(x.bfloat16()).dtype == torch.bfloat16


def test_gradients_go_through_the_rounding():
    """They are those of the same product with free factors, in units of the levels."""
    delta = fit(torch.randn(13, 22), rank=3)
    trained, x, weights = TrainableDelta(delta), torch.randn(4, 22), torch.randn(4, 13)
    (trained.times(x) * weights).sum().backward()
    u, v, s = (t.clone().requires_grad_() for t in (delta.u.dequantize(), delta.v.dequantize(), delta.s))
    (((x @ v) * s) @ u.t() * weights).sum().backward()
    torch.testing.assert_close(trained.u.values.grad, u.grad.t() * trained.u.unit)
    torch.testing.assert_close(trained.v.values.grad, v.grad.t() * trained.v.unit)
    torch.testing.assert_close(trained.change.grad, s.grad * s.detach())


def test_values_take_the_nearest_level_and_stay_in_range():
    factor = TrainableDelta(fit(torch.randn(9, 8), rank=2)).u
    with torch.no_grad():
        factor.values.copy_(torch.randn_like(factor.values) * 3)
    nearest = (factor.values[..., None] * factor.unit - factor.levels).abs().argmin(-1)
    torch.testing.assert_close(factor().detach(), factor.levels[nearest])
    before = factor().detach()
    factor.confine_()
    assert torch.equal(factor(), before)
    assert (factor.values * factor.unit).abs().max() <= factor.levels.abs().max() * (1 + 1e-6)
    coded = factor.coded()
    torch.testing.assert_close(coded.dequantize().t(), before)


@pytest.mark.parametrize("method", ["paper", "refined"])
def test_the_budget_holds(tmp_path, method):
    case = Case(tmp_path, llama, budget=0.2, method=method)
    report = case.distill(tmp_path / "a_name_of_some_length")
    base_nbytes = json.loads((case.adapter / CONFIG_NAME).read_text())["base_nbytes"]
    assert report.nbytes <= 0.2 * base_nbytes
    with pytest.raises(DTSError, match="no room for the name"):
        case.distill(tmp_path / ("n" * 200))


def test_padding_and_ignored_labels_do_not_count():
    ours, theirs = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    labels = torch.where(mask > 0, 3, -100)
    kl = kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    causal, masked = transformers.modeling_outputs.CausalLMOutput, transformers.modeling_outputs.MaskedLMOutput
    before = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]])  # what predicts a label stands before it
    everything = torch.ones_like(mask)
    for output, batch, counted in (
        (causal, {"attention_mask": mask}, mask),
        (causal, {"attention_mask": everything, "labels": labels}, before),
        (masked, {"attention_mask": everything, "labels": labels}, mask),
        (masked, {"attention_mask": mask, "decoder_input_ids": mask}, everything),
        (masked, {"attention_mask": everything, "decoder_input_ids": mask, "decoder_attention_mask": mask}, mask),
        (masked, {"attention_mask": mask[:, :1]}, everything),
        (causal, {}, everything),
    ):
        value, count = default_loss(output(logits=ours), output(logits=theirs), batch)
        torch.testing.assert_close(value, kl[counted > 0].mean())
        assert count == counted.sum()
    value, count = default_loss(causal(logits=ours), causal(logits=theirs), {"labels": torch.full((2, 4), -100)})
    assert (float(value), count) == (0, 0)


def test_problems_other_than_one_of_several_classes():
    output = transformers.modeling_outputs.SequenceClassifierOutput
    ours, theirs = torch.randn(5, 3), torch.randn(5, 3)
    value, _ = default_loss(output(logits=ours), output(logits=theirs), {}, "regression")
    torch.testing.assert_close(value, (ours - theirs).square().mean())
    value, _ = default_loss(output(logits=ours), output(logits=theirs), {}, "multi_label_classification")
    ours, theirs = (torch.distributions.Bernoulli(logits=t) for t in (ours, theirs))
    torch.testing.assert_close(value, torch.distributions.kl_divergence(theirs, ours).sum(-1).mean())
    with pytest.raises(DTSError, match="up to three dimensions"):
        default_loss(output(logits=torch.zeros(1, 2, 3, 4)), output(logits=torch.zeros(1, 2, 3, 4)), {})
    with pytest.raises(DTSError, match="alike in both models"):
        default_loss(output(logits=torch.zeros(1, 3)), output(logits=torch.zeros(1, 4)), {})


def test_models_without_classes():
    output = transformers.modeling_outputs.BaseModelOutput
    ours, theirs = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    value, count = default_loss(output(last_hidden_state=ours), output(last_hidden_state=theirs), {})
    torch.testing.assert_close(value, (ours - theirs).square().sum() / theirs.square().sum())
    assert count == 8
    single = transformers.modeling_outputs.SequenceClassifierOutput
    value, _ = default_loss(single(logits=ours[0, :, :1]), single(logits=theirs[0, :, :1]), {})
    torch.testing.assert_close(value, (ours[0, :, 0] - theirs[0, :, 0]).square().mean())
    with pytest.raises(DTSError, match="neither logits nor last_hidden_state"):
        default_loss(output(), output(), {})


def test_a_loss_of_ones_own(tmp_path):
    case = Case(tmp_path, bert)
    seen = []

    def loss(student, teacher, batch):
        seen.append(batch["input_ids"].shape)
        return (student.logits - teacher.logits).square().mean(), len(batch["input_ids"])

    report = case.distill(tmp_path / "new", loss=loss)
    assert report.after < report.before
    assert (32, 12) in seen


def test_a_layer_that_is_read_and_not_called_stays(tmp_path, monkeypatch):
    case = Case(tmp_path, llama)

    def forward(self, x):
        return nn.functional.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", forward)
    report = case.distill(tmp_path / "new")
    read = {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}
    assert read <= set(report.kept)
    assert report.after < report.before


def test_what_is_refused(tmp_path):
    case, target = Case(tmp_path, llama), tmp_path / "new"
    with pytest.raises(DTSError, match="two batches or more"):
        case.distill(target, case.batches(1))
    with pytest.raises(DTSError, match="no nearer to"):
        case.distill(target, config={"learning_rate": 0.0, "scale_learning_rate": 0.0})
    with pytest.raises(DTSError, match="exists"):
        case.distill(case.adapter)
    with pytest.raises(DTSError, match="do not take a batch of words"):
        case.distill(target, [{"words": torch.zeros(1, 2)}] * 2)
    for batches in (torch.zeros(4, 2), ["a", "b"], [torch.zeros(1, 2)] * 3):
        with pytest.raises(DTSError, match="batches: expected a list of the model's keyword arguments"):
            distill(case.adapter, case.base, case.tuned, batches, target)
    beyond = {"input_ids": torch.full((32, 12), 10**6)}
    with pytest.raises(DTSError, match=r"do not take a batch of input_ids \[32, 12\]"):  # whenever its turn comes
        case.distill(target, [*case.batches(3), beyond])
    with pytest.raises(DTSError, match="config: expected a DistillConfig"):
        distill(case.adapter, case.base, case.tuned, case.batches(), target, {"steps": 3})
    with pytest.raises(DTSError, match=r"loss: expected \(mean, count\)"):
        distill(case.adapter, case.base, case.tuned, case.batches(), target, loss=lambda *_: torch.zeros(()))
    labels = torch.full((32, 12), -100)
    with pytest.raises(DTSError, match="no position"):
        case.distill(target, [batch | {"labels": labels} for batch in case.batches(2)])
    with pytest.raises(DTSError, match="model: expected a path"):
        distill(case.adapter, case.base, nn.Linear(2, 2), case.batches(), target)
    with pytest.raises(CheckpointError, match="not the fine-tune"):
        distill(case.adapter, case.base, case.base, case.batches(), target)
    with pytest.raises(BaseMismatchError):
        distill(case.adapter, case.tuned, case.tuned, case.batches(), target)
    compress(case.base, case.tuned, tmp_path / "other", DTSConfig(density=0.1))
    fuse([case.adapter, tmp_path / "other"], tmp_path / "mixture", weights=[0.5, 0.5])
    with pytest.raises(AdapterFormatError, match="mixture"):
        distill(tmp_path / "mixture", case.base, case.tuned, case.batches(), target)
    whole = load_adapter(case.adapter)
    vectors = {n: p for n, p in whole.parameters.items() if n.endswith("norm.weight")}
    compress(case.base, case.tuned, tmp_path / "vectors", DTSConfig(density=0.2, include="norm.weight"))
    assert load_adapter(tmp_path / "vectors").parameters.keys() == vectors.keys()
    with pytest.raises(DTSError, match="nothing to distill"):
        distill(tmp_path / "vectors", case.base, case.tuned, case.batches(), target)
    export_lora(case.adapter, case.base, tmp_path / "lora", drop=True)
    with pytest.raises(DTSError, match="PEFT LoRA"):
        distill(case.adapter, case.base, tmp_path / "lora", case.batches(), target)
    assert not target.exists()
    for settings in ({"steps": 2.5}, {"seed": "1"}, {"dtype": "float8_e4m3fn"}, {"learning_rate": "x"}):
        with pytest.raises(DTSError, match=next(iter(settings))):
            DistillConfig(**settings)
    for settings in ({"steps": 0}, {"learning_rate": -1.0}, {"held_out": 1.0}, {"dtype": "int8"}, {"device": "mars"}):
        with pytest.raises(DTSError, match=next(iter(settings))):
            DistillConfig(**settings)


def test_an_adapter_takes_its_own_place(tmp_path):
    case = Case(tmp_path, llama)
    save_adapter(tmp_path / "copy", load_adapter(case.adapter), "")
    report = distill(
        tmp_path / "copy", case.base, case.tuned, case.batches(), tmp_path / "copy", DistillConfig(steps=5),
        overwrite=True,
    )  # fmt: skip
    assert report.path == tmp_path / "copy"
    assert load_adapter(tmp_path / "copy").config["compression"]["distilled"] == 5


def make_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, 60)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return fast


def text_of(words: int) -> str:
    return " ".join(f"w{2 + int(i)}" for i in torch.randint(58, (words,)))


def test_the_command_line(tmp_path):
    from click.testing import CliRunner

    case = Case(tmp_path, llama)
    make_tokenizer(case.tuned)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"body": text_of(12)}) + "\n" for _ in range(256)))
    arguments = ["distill", case.adapter, "--base-model", case.base, "--model", case.tuned, "--field", "body"]
    arguments += ["--data", tmp_path / "texts.jsonl", "--out-path", tmp_path / "new", "--steps", 20, "--batch-size", 32]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    before, after = (float(result.stdout.split(word)[1].split()[0].rstrip(",")) for word in (", before", "fine-tune"))
    assert 0 < after < before
    assert load_adapter(tmp_path / "new").config["compression"]["distilled"] == 20
    again = CliRunner().invoke(main, [str(a) for a in arguments])
    assert again.exit_code == 1
    assert "exists" in again.stderr
    place = arguments.index("--data")
    without = arguments[:place] + arguments[place + 2 :]
    for more, message in ((["--data", "x", "--generate", "64"], "either --data"), ([], "either --data")):
        refused = CliRunner().invoke(main, [str(a) for a in [*without, *more]])
        assert refused.exit_code == 1
        assert message in refused.stderr
    without[without.index("--out-path") + 1] = tmp_path / "own"
    more = ["--generate", 256, "--prefix", "w4 w5", "--max-length", 12]
    result = CliRunner().invoke(main, [str(a) for a in [*without, *more]])
    assert result.exit_code == 0, result.output
    assert load_adapter(tmp_path / "own").config["compression"]["distilled"] == 20


def test_texts_become_rows(tmp_path):
    from tokenizers import processors

    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    running = tmp_path / "book.txt"
    running.write_text(text_of(50))
    batches = text_batches(read_texts(running), tokenizer, batch_size=2, max_length=16)
    assert tokenizer.backend_tokenizer.truncation is None
    assert [tuple(b["input_ids"].shape) for b in batches] == [(2, 16), (1, 16)]  # two words left over are no row
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "w5 w6 w7"}\n\n{"text": "w8"}\n{"text": " "}\n')
    (batch,) = text_batches(read_texts(lines), tokenizer, batch_size=4, max_length=2)
    assert batch["input_ids"].tolist() == [[5, 6], [8, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    tokenizer.model_max_length = 8  # a row is no longer than the model takes, and has its special tokens
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="w2 $A", special_tokens=[("w2", 2)]
    )
    (batch,) = text_batches(read_texts(running)[:1], tokenizer, batch_size=9, max_length=16)
    assert batch["input_ids"].shape == (7, 8)
    assert (batch["input_ids"][:, 0] == 2).all()
    for content, message in (
        ('{"text": 5}', "line 1: expected an object with a text under 'text'"),
        ("[]", "line 1"),
        ('\n{"text"', "line 2: expected JSON"),
        ("\n", "has no text"),
    ):
        lines.write_text(content)
        with pytest.raises(DTSError, match=message):
            read_texts(lines)
    for name, expected in (("x.JSONL", ["a", "b"]), ("x.ndjson", ["a", "b"])):
        (tmp_path / name).write_text('{"text": "a"}\n{"text": "b"}\n')
        assert read_texts(tmp_path / name) == expected
    (tmp_path / "x.json").write_text('[{"text": "a"}]')
    with pytest.raises(DTSError, match=r"or \.jsonl with an object in each line; got \.json"):
        read_texts(tmp_path / "x.json")
    with pytest.raises(DTSError, match="1 or more, got 0"):
        text_batches(["a", "b"], tokenizer, batch_size=0, max_length=8)
    with pytest.raises(DTSError, match="cannot cut a running text"):
        text_batches(["a text"], SimpleNamespace(is_fast=False), batch_size=1, max_length=8)
    with pytest.raises(DTSError, match="expected a text file"):
        read_texts(tmp_path / "nothing.txt")


def _writer(ends=(7, 11)):
    """With ends that come soon, and settings that would leave tokens out."""
    model = llama().eval()
    settings = model.generation_config
    settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = 3, list(ends), 0
    settings.temperature, settings.top_k, settings.repetition_penalty, settings.do_sample = 0.01, 1, 5.0, True
    return model


def test_rows_that_the_model_writes_itself():
    model = _writer()
    batches = generated_batches(rows=70, batch_size=16, max_length=12, seed=4)(model)
    assert [len(b["input_ids"]) for b in batches] == [16, 16, 16, 16, 6]
    again = generated_batches(rows=70, batch_size=16, max_length=12, seed=4)(model)
    assert all(torch.equal(x["input_ids"], y["input_ids"]) for x, y in zip(batches, again, strict=True))
    other = generated_batches(rows=70, batch_size=16, max_length=12, seed=5)(model)
    assert not torch.equal(batches[0]["input_ids"], other[0]["input_ids"])
    assert model.generation_config.top_k == 1
    seen = set()
    for batch in batches:
        for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
            assert ids[0] == 3
            end = next((i for i, token in enumerate(ids) if i and token in (7, 11)), len(ids) - 1)
            assert mask == [1] * (end + 1) + [0] * (len(ids) - end - 1)
            seen |= set(ids[1 : end + 1])
    assert len(seen) > 30  # of 60: with the model's own settings it would be a handful
    sizes = [len(b["input_ids"]) for b in generated_batches(rows=200, batch_size=48, max_length=4)(model)]
    assert sizes == [48, 48, 48, 48, 8]
    # An end token of a prefix ends nothing.
    prefixed = generated_batches(rows=2, batch_size=1, max_length=6, prefix=[9, 8, 7])(model)
    for batch in prefixed:
        assert batch["input_ids"][:, :3].tolist() == [[9, 8, 7]]
        assert (batch["attention_mask"][:, :4] == 1).all()
    nested = transformers.LlavaConfig(text_config=model.config)
    assert not hasattr(nested, "bos_token_id")
    model.config = nested
    assert generated_batches(rows=4, batch_size=2, max_length=4)(model)[0]["input_ids"][:, 0].tolist() == [3, 3]


def test_who_writes_no_text_is_told():
    with pytest.raises(DTSError, match="BertForSequenceClassification writes no text"):
        generated_batches()(bert())
    model = _writer(ends=())
    model.generation_config.bos_token_id = model.config.bos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(DTSError, match="no token that texts begin with"):
        generated_batches()(model)
    for wrong in ({"rows": 16}, {"batch_size": 0}, {"max_length": 1}, {"max_length": 3, "prefix": [1, 2, 3]}):
        with pytest.raises(DTSError, match="rows for two batches"):
            generated_batches(**wrong)


def test_without_data(tmp_path):
    """The model's own text brings an adapter nearer to it on other text, too."""
    case = Case(tmp_path, llama)
    elsewhere = case.batches()
    before = _mean_divergence(case, case.adapter, elsewhere)
    write = generated_batches(rows=512, batch_size=32, max_length=12)
    distill(case.adapter, case.base, case.tuned, write, tmp_path / "new", DistillConfig(steps=80))
    assert _mean_divergence(case, tmp_path / "new", elsewhere) < 0.9 * before


@torch.no_grad()
def _mean_divergence(case, adapter, batches) -> float:
    tuned = type(llama()).from_pretrained(case.tuned).eval()
    served = DTSModel.from_pretrained(case.base, adapter)
    found = [divergence(served(**b).logits.flatten(0, 1), tuned(**b).logits.flatten(0, 1)) for b in batches]
    return float(torch.stack(found).mean())

"""Batches that no layer can mix: run once for each adapter, by models that cannot, and by calls made up for it."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from test_model_architectures import adapters, deberta, t5

from dts_fast import route
from dts_fast.apart import Apart, NoCache, _pad_token
from dts_fast.errors import MixedBatchError, NeverMixedError
from dts_fast.routing import current_route

NAMES = ["b", "__base__", "a", "b"]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:no fast path")
@pytest.mark.parametrize("length", [2, 4, 6])  # as many tokens as names, and not
@pytest.mark.parametrize("make", [t5, deberta])
def test_every_row_gets_its_adapters_logits(tmp_path, make, length):
    """T5's table of relative positions has no rows; DeBERTa computes with weights of layers that it does not call."""
    model, dense = adapters(tmp_path, make)
    ids = torch.randint(3, 99, (4, length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if make is t5:
        inputs["decoder_input_ids"] = torch.randint(3, 99, (4, length))
    expected = torch.stack([dense[name](**inputs).logits[row] for row, name in enumerate(NAMES)])
    with warnings.catch_warnings():  # one adapter is never divided, however it is named
        warnings.simplefilter("error", UserWarning)
        alone = model(**inputs, adapter_names=["a"] * 4).logits
    one = dense["a"](**inputs).logits
    torch.testing.assert_close(alone, one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
    said = "relative positions" if make is t5 else "without calling"
    with pytest.warns(UserWarning, match=f"once for each of them.*{said}"):
        out = model(**inputs, adapter_names=NAMES)
    # Float32 sums of base and delta apart instead of together.
    torch.testing.assert_close(out.logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = model(**inputs, adapter_names=NAMES)
        in_tuples = model(**inputs, adapter_names=NAMES, return_dict=False, use_cache=False)
        with route(NAMES):
            routed = model(**inputs)
    for logits in (again.logits, routed.logits, in_tuples[0]):
        assert torch.equal(logits, out.logits)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:a batch of these adapters")
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_every_row_gets_its_adapters_generation(tmp_path, settings):
    model, dense = adapters(tmp_path, t5)
    ids = torch.randint(3, 99, (4, 5))
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, **settings}
    tokens = model.generate(input_ids=ids, adapter_names=NAMES, **settings)
    returned = settings.get("num_return_sequences", 1)
    assert len(tokens) == 4 * returned
    for row, name in enumerate(NAMES):
        alone = dense[name].generate(input_ids=ids[row : row + 1], **settings)
        assert torch.equal(tokens[row * returned : (row + 1) * returned], alone)
    whole = model.generate(input_ids=ids, adapter_names=NAMES, return_dict_in_generate=True, **settings)
    assert torch.equal(whole.sequences, tokens)


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, conv_dim=(16, 16),
        conv_stride=(3, 2), conv_kernel=(5, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, vocab_size=20,
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:no fast path", "ignore:a batch of these adapters")
def test_parametrized_weights(tmp_path):
    """Its convolution of positions has weight normalisation, which computes the weight from two parameters."""
    model, dense = adapters(tmp_path, wav2vec2)
    x = torch.randn(4, 240)
    for name in ("a", "b", "__base__"):
        expected = dense[name](x).logits
        logits = model(x, adapter_names=name).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    expected = torch.stack([dense[name](x).logits[row] for row, name in enumerate(NAMES)])
    logits = model(x, adapter_names=NAMES).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:a batch of these adapters")
def test_what_cannot_be_divided_is_refused_as_before(tmp_path):
    model, _ = adapters(tmp_path, t5)
    ids = torch.randint(3, 99, (2, 5))
    inputs = {"input_ids": ids, "decoder_input_ids": ids, "adapter_names": ["a", "b"]}
    with torch.no_grad():
        cache = model(input_ids=ids, decoder_input_ids=ids, adapter_names="a").past_key_values
    for more in ({"past_key_values": cache}, {"labels": ids}, {"decoder_attention_mask": torch.ones(3, 5)}):
        with pytest.raises(MixedBatchError, match="relative positions"):
            model(**inputs, **more)
    with pytest.raises(MixedBatchError, match="relative positions"):
        model.generate(input_ids=ids, adapter_names=["a", "b"], eos_token_id=torch.tensor([1, 2]))
    with pytest.raises(MixedBatchError, match="a cache in a tuple"):
        model(**inputs, return_dict=False)
    model(**inputs).logits.sum().backward()  # rows alone, with gradients


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:a batch of these adapters")
def test_there_is_no_cache_to_go_on_with(tmp_path):
    model, _ = adapters(tmp_path, t5)
    ids = torch.randint(3, 99, (2, 5))
    cache = model(input_ids=ids, decoder_input_ids=ids, adapter_names=["a", "b"]).past_key_values
    with pytest.raises(MixedBatchError, match="keeps no cache"):
        cache.get_seq_length()
    for names in (["a", "b"], "a"):
        with pytest.raises(MixedBatchError):
            model(input_ids=ids, decoder_input_ids=ids[:, :1], past_key_values=cache, adapter_names=names)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:a batch of these adapters")
def test_what_the_first_try_writes_to_its_arguments_is_not_for_the_others(tmp_path):
    """Beams: generate() repeats what an encoder gave in the object that holds it."""
    model, _ = adapters(tmp_path, t5)
    ids = torch.randint(3, 99, (2, 5))
    settings = {"num_beams": 2, "max_new_tokens": 3, "min_new_tokens": 3, "adapter_names": ["a", "b"]}
    encoded = model.get_encoder()(ids)
    given = model.generate(input_ids=ids, encoder_outputs=encoded, **settings)
    assert encoded.last_hidden_state.shape[0] == 2
    assert torch.equal(model.generate(input_ids=ids, encoder_outputs=encoded, **settings), given)


class Model:
    """Refuses what is mixed; rows that it returns tell the adapter."""

    generation_config = None

    def __init__(self, lasting: bool = True, **output: object) -> None:
        self.tried, self.lasting, self.output = [], lasting, output

    def __call__(self, x, **kwargs):
        names = current_route().adapter_names
        self.tried.append(names)
        if not isinstance(names, str):
            raise (NeverMixedError if self.lasting else MixedBatchError)("rows unknown.")
        steps = {"a": 1, "b": 3}.get(names, 2)
        sequences = torch.cat([x, torch.full((len(x), steps), ord(names[0]))], 1)
        if not self.output:
            return sequences
        return {"sequences": sequences, **{name: value(x, steps) for name, value in self.output.items()}}


def run(apart, model, names, width=2, **kwargs):
    x = torch.arange(width * len(names)).view(len(names), width)
    with route(names):
        return apart.generate(model, (x,), {"pad_token_id": 7, **kwargs}, model)


@pytest.mark.filterwarnings("ignore:a batch of these adapters")
def test_shorter_sequences_are_padded_and_rows_stay_in_order():
    tokens = run(Apart(), Model(), ["b", "a", "c", "a"])
    a, b, c = map(ord, "abc")
    expected = [[0, 1, b, b, b], [2, 3, a, 7, 7], [4, 5, c, c, 7], [6, 7, a, 7, 7]]
    assert tokens.tolist() == expected
    with pytest.raises(MixedBatchError, match="no pad_token_id"):
        run(Apart(), Model(), ["b", "a"], pad_token_id=None)


@pytest.mark.filterwarnings("ignore:a batch of these adapters")
def test_other_outputs_are_put_together_where_they_are_alike():
    model = Model(sequences_scores=lambda x, steps: x[:, 0].float(), past_key_values=lambda x, steps: object())
    out = run(Apart(), model, ["b", "a", "b"])
    assert out["sequences_scores"].tolist() == [0, 2, 4]
    assert isinstance(out["past_key_values"], NoCache)
    by_step = Model(logits=lambda x, steps: (x.float(),) * steps)
    assert torch.equal(run(Apart(), by_step, ["c", "d"])["logits"][0], torch.arange(4.0).view(2, 2))


@pytest.mark.filterwarnings("ignore:a batch of these adapters")
@pytest.mark.parametrize(
    ("output", "said"),
    [
        ({"logits": lambda x, steps: (x,) * steps}, "numbers of steps"),
        ({"loss": lambda x, steps: x.float().mean()}, "what of it is whose"),
        ({"shared": lambda x, steps: torch.ones(7, 2)}, "what of it is whose"),
        ({"beam_indices": lambda x, steps: x, "scores": lambda x, steps: x}, "of the whole batch"),
        ({"logits_per_image": lambda x, steps: x}, "of the whole batch"),
        ({"chosen": lambda x, steps: steps}, "more than its rows"),
        ({"texts": lambda x, steps: ["text"] * len(x)}, "more than its rows"),
        ({"sequences": lambda x, steps: x.float()}, "no sequences of tokens"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_what_is_not_of_rows_is_refused(output, said):
    with pytest.raises(MixedBatchError, match=f"rows unknown.*{said}"):
        run(Apart(), Model(**output), ["a", "b", "a"])


@pytest.mark.parametrize(
    "more",
    [
        {"mask": torch.ones(3)},
        {"mask": torch.ones(2, 2)},
        {"texts": ["x", "y", "z"]},
        {"nested": {"mask": torch.ones(2, 2)}},
        {"processor": object()},
        {"streamer": object()},
        {"logits_processor": [object()]},
    ],
    ids=["vector", "matrix", "list", "nested", "object", "streamer", "processors"],
)
def test_arguments_that_may_not_be_of_rows_are_refused(more):
    model = Model()
    with pytest.raises(MixedBatchError, match=r"rows unknown\.$"):
        run(Apart(), model, ["a", "b", "a"], **more)
    assert len(model.tried) == 1


def test_what_was_refused_is_not_tried_again_until_adapters_change():
    apart, model = Apart(), Model()
    with pytest.warns(UserWarning, match="rows unknown"):
        run(apart, model, ["a", "b"], width=3)
    assert model.tried == [("a", "b"), "a", "b"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(apart, model, ["b", "a", "c"])  # and others beside them
    assert model.tried[3:] == ["b", "a", "c"]
    apart.forget("c")
    run(apart, model, ["b", "a"])
    assert model.tried[6:] == ["b", "a"]
    apart.forget("a")
    with pytest.warns(UserWarning, match="rows unknown"):
        run(apart, model, ["a", "b"], width=3)
    assert model.tried[8:] == [("a", "b"), "a", "b"]


@pytest.mark.filterwarnings("ignore:a batch of these adapters")
def test_what_one_call_alone_refuses_is_tried_again():
    apart, model = Apart(), Model(lasting=False)
    for _ in range(2):
        run(apart, model, ["a", "b"], width=3)
    assert model.tried == [("a", "b"), "a", "b"] * 2


def test_one_adapter_is_never_divided():
    model = Model()
    with pytest.raises(MixedBatchError, match="rows unknown"):
        run(Apart(), model, ["a", "a"])
    assert model.tried == [("a", "a")]


def test_the_token_that_fills_sequences():
    class Config:
        pad_token_id, eos_token_id = None, [5, 6]

    class Holder:
        generation_config = Config()

    assert _pad_token(Holder(), {}) == 5
    assert _pad_token(Holder(), {"pad_token_id": 0}) == 0
    assert _pad_token(Holder(), {"generation_config": Config(), "eos_token_id": 3}) == 3
    assert _pad_token(object(), {}) is None


def xlnet():
    config = transformers.XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=40)
    return transformers.XLNetForSequenceClassification(config)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:no fast path", "ignore:a batch of these adapters")
def test_models_that_put_time_first_inside(tmp_path):
    """As many tokens as rows: layers get matrices that look like any other's."""
    model, dense = adapters(tmp_path, xlnet)
    for length in (4, 6, 4):
        ids = torch.randint(3, 99, (4, length))
        logits = model(input_ids=ids, adapter_names=NAMES, use_mems=False).logits
        expected = torch.stack([dense[name](input_ids=ids).logits[row] for row, name in enumerate(NAMES)])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


class Failing(Model):
    """A model that cannot do with what it gets where rows differ."""

    def __call__(self, x, **kwargs):
        names = current_route().adapter_names
        self.tried.append(names)
        if not isinstance(names, str) or self.output:
            raise IndexError("too many rows")
        return x


def test_what_fails_where_rows_differ_is_run_for_each_adapter():
    with pytest.warns(UserWarning, match=r"it fails \(IndexError: too many rows\)"):
        assert run(Apart(), Failing(), ["a", "b", "a"]).tolist() == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(IndexError, match="too many rows"):  # the call's own fault is told as it is
        run(Apart(), Failing(fails=True), ["a", "b", "a"])


def test_as_many_rows_as_tokens_are_tried_with_one_more_row_once():
    model, apart = Square(), Apart()
    for _ in range(2):
        run(apart, model, ["a", "b"])
    run(apart, model, ["a", "c"])
    assert model.tried == [("a", "b", "a"), ("a", "b"), ("a", "b"), ("a", "c", "a"), ("a", "c")]
    apart.forget("b")
    run(apart, model, ["b", "c"])
    assert model.tried[5:] == [("b", "c", "b"), ("b", "c")]


class Square(Model):
    """A model that mixes rows."""

    def __call__(self, x, **kwargs):
        self.tried.append(current_route().adapter_names)
        return x

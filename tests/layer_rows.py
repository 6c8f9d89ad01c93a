"""What the tests of layers share: a layer with two adapters, and rows that must each be their own."""

from __future__ import annotations

import torch
from torch import nn

from dts_fast import DTSModule, fit, fit_vector, route
from dts_fast.nn import wrap
from dts_fast.slots import SlotTable


def both(layer: nn.Module) -> tuple[DTSModule, dict[str, dict[str, torch.Tensor]]]:
    """The layer in its fastest wrapper with adapters "a" and "b" for all parameters, and their dense parameters."""
    wrapper = wrap(layer, SlotTable(3))
    dense = {"__base__": {n: p.detach() for n, p in layer.named_parameters()}}
    for name in "ab":
        deltas = {}
        for n, p in layer.named_parameters():
            change = 0.3 * torch.randn(p.shape)
            deltas[n] = fit(change, rank=4) if p.dim() > 1 else fit_vector(change)
        wrapper.load_adapter(name, **deltas)
        dense[name] = {n: (p.float() + deltas[n].dequantize()).to(p.dtype) for n, p in dense["__base__"].items()}
    return wrapper, dense


ROWS = ["a", "__base__", "b", "a"]


def assert_rows_are_their_own(wrapper, dense, x, tolerance) -> None:
    def alone(name, x):
        return torch.func.functional_call(wrapper.base_layer, dense[name], x)

    with torch.no_grad():
        with route(ROWS):
            y = wrapper(x)
        expected = torch.cat([alone(name, x[row : row + 1]) for row, name in enumerate(ROWS)])
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
        for name in dense:
            with route(name):
                torch.testing.assert_close(wrapper(x), alone(name, x), rtol=tolerance, atol=tolerance)
        with route(["a", "b"]):  # an input that all rows share
            torch.testing.assert_close(
                wrapper(x[:1]), torch.cat([alone("a", x[:1]), alone("b", x[:1])]), rtol=tolerance, atol=tolerance
            )

"""The native descent against the plain one in float64, on every instruction set that runs here."""

from __future__ import annotations

import pytest
import torch

from dts_fast import native
from dts_fast.descent import _descend_plain, descend_

pytestmark = pytest.mark.usefixtures("two_threads")

ISAS = native.MODULE.cpu_isas() if native.MODULE else []


@pytest.fixture(params=[*ISAS, "plain"])
def isa(request):
    if request.param == "plain":
        yield "plain"
        return
    before = native.MODULE.cpu_isa()
    native.MODULE._set_cpu_isa(request.param)
    yield request.param
    native.MODULE._set_cpu_isa(before)


@pytest.mark.parametrize(("rank", "n"), [(1, 1), (1, 5), (2, 64), (7, 130), (16, 63), (33, 257), (0, 4), (3, 0)])
def test_every_instruction_set_takes_the_same_levels(isa, rank, n):
    levels = torch.tensor([1.5, 0.4, -0.5, -1.4])
    rows = levels[torch.randint(0, 4, (rank, n))]
    factor = torch.randn(rank, 2 * rank + 3)
    gram, target = factor @ factor.t(), torch.randn(rank, n)
    expected = rows.double()
    ascending = levels.double().flip(0)
    _descend_plain(expected, target.double(), gram.double(), gram.double().diagonal(), ascending, 3)
    if isa == "plain":
        _descend_plain(rows, target, gram, gram.diagonal(), ascending.float(), 3)
    else:
        descend_(rows, target, gram, levels, 3)
    # Equal but for elements that lie on a boundary to rounding; random ones do not.
    assert torch.equal(rows, expected.float())


def test_a_sweep_never_raises_the_error(isa):
    levels = torch.tensor([1.0, 0.3, -0.3, -1.0])
    rows = levels[torch.randint(0, 4, (20, 300))]
    factor = torch.randn(20, 30)
    gram, target = factor @ factor.t(), torch.randn(20, 300)

    def objective() -> torch.Tensor:
        return 0.5 * (rows * (gram @ rows)).sum(0) - (rows * target).sum(0)

    before = objective()
    for _ in range(3):
        if isa == "plain":
            _descend_plain(rows, target, gram, gram.diagonal(), levels.flip(0), 1)
        else:
            descend_(rows, target, gram, levels, 1)
        after = objective()
        assert bool((after <= before + 1e-4 * before.abs() + 1e-4).all())
        before = after


@pytest.mark.skipif(not ISAS, reason="no extension")
def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="'mmx' is unknown or cannot run here; expected scalar"):
        native.MODULE._set_cpu_isa("mmx")

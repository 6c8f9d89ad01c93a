from __future__ import annotations

import pytest
import torch

from dts_fast import DTSConfig, compress
from dts_fast.adapter_file import load_adapter
from dts_fast.codes import LowRankDelta
from dts_fast.errors import DTSError
from dts_fast.rank import (
    rank_by_energy,
    ranks_by_density,
    ranks_by_spectral_budget,
    ranks_by_uniform_budget,
    round_up,
    uniform_ranks,
)

SHAPES = {"square": (64, 64), "wide": (16, 100), "tall": (200, 40)}


def size_of(ranks: dict[str, int]) -> int:
    """Payload of the codes and scales, and 100 bytes of headers."""
    return 100 + sum(r * (-(-n // 4) - (-k // 4) + 4) for (n, k), r in ((SHAPES[x], r) for x, r in ranks.items()))


def test_density_and_uniform_rank():
    assert ranks_by_density(SHAPES, 0.1) == {"square": 6, "wide": 1, "tall": 4}
    assert uniform_ranks(SHAPES, 20) == {"square": 20, "wide": 16, "tall": 20}


@pytest.mark.parametrize("budget", [100, 101, 500, 1234, 10_000])
def test_the_largest_density_that_fits(budget):
    ranks = ranks_by_uniform_budget(SHAPES, budget, size_of)
    assert size_of(ranks) <= budget
    if any(r < min(SHAPES[name]) for name, r in ranks.items()):
        # The next matrix to gain a rank would not fit any more.
        tops = {name: (r + 1) / min(SHAPES[name]) for name, r in ranks.items() if r < min(SHAPES[name])}
        more = ranks_by_density(SHAPES, min(tops.values()) + 1e-9)
        assert size_of(more) > budget


@pytest.mark.parametrize("budget", [100, 300, 700, 1500])
def test_components_go_where_they_buy_most_per_byte(budget):
    spectra = {name: torch.sort(torch.rand(min(shape)), descending=True).values for name, shape in SHAPES.items()}
    ranks = ranks_by_spectral_budget(SHAPES, spectra, budget, size_of)
    assert size_of(ranks) <= budget

    def value(name: str, component: int) -> float:
        n, k = SHAPES[name]
        return float(spectra[name][component]) ** 2 / (-(-n // 4) - (-k // 4) + 4)

    left = [name for name, r in ranks.items() if r < len(spectra[name])]
    assert all(size_of(ranks | {name: ranks[name] + 1}) > budget for name in left)
    # A component is worth less than one that was left out only where that one would not fit in its place.
    for name, r in ranks.items():
        for other in left:
            if r and other != name and value(name, r - 1) < value(other, ranks[other]):
                assert size_of(ranks | {name: r - 1, other: ranks[other] + 1}) > budget


def test_components_without_energy_are_never_bought():
    spectra = {name: torch.zeros(min(shape)) for name, shape in SHAPES.items()}
    spectra["square"][:3] = 1.0
    ranks = ranks_by_spectral_budget(SHAPES, spectra, 10**6, size_of)
    assert ranks == {"square": 3, "wide": 0, "tall": 0}


def test_a_budget_below_the_rest_is_an_error():
    for run in (
        lambda: ranks_by_uniform_budget(SHAPES, 99, size_of),
        lambda: ranks_by_spectral_budget(SHAPES, {}, 99, size_of),
    ):
        with pytest.raises(DTSError, match=r"99 bytes, but what is not a matrix .* takes 100"):
            run()


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.64, 1), (0.65, 2), (0.999, 3), (1.0, 3)])
def test_rank_by_energy(energy, rank):
    spectrum = torch.tensor([8.0, 5.0, 11.0**0.5, 0.0])  # squares 64, 25, 11
    assert rank_by_energy(spectrum, energy, 100.0) == rank


def test_rank_by_energy_of_a_zero_matrix():
    assert rank_by_energy(torch.zeros(4), 0.9, 0.0) == 0


def test_compress_by_energy(tmp_path, checkpoints):
    compress(*checkpoints, tmp_path / "a", DTSConfig(energy=0.5))
    from safetensors.torch import load_file

    base, tuned = (load_file(folder / "model.safetensors") for folder in checkpoints)
    for name, parameter in load_adapter(tmp_path / "a").parameters.items():
        if isinstance(parameter, LowRankDelta):
            delta = (tuned[name] - base[name]).double().reshape(parameter.u.n, parameter.v.n)
            squares = torch.linalg.svdvals(delta).square()
            assert squares[: parameter.rank].sum() >= 0.5 * squares.sum() * (1 - 1e-6)
            assert squares[: parameter.rank - 1].sum() < 0.5 * squares.sum()


def test_bundles_go_where_they_buy_most():
    spectra = {name: torch.ones(min(shape)) for name, shape in SHAPES.items()}
    spectra["wide"] *= 10
    for budget in (500, 1500, 4000):
        ranks = ranks_by_spectral_budget(SHAPES, spectra, budget, size_of, multiple=8)
        assert size_of(ranks) <= budget
        assert all(rank % 8 == 0 for rank in ranks.values())
        assert ranks["wide"] == 16 or sum(ranks.values()) == ranks["wide"]


def test_rounding_up_stops_at_full_rank():
    assert round_up({"square": 0, "wide": 3, "tall": 33}, SHAPES, 16) == {"square": 0, "wide": 16, "tall": 40}

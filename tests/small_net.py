"""A small network, and adapters that change all of its parameters: what tests of loads and evictions share."""

from __future__ import annotations

import pytest
import torch
from conftest import write_checkpoint
from torch import nn

from dts_fast import DTSConfig, DTSModel, compress

NAMES = ["a", "b", "c", "d"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 20)
        self.first, self.norm, self.second = nn.Linear(20, 24), nn.LayerNorm(24), nn.Linear(24, 7)

    def forward(self, input_ids):
        return self.second(self.norm(self.first(self.embed(input_ids))).relu())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, and adapters that change all of its parameters; "big" has a higher rank."""
    torch.manual_seed(0)
    folder, base = tmp_path_factory.mktemp("adapters"), Net()
    write_checkpoint(folder / "base", base.state_dict())
    for name in [*NAMES, "big"]:
        tuned = {n: p + 0.2 * torch.randn_like(p) for n, p in base.state_dict().items()}
        write_checkpoint(folder / f"tuned_{name}", tuned)
        config = DTSConfig(rank=20 if name == "big" else 7)
        compress(folder / "base", folder / f"tuned_{name}", folder / name, config)
    torch.save(base.state_dict(), folder / "base.pt")
    return folder


def make_model(folder, **settings) -> DTSModel:
    base = Net()
    base.load_state_dict(torch.load(folder / "base.pt", weights_only=True))
    return DTSModel(base.eval(), **settings)


IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, torch.Tensor]:
    """What each adapter alone computes."""
    model = make_model(folder)
    for name in [*NAMES, "big"]:
        model.load_adapter(folder / name, name)
    with torch.no_grad():
        return {name: model(IDS, adapter_names=name) for name in [*NAMES, "big", "__base__"]}


def contents(model: DTSModel) -> list:
    """Everything that a load may change."""
    state = [model.adapter_names, model.resident_adapters, model.active_adapter, dict(model.adapter_configs)]
    for path, wrapper in sorted(model._wrappers.items()):
        state += [path, dict(wrapper.stored), dict(wrapper.loaded)]
        for table in wrapper.children():
            if hasattr(table, "_free"):
                state += [list(table._free), dict(table._listed), dict(table._users), table.slot_pages.tolist()]
    return state


@torch.no_grad()
def check(model: DTSModel, expected: dict[str, torch.Tensor], *names: str) -> None:
    for name in names:
        assert torch.equal(model(IDS, adapter_names=name), expected[name]), name

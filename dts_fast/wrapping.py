"""Putting wrappers in the place of the layers that adapters change, and taking them away again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping

from torch import Tensor

from .arenas import Arenas
from .attach import LiveModel, Owned
from .bank import Arena
from .nn import BankedModule, DTSModule, wrap
from .slots import SlotTable


class Wrapping:
    """The wrappers of a model, one for each layer that any adapter has changed so far.

    Attributes:
        wrappers: by the path of the layer in the bare model.

    Args:
        live: the model, in which layers change their places.
        slots: the table that all wrappers share.
        arenas: what their banks get.
        prepack: see `DTSModel`.
    """

    def __init__(self, live: LiveModel, slots: SlotTable, arenas: Arenas, prepack: bool) -> None:
        self.live, self.slots, self.arenas, self.prepack = live, slots, arenas, prepack
        self.wrappers: dict[str, DTSModule] = {}

    def wrap(self, owned: Owned) -> dict[str, DTSModule]:
        """Put wrappers in the place of layers that an adapter is the first to change; returns these."""
        new = {path: parameters for path, parameters in owned.items() if path not in self.wrappers}
        arenas = self.arenas.of(self.live.modules, new)
        try:
            return self._wrap_in(owned, new, arenas)
        except BaseException:
            self.arenas.give_back(path for path in new if path not in self.wrappers)
            raise

    def _wrap_in(self, owned: Owned, new: Owned, arenas: Mapping[str, Mapping[str, Arena]]) -> dict[str, DTSModule]:
        made: dict[str, DTSModule] = {}
        slow: dict[str, list[str]] = {}  # by the layers' class
        for path, parameters in new.items():
            # Heads that come whole with an adapter are not the base's to compute with.
            whole = isinstance(parameters.get("weight"), Tensor)
            prepack = self.prepack and not self.live.is_tied(path) and not whole
            layer = self.live.modules[path]
            wrapper = wrap(layer, self.slots, path, parameters, arenas=arenas.get(path), prepack=prepack)
            wrapper.is_root = not path
            made[path] = wrapper
            if not (whole or wrapper.has_fast_path(parameters)) and wrapper.batch_first:
                slow.setdefault(type(self.live.modules[path]).__name__, []).append(path)
        self.wrappers.update(made)
        self._share_banks(owned, new)
        for path, wrapper in made.items():
            self.live.put(path, wrapper)
        if slow:
            named = (
                f"{paths[0]} {f'and {len(paths) - 1} more ' if len(paths) > 1 else ''}({kind})"
                for kind, paths in slow.items()
            )
            warnings.warn(
                f"no fast path for {', '.join(named)}: a batch runs them once for each of its adapters. To leave them "
                "at the base, compress with --exclude.",
                stacklevel=5,
            )
        return made

    def unwrap(self, made: Mapping[str, DTSModule]) -> None:
        """Take wrappers that hold nothing away again, and give back what of a fixed memory they took."""
        for path, wrapper in made.items():
            names, slots = wrapper.base_names(), range(self.slots.capacity)
            if not any(wrapper.changes(slot, name) for slot in slots for name in names):
                del self.wrappers[path]
                self.live.put(path, wrapper.bare_layer())
                self.arenas.give_back([path])

    def _share_banks(self, owned: Owned, new: Collection[str]) -> None:
        """Layers with tied weights keep the adapters' deltas once, unless a fine-tune has untied them."""
        for path in owned:
            for other in self.live.tied_to(path):
                mine, others = self.wrappers.get(path), self.wrappers.get(other)
                if not (isinstance(mine, BankedModule) and isinstance(others, BankedModule)):
                    continue
                same = owned[path].get("weight") is owned.get(other, {}).get("weight")
                if mine.bank is others.bank and not same:
                    mine.bank = copy.deepcopy(others.bank)
                elif mine.layout == others.layout and same and path in new and other in new:
                    mine.bank = others.bank

"""What an adapter's parameters are in a live model: names, owners, tied weights, and whether it is the right base."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from .adapter_file import Adapter, Parameter
from .checkpoint import common_prefix
from .errors import BaseMismatchError
from .fingerprint import Elements, check_fingerprint
from .growth import added_rows_of, grown_parameter
from .nn.module import has_features, is_plain
from .nn.parameters import named_tensors, tensor_of
from .pieces import Piece
from .prepack import PackedLinear
from .renaming import names_in_checkpoint

# Module path -> parameter name within it -> what the adapter has for it.
Owned = dict[str, dict[str, Parameter]]


class LiveModel:
    """The parameters of a model as they were before any layer was wrapped.

    Attributes:
        root: the model; another module where it is wrapped itself.
        modules: by path, as they were; tied ones have several.
    """

    def __init__(self, model: nn.Module) -> None:
        self.root = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        # Some models keep layers in plain lists as well, and call them there.
        self._in_lists: dict[int, list[tuple[list, int]]] = {}
        for module in model.modules():
            for value in vars(module).values():
                for i, entry in enumerate(value if isinstance(value, list) else ()):
                    if isinstance(entry, nn.Module):
                        self._in_lists.setdefault(id(entry), []).append((value, i))
        first: dict[int, str] = {}
        self._first_path = {path: first.setdefault(id(module), path) for path, module in self.modules.items()}
        self._aliases = _aliases(model)
        self._names_in_checkpoint = names_in_checkpoint(model)
        pieces = [name for name in self._names_in_checkpoint.values() if name not in self._aliases]
        self._aliases |= {name: self._aliases_of_piece(name) for name in pieces}
        self._last: tuple[object, ...] = (None,)
        # One that every layout of weights leaves in its place: the first, most often an embedding table.
        owned = (
            (module, leaf)
            for module in self.modules.values()
            for leaf, p in module._parameters.items()
            if p is not None
        )
        self._sample = next(owned, None)
        for path, module in self.modules.items():
            if _keeps_its_weight_elsewhere(module):
                name = f"{path}.weight"
                self._aliases[name] = (name,)
                self._names_in_checkpoint[name] = name

    @property
    def device(self) -> torch.device:
        """Where the model computes: the device of its first parameter."""
        if self._sample is not None:
            module, leaf = self._sample
            parameter = module._parameters.get(leaf)
            if parameter is not None:
                return parameter.device
        return next((p.device for p in self.root.parameters()), torch.device("cpu"))

    def owners(self, adapter: Adapter) -> tuple[Owned, dict[str, str]]:
        """Which modules the parameters of an adapter belong to.

        Returns:
            By module; and the adapter's deltas' names to the model's.

        Raises:
            BaseMismatchError: deltas of parameters that the model does not have.
        """
        tied = adapter.config["tied"]
        key = tuple((name, isinstance(parameter, Tensor)) for name, parameter in adapter.parameters.items()), tied
        last = self._last  # read once: other threads load too
        if key == last[0]:  # adapters of one base mostly change the same parameters
            places, live, grown = last[1:]
            owned: Owned = {}
            for name, path, leaf in places:
                owned.setdefault(path, {})[leaf] = adapter.parameters[name]
            self._check_servable(live | grown)
            return owned, live
        pieces = {name: piece for name in adapter.parameters if (piece := Piece.named(name)) is not None}
        tables = {name: grown_parameter(name) or name for name in adapter.parameters}
        theirs = {pieces[name].parameter if name in pieces else tables[name] for name in adapter.parameters}
        strip, add = common_prefix(self._names_in_checkpoint, theirs)
        live = {add + name.removeprefix(strip): own for name, own in self._names_in_checkpoint.items()}
        for name, piece in pieces.items():  # of a stack in the checkpoint, which is one in the model
            if piece.parameter in live:
                live[name] = str(replace(piece, parameter=live[piece.parameter]))
                self._aliases.setdefault(live[name], self._aliases_of_piece(live[name]))
        of_live = {own: name for name, own in live.items()}
        missing = [name for name in adapter.deltas if name not in live]
        if missing:
            raise BaseMismatchError(
                f"the model has no parameters for {len(missing)} of {len(adapter.parameters)} entries of the adapter "
                f"(first: {missing[0]}). Expected {adapter.config['base_model_name_or_path']}, got "
                f"{type(self.root).__name__}."
            )
        owned, places, known = {}, [], True
        for name, parameter in adapter.parameters.items():
            table = tables[name]
            if table not in live:
                known = False
                warnings.warn(
                    f"{type(self.root).__name__} has no parameter {name!r}, which the adapter stores whole; it is "
                    "not used. Load the base by its path to get the fine-tune's model class.",
                    stacklevel=4,
                )
                continue
            for path, leaf in self._owners(live[table]):
                # Where the fine-tune has untied what the base ties, an alias with an entry of its own has that, and a
                # head that comes whole is not the table.
                alias = of_live.get(f"{path}.{leaf}", table)
                untied = isinstance(parameter, Tensor) and live[table] != self._aliases[live[table]][0]
                if alias == table or not (alias in adapter.parameters or (untied and tied.get(alias) != table)):
                    leaf = leaf if table == name else added_rows_of(leaf)
                    owned.setdefault(path, {})[leaf] = parameter
                    places.append((name, path, leaf))
        grown = {name: live[table] for name, table in tables.items() if table != name and table in live}
        live = {name: live[name] for name in adapter.deltas}
        self._check_servable(live | grown)
        if known:
            self._last = key, places, live, grown
        return owned, live

    def _aliases_of_piece(self, name: str) -> tuple[str, ...]:
        """A piece's names: one in each of the stacks that are tied."""
        path, _, leaf = name.rpartition(".")
        piece = Piece.named(leaf)
        if piece is None:
            return (name,)
        stack = f"{path}.{piece.parameter}" if path else piece.parameter
        places = (alias.rpartition(".") for alias in self._aliases.get(stack, (stack,)))
        return tuple(f"{path}{dot}{replace(piece, parameter=parameter)}" for path, dot, parameter in places)

    def _check_servable(self, live: Mapping[str, str]) -> None:
        """Refuse a base with parameters that no delta can be added to at run time; at every load, as it may have been
        moved since the last one.

        Raises:
            BaseMismatchError: they are not in memory, or of a type that the ops do not take.
        """
        for name in live.values():
            path, _, leaf = name.rpartition(".")
            piece = Piece.named(leaf)
            module, leaf = self.modules[path], leaf if piece is None else piece.parameter
            parameter = module._parameters.get(leaf, module._buffers.get(leaf))
            if parameter is None:
                continue
            if parameter.is_meta:
                raise BaseMismatchError(
                    f"{name} is not in memory (device 'meta': not loaded, or offloaded by accelerate). Load the base "
                    "without offloading, on devices that hold it; adapters add about 1 %."
                )
            if parameter.dtype == torch.float64:
                raise BaseMismatchError(
                    f"{name} is float64; expected float32, float16 or bfloat16. Convert the base: "
                    "model.to(torch.float32)."
                )

    def check_base(self, adapter: Adapter, live: Mapping[str, str]) -> None:
        """Refuse an adapter that was made for another base (`check_fingerprint`); ``live`` as `owners` returns it.

        Raises:
            BaseMismatchError: see `check_fingerprint`.
        """
        parameters = _LiveParameters(self.modules, live)
        config = adapter.config
        check_fingerprint(str(config["base_fingerprint"]), parameters, str(config["base_model_name_or_path"]))

    def is_tied(self, path: str) -> bool:
        return len(self._aliases.get(f"{path}.weight", ())) > 1

    def tied_to(self, path: str) -> list[str]:
        """The paths of other modules with the same ``weight``."""
        aliases = [alias.rpartition(".")[0] for alias in self._aliases.get(f"{path}.weight", ())]
        return [other for other in aliases if other != path]

    def put(self, path: str, module: nn.Module) -> None:
        """Put a module in the place of the one that had this path in the bare model."""
        original = self.modules[path]
        for place in [p for p, m in self.modules.items() if m is original]:
            parent, _, child = place.rpartition(".")
            if place:
                setattr(self.modules[parent], child, module)
            else:
                self.root = module
        for entries, i in self._in_lists.get(id(original), ()):
            entries[i] = module

    def _owners(self, name: str) -> list[tuple[str, str]]:
        """Modules that use a parameter, with its name in each: several where weights are tied."""
        owners = []
        for alias in self._aliases[name]:
            path, _, leaf = alias.rpartition(".")
            parent, _, child = path.rpartition(".")
            # MultiheadAttention reads its projection's weight without calling it: a wrapper there is never asked.
            if isinstance(self.modules.get(parent), nn.MultiheadAttention):
                path, leaf = parent, f"{child}.{leaf}"
            # A module that stands at several paths is wrapped once, under the first.
            first = self._first_path[path]
            if (first, leaf) not in owners:
                owners.append((first, leaf))
        return owners


class _LiveParameters(Mapping):
    """The base's parameters by their names in an adapter, for `check_fingerprint`."""

    def __init__(self, modules: Mapping[str, nn.Module], names: Mapping[str, str]) -> None:
        self.modules, self.names = modules, names

    def __getitem__(self, name: str) -> Tensor | Elements:
        path, _, leaf = self.names[name].rpartition(".")
        module = self.modules[path]
        piece = Piece.named(leaf)
        if piece is not None:
            return piece.of(module.get_parameter(piece.parameter))
        parameter = module._parameters.get(leaf, module._buffers.get(leaf))
        if is_plain(parameter):
            return parameter
        if leaf == "weight" and isinstance(module, PackedLinear):
            return module
        if leaf == "weight" and has_features(module):
            return LinearElements(module)
        return tensor_of(module, leaf)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class LinearElements:
    """The weight of a layer that acts like a linear and keeps its weight in some form of its own (quantised), by what
    the layer makes of unit vectors."""

    exact = False

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def numel(self) -> int:
        return self.layer.out_features * self.layer.in_features

    @torch.no_grad()
    def elements(self, positions: Tensor) -> Tensor:
        columns = positions % self.layer.in_features
        tensors = [*self.layer.parameters(), *self.layer.buffers()]
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
        dtype = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
        x = torch.nn.functional.one_hot(columns, self.layer.in_features).to(tensors[0].device, dtype)
        y = self.layer(x).float() - self.layer(torch.zeros_like(x)).float()
        return y.cpu()[torch.arange(len(positions)), positions // self.layer.in_features]


def _keeps_its_weight_elsewhere(module: nn.Module) -> bool:
    """Whether a layer acts like a linear without a parameter ``weight`` (several libraries' quantised ones)."""
    return (
        has_features(module)
        and "weight" not in module._parameters
        and not isinstance(module, PackedLinear)
        and not any(True for _ in module.children())
    )


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every parameter's (and buffer's) name to all names of the same one: several where weights are tied."""
    names: dict[int, list[str]] = {}
    parameters = named_tensors(model)
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(names[id(parameter)]) for name, parameter in parameters.items()}

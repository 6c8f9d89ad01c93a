"""`DTSModel`: a Hugging Face model with many adapters on one resident base, under PEFT's verbs."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from .adapter_file import (
    CARD_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    Adapter,
    Parameter,
    load_adapter,
    locate_adapter,
)
from .atomic import staged_directory
from .bank import BASE, Bank, SlotTable
from .characteristic import characteristic_of
from .checkpoint import Checkpoint, common_prefix
from .errors import BaseMismatchError, CheckpointError, DTSError
from .fingerprint import Elements, check_fingerprint
from .mixture import check_weights, select, similarity_weights
from .nn import DTSModule, wrap
from .prepack import PackedLinear, no_kernels
from .routing import current_route, route

DEFAULT_ADAPTER = "default"


class DTSModel(nn.Module):
    """A model whose rows may each use another adapter.

    The model's own modules stay in memory once; layers that an adapter changes are wrapped in place.

    Args:
        model: a `transformers` model, or any module whose parameters carry the checkpoint's names.
        max_adapters: how many adapters may be loaded at a time.
        prepack: keep the weights of the linear layers that adapters change in the order in which the CPU kernels read
            them, see `DTSLinear`; tied ones stay as they are. Nothing of the caller's may hold those parameters.
    """

    def __init__(self, model: nn.Module, max_adapters: int = 8, *, prepack: bool = False) -> None:
        super().__init__()
        if prepack and no_kernels() is not None:
            raise DTSError(f"prepack: {no_kernels()}. Leave prepack off.")
        self.prepack = prepack
        self.model = model
        self.slots = SlotTable(max_adapters)
        self.adapter_configs: dict[str, Mapping[str, object]] = {}
        self._sources: dict[str, Path] = {}
        # Before anything is wrapped: the checkpoint's names are those of the bare model. Tied parameters have
        # several names.
        self._modules_by_path = dict(model.named_modules(remove_duplicate=False))
        self._aliases = _aliases(model)
        self._names_in_checkpoint = _names_in_checkpoint(model)
        self._wrappers: dict[str, DTSModule] = {}
        # generate() calls an encoder by itself.
        encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
        self._hooks = []
        for module in {id(m): m for m in (model, encoder) if isinstance(m, nn.Module)}.values():
            self._hooks.append(module.register_forward_pre_hook(_enter_batch, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(_leave_batch, always_call=True))

    def __getattr__(self, name: str):
        # What is not an adapter's business (config, device, ...) is the model's.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    @classmethod
    def from_pretrained(
        cls,
        base_model: nn.Module | str | Path,
        adapter: str | Path,
        adapter_name: str = DEFAULT_ADAPTER,
        *,
        max_adapters: int = 8,
        prepack: bool = False,
        verify_base: bool = True,
        **model_kwargs: object,
    ) -> DTSModel:
        """Load a base model with a first adapter, which becomes the active one.

        Args:
            base_model: a loaded model, or a directory, ``.safetensors`` file or hub id. From a path, the model class
                is the one the fine-tune had, so that its head is there.
            adapter: adapter directory or hub id.
            max_adapters, prepack: see `DTSModel`.
            verify_base: see `load_adapter`.
            model_kwargs: for the ``from_pretrained`` of transformers (``dtype``, ``device_map``, ...).

        Raises:
            AdapterFormatError, BaseMismatchError: see `load_adapter`.
            CheckpointError: the base cannot be read.
        """
        loaded = load_adapter(adapter)
        if not isinstance(base_model, nn.Module):
            base_model = _load_base(base_model, loaded.config["model_config"], model_kwargs)
        model = cls(base_model, max_adapters, prepack=prepack)
        try:
            model._attach(loaded, adapter_name, verify_base)
        except BaseException:
            model._remove_hooks()
            raise
        model._sources[adapter_name] = locate_adapter(adapter)
        model.set_adapter(adapter_name)
        return model

    def load_adapter(self, adapter: str | Path, adapter_name: str, *, verify_base: bool = True) -> None:
        """Load one more adapter; the active one stays.

        Args:
            adapter: adapter directory or hub id.
            adapter_name: what `set_adapter` and ``adapter_names`` will call it.
            verify_base: compare the base's weights with the adapter's fingerprint; turn it off for a base whose
                weights are not in memory.

        Raises:
            AdapterFormatError: the adapter is damaged or of an unknown version.
            BaseMismatchError: it was made for another base. Nothing is loaded.
            CapacityError: all slots are taken.
            DTSError: the name is taken.
        """
        self._attach(load_adapter(adapter), adapter_name, verify_base)
        self._sources[adapter_name] = locate_adapter(adapter)

    @property
    def adapter_names(self) -> list[str]:
        """Names of the loaded adapters."""
        return self.slots.names

    @property
    def active_adapter(self) -> str:
        return self.slots.active

    def set_adapter(self, adapter_name: str) -> None:
        """What every row uses where no ``adapter_names`` are given. Copies nothing.

        Raises:
            UnknownAdapterError: no such adapter; the message lists those there are.
        """
        self.slots.slot(adapter_name)
        self.slots.active = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Free an adapter's slot and pages.

        Raises:
            UnknownAdapterError: no such adapter.
        """
        slot = self.slots.release(adapter_name)
        del self.adapter_configs[adapter_name]
        self._sources.pop(adapter_name, None)  # a mixture has none
        for wrapper in self._wrappers.values():
            wrapper.clear_slot(slot)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float] | None = None,
        adapter_name: str = "mixture",
        *,
        characteristic: Tensor | None = None,
    ) -> dict[str, float]:
        """Add the weighted sum of loaded adapters as one more adapter (the paper's variant for unseen tasks). It is
        exact, and takes no memory for matrices and biases: its slot lists the members' pages, and keeps them when the
        members are deleted.

        Args:
            adapters: names of loaded adapters.
            weights: one for each.
            adapter_name: the new adapter's.
            characteristic: ``[d]`` of a task, in place of weights: they become the cosine similarities to the
                adapters' own characteristics, normalised to sum 1 (`mixture.similarity_weights`).

        Returns:
            The weights by adapter.

        Raises:
            UnknownAdapterError: an adapter is not loaded.
            CapacityError, DTSError: no free slot, a taken name, weights that do not fit, an adapter without
                characteristic, parameters that cannot be mixed. Nothing is added.
        """
        slots = {name: self.slots.slot(name) for name in adapters}
        if (weights is None) == (characteristic is None):
            raise DTSError("add_weighted_adapter() takes exactly one of weights and characteristic.")
        if weights is None:
            chosen = similarity_weights(characteristic, self._characteristics(slots))
        else:
            chosen = dict(zip(adapters, check_weights(adapters, weights), strict=True))
        slot = self.slots.free_slot(adapter_name)
        members = [(slots[name], weight) for name, weight in chosen.items() if slots[name] >= 0]
        try:
            for wrapper in self._wrappers.values():
                wrapper.mix_slots(slot, members)
        except BaseException:
            for wrapper in self._wrappers.values():
                wrapper.clear_slot(slot)
            raise
        self.slots.occupy(adapter_name, slot)
        self.adapter_configs[adapter_name] = {"members": list(chosen.items())}
        return chosen

    def select(self, characteristic: Tensor) -> tuple[str, float]:
        """The loaded adapter whose task is nearest to a characteristic ``[d]``, with the cosine similarity: a router
        for users without an oracle.

        Raises:
            DTSError: no loaded adapter has a characteristic, or lengths differ.
        """
        with_one = [name for name, config in self.adapter_configs.items() if config.get("characteristic")]
        return select(characteristic, self._characteristics(with_one))

    def _characteristics(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: characteristic_of(self.adapter_configs.get(name, {}), name) for name in names}

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within, every row uses the base alone."""
        with route(BASE):
            yield

    def forward(self, *args, adapter_names: str | Sequence[str] | None = None, **kwargs):
        """The model's forward; ``adapter_names`` gives one name for all rows, or one for each."""
        with self._routed(adapter_names):
            return self.model(*args, **kwargs)

    @torch.no_grad()
    def generate(self, *args, adapter_names: str | Sequence[str] | None = None, **kwargs):
        """``generate`` of transformers; ``adapter_names`` as in `forward`, one name for each prompt also with beams
        or several return sequences."""
        with self._routed(adapter_names, expandable=True):
            return self.model.generate(*args, **kwargs)

    def merge_and_unload(self, adapter_name: str | None = None) -> nn.Module:
        """Add one adapter to the base's weights (in their dtype) and return the bare model.

        Args:
            adapter_name: the active one if None; ``"__base__"`` unloads without merging.

        Raises:
            UnknownAdapterError: no such adapter.
        """
        slot = self.slots.slot(adapter_name or self.slots.active)
        layers = [wrapper.bare_layer() for wrapper in self._wrappers.values()]
        # All are computed before any is written: layers with tied weights share a parameter.
        merged = [wrapper.dense_parameters(slot) for wrapper in self._wrappers.values()]
        for layer, parameters in zip(layers, merged, strict=True):
            for name, value in parameters.items():
                layer.get_parameter(name).data = value
        for path in list(self._wrappers):
            self._put(path, self._wrappers.pop(path).base_layer)
        for name in self.slots.names:
            self.slots.release(name)
        self.adapter_configs.clear()
        self._sources.clear()
        self._remove_hooks()
        return self.model

    def save_pretrained(self, path: str | Path) -> None:
        """Copy the loaded adapters to ``path/<adapter name>``; the base is not written, nor are mixtures (`fuse` writes
        those).

        Raises:
            DTSError: an adapter's files are gone from where they were loaded, or a target cannot be written.
        """
        for name, source in self._sources.items():
            with staged_directory(Path(path) / name, overwrite=True, marker=CONFIG_NAME) as staging:
                for file in source.iterdir():
                    if file.name in (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME):
                        shutil.copyfile(file, staging / file.name)

    def memory_report(self) -> dict[str, object]:
        """Bytes in memory: ``base`` (the model's own parameters, each once), ``adapters`` by name (what each uses;
        mixtures use their members' pages), and ``reserved``: the arenas, with what is free in them, and tensors that
        are stored whole."""
        banks = [bank for wrapper in self._wrappers.values() for bank in wrapper.modules() if isinstance(bank, Bank)]
        stored = [p for wrapper in self._wrappers.values() for held in wrapper.stored.values() for p in held.values()]
        own = {id(t): t.nbytes for t in self.model.parameters()}
        # Packed weights are buffers, and no bank's.
        own |= {id(m.packed): m.packed.nbytes for m in self.model.modules() if isinstance(m, PackedLinear)}
        return {
            "base": sum(own.values()),
            "adapters": {
                name: sum(wrapper.nbytes_of(self.slots.slot(name)) for wrapper in self._wrappers.values())
                for name in self.slots.names
            },
            "reserved": sum(bank.nbytes for bank in {id(bank): bank for bank in banks}.values())
            + sum(parameter.nbytes for parameter in stored),
        }

    def push_to_hub(self, *args: object, **kwargs: object) -> None:
        """Refused: what is worth sharing are the adapters, see `save_pretrained`."""
        raise DTSError("a DTSModel is not pushed as a whole; push the adapter directories that save_pretrained writes.")

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _routed(self, adapter_names, expandable: bool = False):
        if adapter_names is None:
            return nullcontext()
        chosen = route(adapter_names, expandable=expandable)
        for name in {adapter_names} if isinstance(adapter_names, str) else set(chosen.adapter_names):
            self.slots.slot(name)  # an unknown name is refused before anything runs
        return chosen

    def _attach(self, adapter: Adapter, adapter_name: str, verify_base: bool) -> None:
        slot = self.slots.free_slot(adapter_name)
        strip, add = common_prefix(self._names_in_checkpoint, adapter.parameters)
        live = {add + name.removeprefix(strip): own for name, own in self._names_in_checkpoint.items()}
        of_live = {own: name for name, own in live.items()}
        missing = [name for name in adapter.deltas if name not in live]
        if missing:
            raise BaseMismatchError(
                f"the model has no parameters for {len(missing)} of {len(adapter.parameters)} entries of the adapter "
                f"(first: {missing[0]}). Expected {adapter.config['base_model_name_or_path']}, got "
                f"{type(self.model).__name__}."
            )
        owners: dict[str, dict[str, Parameter]] = {}
        for name, parameter in adapter.parameters.items():
            if name not in live:
                warnings.warn(
                    f"{type(self.model).__name__} has no parameter {name!r}, which the adapter stores whole; it is "
                    "not used. Load the base by its path to get the fine-tune's model class.",
                    stacklevel=3,
                )
                continue
            for path, leaf in self._owners(live[name]):
                # Where the fine-tune has untied what the base ties, each alias has an entry of its own.
                alias = of_live.get(f"{path}.{leaf}", name)
                if alias == name or alias not in adapter.parameters:
                    owners.setdefault(path, {})[leaf] = parameter
        for path, parameters in owners.items():
            (self._wrappers.get(path) or DTSModule(self._modules_by_path[path], slots=self.slots)).check_parameters(
                parameters
            )
        if verify_base:
            current = _LiveParameters(self._modules_by_path, {name: live[name] for name in adapter.deltas})
            check_fingerprint(
                str(adapter.config["base_fingerprint"]), current, str(adapter.config["base_model_name_or_path"])
            )
        loaded = []
        try:
            for path, parameters in owners.items():
                if path not in self._wrappers:
                    # Heads that come whole with an adapter are not the base's to compute with.
                    prepack = (
                        self.prepack and not self._is_tied(path) and not isinstance(parameters.get("weight"), Tensor)
                    )
                    wrapper = wrap(self._modules_by_path[path], self.slots, path, prepack=prepack)
                    self._wrappers[path] = wrapper
                    self._put(path, wrapper)
                loaded.append(self._wrappers[path])
                self._wrappers[path].load_slot(slot, parameters)
        except BaseException:  # whatever stopped it, the slot must not keep a part of the adapter
            for wrapper in loaded:
                wrapper.clear_slot(slot)
            raise
        self.slots.occupy(adapter_name, slot)
        self.adapter_configs[adapter_name] = adapter.config

    def _owners(self, name: str) -> list[tuple[str, str]]:
        """Modules that use a parameter, with its name in each: several where weights are tied."""
        owners = []
        for alias in self._aliases[name]:
            path, _, leaf = alias.rpartition(".")
            parent, _, child = path.rpartition(".")
            # MultiheadAttention reads its projection's weight without calling it: a wrapper there is never asked.
            if isinstance(self._modules_by_path.get(parent), nn.MultiheadAttention):
                path, leaf = parent, f"{child}.{leaf}"
            # A module that stands at several paths is wrapped once, under the first.
            module = self._modules_by_path[path]
            first = next(p for p, m in self._modules_by_path.items() if m is module)
            if (first, leaf) not in owners:
                owners.append((first, leaf))
        return owners

    def _is_tied(self, path: str) -> bool:
        return len(self._aliases.get(f"{path}.weight", ())) > 1

    def _put(self, path: str, module: nn.Module) -> None:
        """Put a module in the place of the one that had this path in the bare model."""
        original = self._modules_by_path[path]
        for place in [p for p, m in self._modules_by_path.items() if m is original]:
            parent, _, child = place.rpartition(".")
            if place:
                setattr(self._modules_by_path[parent], child, module)
            else:
                self.model = module


# What a model is called with tells the true number of rows, which its inner inputs would not: generate() multiplies the
# batch for beams, position ids are shared by all rows, and some models flatten tokens.


class _BatchRoute(route):
    """The route of one call of a model, one name for each of its rows; the route it came from lies below it."""

    def __init__(self, names: Sequence[str], owner: nn.Module) -> None:
        super().__init__(names, flattened=True)
        self.owner = owner


def _enter_batch(module: nn.Module, args: tuple, kwargs: dict) -> None:
    current = current_route()
    if current is None or isinstance(current, _BatchRoute) or isinstance(current.adapter_names, str):
        return
    main = next((t for t in (*args, *(kwargs.get(name) for name in _MAIN_INPUTS)) if isinstance(t, Tensor)), None)
    if main is not None:
        _BatchRoute(current.names_for(main.shape[0]), module).__enter__()


def _leave_batch(module: nn.Module, args: tuple, output: object) -> None:
    current = current_route()
    if isinstance(current, _BatchRoute) and current.owner is module:
        current.__exit__()


_MAIN_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "decoder_input_ids",
    "pixel_values",
    "input_features",
    "input_values",
)


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every parameter's name to all names of the same parameter: several where weights are tied."""
    names: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(names[id(parameter)]) for name, parameter in parameters.items()}


class _LiveParameters(Mapping):
    """The base's parameters by their names in an adapter, for `check_fingerprint`: a packed one is the layer itself."""

    def __init__(self, modules: Mapping[str, nn.Module], names: Mapping[str, str]) -> None:
        self.modules, self.names = modules, names

    def __getitem__(self, name: str) -> Tensor | Elements:
        path, _, leaf = self.names[name].rpartition(".")
        module = self.modules[path]
        return module if isinstance(module, PackedLinear) and leaf == "weight" else module.get_parameter(leaf)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _names_in_checkpoint(model: nn.Module) -> dict[str, str]:
    """The name each parameter has in a checkpoint of this model, to its name in the model.

    The two differ where transformers renames on loading (ViT's ``encoder.layer.0.attention...query`` is
    ``layers.0.attention.q_proj`` in memory); it can tell what saving would turn a state dict into.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {name: name for name in parameters}
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # no transformers, or a release that does not rename
        return names
    if not isinstance(model, PreTrainedModel):
        return names
    # Tied parameters are one tensor under several names; a view of each keeps the names apart.
    views = {name: parameter.detach() for name, parameter in parameters.items()}
    own_name = {id(view): name for name, view in views.items()}
    for name, view in revert_weight_conversion(model, views).items():
        if id(view) in own_name:  # a tensor that saving would split or fuse has no single name
            names.pop(own_name[id(view)], None)
            names[name] = own_name[id(view)]
    return names


def _load_base(base_model: str | Path, changed: Mapping[str, object], model_kwargs: dict) -> nn.Module:
    """The base's weights in the model class of the fine-tune."""
    try:
        import transformers
    except ImportError as error:
        raise DTSError(
            "loading a base model by its path needs transformers: pip install 'dts_fast[hf]', or pass a loaded model."
        ) from error
    checkpoint = Checkpoint.open(base_model)
    # A base that ties its head stays tied: an untied head of the fine-tune comes whole with the adapter.
    settings = {**checkpoint.config, **{k: v for k, v in changed.items() if k != "tie_word_embeddings"}}
    if not checkpoint.config:
        raise CheckpointError(f"{base_model}: expected a config.json beside the weights, found none.")
    architecture = (settings.get("architectures") or [None])[0]
    model_class = getattr(transformers, str(architecture), transformers.AutoModel)
    config = transformers.AutoConfig.for_model(**settings)
    path = Path(base_model)
    if path.is_file():
        weights = {name: checkpoint.get(name) for name in checkpoint.tensors}
        if model_class is transformers.AutoModel:
            model_class = type(model_class.from_config(config))
        return model_class.from_pretrained(None, config=config, state_dict=weights, **model_kwargs).eval()
    return model_class.from_pretrained(str(base_model), config=config, **model_kwargs).eval()

"""`DTSModel`: a Hugging Face model with many adapters on one resident base, under PEFT's verbs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .adapter_file import CARD_NAME, CONFIG_NAME, MARKER, WEIGHTS_NAME, Adapter, locate_adapter, open_adapter
from .apart import Apart
from .arenas import Arenas
from .atomic import staged_directory
from .attach import LiveModel, Owned
from .base import load_base
from .batch import main_input
from .calls import Calls
from .characteristic import characteristic_of
from .endings import EOS_KEY, Endings, Ends, as_ends, by_name
from .errors import AdapterFormatError, BaseMismatchError, DTSError
from .hub import push_adapter
from .merging import check_tokens, write_merged
from .mixture import check_weights, select, similarity_weights
from .nn import DTSModule
from .prepack import no_kernels
from .residency import Residency
from .routing import current_route, route
from .settings import BaseSettings, check_settings
from .slots import BASE, CacheInfo, SlotTable
from .wrapping import Wrapping

DEFAULT_ADAPTER = "default"


class DTSModel(nn.Module):
    """A model whose rows may each use another adapter.

    The model's own modules stay in memory once; layers that an adapter changes are wrapped in place.

    Adapters may be loaded, replaced and deleted while other threads run the model: a call sees each of its adapters
    whole, as it was when the call began.

    Args:
        model: a `transformers` model, or any module whose parameters carry the checkpoint's names.
        max_adapters: how many adapters may be in memory at a time.
        max_rank: fixes the memory for adapters, so that loading never allocates and compiled models and CUDA graphs
            stay valid: every adapter may take this rank in every layer.
        max_bytes: fixes the memory likewise, to so many bytes: the first adapter divides them among the layers, in the
            proportions of its own ranks, and in one layer no other may take more than twice its pages. Tensors that
            adapters store whole come on top.
        eviction: ``"lru"`` lets the least recently used adapter go where room is needed; its name stays known, and a
            call that uses it loads it again. None refuses the load.
        host_bytes: of host memory (pinned where the model is on a GPU) in which adapters stay ready after their
            eviction: to come back they are copied, and neither read from their files nor rearranged. Worth it where
            the device has less memory to spare than the host; on a CPU a larger ``max_adapters`` does more. What is
            pinned and not needed any more torch keeps for later, beyond these bytes.
        prepack: keep the weights of the linear layers that adapters change in the order in which the CPU kernels read
            them, see `DTSLinear`; tied ones stay as they are. Nothing of the caller's may hold those parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        max_adapters: int = 8,
        *,
        max_rank: int | None = None,
        max_bytes: int | None = None,
        eviction: str | None = None,
        host_bytes: int = 0,
        prepack: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise DTSError(
                f"DTSModel takes a loaded model, got {model!r}. From a path: DTSModel.from_pretrained(base, adapter)."
            )
        if prepack and no_kernels() is not None:
            raise DTSError(f"prepack: {no_kernels()}. Leave prepack off.")
        of_another = any(isinstance(getattr(h, "__self__", None), Calls) for h in model._forward_pre_hooks.values())
        if isinstance(model, DTSModel) or of_another or any(isinstance(m, DTSModule) for m in model.modules()):
            raise DTSError(
                "the model is in a DTSModel already: its load_adapter() takes further adapters, and its "
                "merge_and_unload('__base__') gives the bare model back."
            )
        if eviction not in (None, "lru"):
            raise DTSError(f"eviction: expected None or 'lru', got {eviction!r}.")
        if host_bytes < 0 or (host_bytes and eviction is None):
            raise DTSError(f"host_bytes: expected 0 or more, and eviction='lru' with it, got {host_bytes}.")
        self.model = model
        self.slots = SlotTable(max_adapters)
        self.adapter_configs: dict[str, Mapping[str, object]] = {}
        self._sources: dict[str, _Source] = {}
        for module in model.modules():  # RWKV divides its weights once it is called, and would not divide adapters
            if getattr(module, "layers_are_rescaled", None) is False:
                module.config.rescale_every = 0
            elif getattr(module, "layers_are_rescaled", None):
                raise DTSError(f"{type(module).__name__} has rescaled its weights; pass it as it was loaded, uncalled.")
        # Before anything is wrapped: the checkpoint's names are those of the bare model.
        self._live = LiveModel(model)
        self._arenas = Arenas(max_adapters, max_rank, max_bytes)
        self._wrapping = Wrapping(self._live, self.slots, self._arenas, prepack)
        self._wrappers = self._wrapping.wrappers
        self._attaching = 0  # loads under way
        self._apart = Apart()
        self._residency = Residency(self.slots, self._wrappers, eviction == "lru", self._has_file, host_bytes)
        self._base_settings: BaseSettings | None = None  # of a base that was loaded with a fine-tune's settings
        self.training = model.training
        self._calls = Calls(self._live, self.slots, self._wrappers, self._lease)

    def __getattr__(self, name: str):
        # What is not an adapter's business (config, device, ...) is the model's.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            if name in _OF_OTHER_ADAPTERS:
                raise AttributeError(f"DTSModel has no {name!r}; it has {_OF_OTHER_ADAPTERS[name]}.") from None
            return getattr(self.model, name)

    def __setattr__(self, name: str, value: object) -> None:
        if self._is_the_models(name):
            setattr(self.model, name, value)  # generation_config, config: what is read there
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_the_models(name):
            delattr(self.model, name)
        else:
            super().__delattr__(name)

    def _is_the_models(self, name: str) -> bool:
        """Whether an attribute is to be found in the model and not here."""
        own = self.__dict__
        if name.startswith("_") or "_calls" not in own:  # the last that a new one gets
            return False
        held = any(name in names for names in (own, own["_modules"], own["_parameters"], own["_buffers"]))
        return not (held or hasattr(type(self), name))

    @classmethod
    def from_pretrained(
        cls,
        base_model: nn.Module | str | Path,
        adapter: str | Path,
        adapter_name: str = DEFAULT_ADAPTER,
        *,
        max_adapters: int = 8,
        max_rank: int | None = None,
        max_bytes: int | None = None,
        eviction: str | None = None,
        host_bytes: int = 0,
        prepack: bool = False,
        verify_base: bool = True,
        **model_kwargs: object,
    ) -> DTSModel:
        """Load a base model with a first adapter, which becomes the active one; in evaluation mode.

        Args:
            base_model: a loaded model, or a directory, ``.safetensors`` file or hub id. From a path, the model class
                is the one the fine-tune had, so that its head is there.
            adapter: adapter directory or hub id. Any hub id may name a revision: ``org/name@revision``.
            max_adapters, max_rank, max_bytes, eviction, host_bytes, prepack: see `DTSModel`.
            verify_base: see `load_adapter`.
            model_kwargs: for the ``from_pretrained`` of transformers (``dtype``, ``device_map``, ...).

        Raises:
            AdapterFormatError, BaseMismatchError: see `load_adapter`.
            CheckpointError: the base cannot be read.
        """
        source = _Source.of(locate_adapter(adapter), verify_base)
        loaded, verify = open_adapter(source.folder)
        own_settings = None
        if not isinstance(base_model, nn.Module):
            base_model, own_settings = load_base(base_model, loaded.config["model_config"], model_kwargs)
        elif model_kwargs:
            raise DTSError(
                f"from_pretrained() got {', '.join(sorted(model_kwargs))}: no option of DTSModel, and of no use for a "
                "model that is loaded."
            )
        model = cls(
            base_model, max_adapters, max_rank=max_rank, max_bytes=max_bytes, eviction=eviction,
            host_bytes=host_bytes, prepack=prepack,
        )  # fmt: skip
        model._base_settings = own_settings
        try:
            model._attach(loaded, adapter_name, source, verify, verify_base=verify_base)
        except BaseException:
            model._calls.remove_hooks()
            raise
        model.set_adapter(adapter_name)
        return model.eval()

    def load_adapter(
        self, adapter: str | Path, adapter_name: str, *, replace: bool = False, verify_base: bool = True
    ) -> None:
        """Load one more adapter; the active one stays. Other threads go on meanwhile.

        Args:
            adapter: adapter directory or hub id.
            adapter_name: what `set_adapter` and ``adapter_names`` will call it.
            replace: whether the name may be an adapter's that is loaded. Calls that run end with the old one, later
                ones have the new one.
            verify_base: compare the base's weights with the adapter's fingerprint; turn it off for a base that was
                changed on purpose.

        Raises:
            AdapterFormatError: the adapter is damaged or of an unknown version.
            BaseMismatchError: it was made for another base, or the base is not in memory (offloaded) or float64.
            CapacityError: there is no room.
            DTSError: the name is taken.

        Whatever is raised, nothing has changed.
        """
        if not (replace and adapter_name in self.slots.names):
            self.slots.check_new(adapter_name)
        source = _Source.of(locate_adapter(adapter), verify_base)
        loaded, verify = open_adapter(source.folder)
        self._attach(loaded, adapter_name, source, verify, verify_base=verify_base, replace=replace)

    @property
    def adapter_names(self) -> list[str]:
        """Names of the adapters that can be used, evicted ones too."""
        return self.slots.names

    @property
    def resident_adapters(self) -> list[str]:
        """Names of the adapters in memory, the least recently used first."""
        return self.slots.resident

    @property
    def active_adapter(self) -> str:
        return self.slots.active

    def set_adapter(self, adapter_name: str) -> None:
        """What every row uses where no ``adapter_names`` are given. Copies nothing.

        Raises:
            UnknownAdapterError: no such adapter; the message lists those there are.
        """
        self.slots.check(adapter_name)
        self.slots.active = adapter_name

    def pin_adapter(self, adapter_name: str) -> None:
        """Keep an adapter in memory whatever is loaded, after loading it again where it was evicted.

        Raises:
            UnknownAdapterError: no such adapter.
            CapacityError: there is no room for it.
        """
        was = adapter_name in self.slots.pinned
        self.slots.pin(adapter_name)
        try:
            self.slots.end_lease(self._lease([adapter_name]).values())
        except BaseException:
            self.slots.pin(adapter_name, was)
            raise

    def unpin_adapter(self, adapter_name: str) -> None:
        """Allow that an adapter is evicted again.

        Raises:
            UnknownAdapterError: no such adapter.
            DTSError: a mixture, which could not be loaded again.
        """
        self.slots.check(adapter_name)
        if adapter_name not in self._sources:
            raise DTSError(f"{adapter_name!r} is a mixture, which no file holds: it stays until it is deleted.")
        self.slots.pin(adapter_name, False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter and free its slot and pages, as soon as the calls that use it have ended. Where it is the
        active one, the base is from then on.

        Raises:
            UnknownAdapterError: no such adapter.
        """
        with self.slots.loading:  # what a load gives this name after is not to be forgotten
            self.slots.check(adapter_name)
            self.adapter_configs.pop(adapter_name, None)
            self._sources.pop(adapter_name, None)  # a mixture has none
            self._residency.host.drop(adapter_name)
            self.slots.release(adapter_name, self._residency.clear)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float] | None = None,
        adapter_name: str = "mixture",
        *,
        characteristic: Tensor | None = None,
    ) -> dict[str, float]:
        """Add the weighted sum of loaded adapters as one more adapter (the paper's variant for unseen tasks). It is
        exact, and takes no memory for matrices: its slot lists the members' pages, and keeps them when the members are
        deleted. It is not evicted.

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
        for name in adapters:
            self.slots.check(name)
        if (weights is None) == (characteristic is None):
            raise DTSError("add_weighted_adapter() takes exactly one of weights and characteristic.")
        if weights is None:
            chosen = similarity_weights(characteristic, self._characteristics(adapters))
        else:
            chosen = dict(zip(adapters, check_weights(adapters, weights), strict=True))
        self.slots.check_new(adapter_name)

        def publish() -> None:
            self._apart.forget(adapter_name)
            self.adapter_configs[adapter_name] = {"members": list(chosen.items()), **self._common_ends(chosen)}

        complete = False
        while not complete:
            self.slots.end_lease(self._lease(adapters).values())  # in memory, as far as others let them
            complete = self._residency.mix(adapter_name, chosen, publish)
        return chosen

    def select(self, characteristic: Tensor) -> tuple[str, float]:
        """The loaded adapter whose task is nearest to a characteristic ``[d]``, with the cosine similarity: a router
        for users without an oracle.

        Raises:
            DTSError: no loaded adapter has a characteristic, or lengths differ.
        """
        with_one = [name for name, config in list(self.adapter_configs.items()) if config.get("characteristic")]
        return select(characteristic, self._characteristics(with_one))

    def _characteristics(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: characteristic_of(self.adapter_configs.get(name, {}), name) for name in names}

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within, every row of this model's calls uses the base alone, also where they name adapters."""
        disabling = route(BASE)
        disabling.disables = self.slots
        with disabling:
            yield

    def forward(self, *args, adapter_names: str | Sequence[str] | None = None, **kwargs):
        """The model's forward; ``adapter_names`` gives one name for all rows, or one for each.

        Where a layer cannot tell the rows of a batch apart, the batch runs once for each of its adapters, with a
        warning that names the layer, and returns no cache that could be used.

        Raises:
            RoutingError: the names do not fit the rows.
            MixedBatchError: such a batch is given a cache, labels, or tensors without rows, or returns what is not
                of rows.
            UnknownAdapterError: a name that is not loaded.
        """
        with self._calls.routed(adapter_names, main_input(args, kwargs)):
            self._calls.refuse_labels(kwargs, self._classes_of)
            return self._apart.forward(self.model, args, kwargs)

    @torch.no_grad()
    def generate(self, *args, adapter_names: str | Sequence[str] | None = None, **kwargs):
        """``generate`` of transformers; ``adapter_names`` as in `forward`, one name for each prompt also with beams
        or several return sequences. Unless ``eos_token_id`` is given, or a ``generation_config`` that has one, each
        row ends at the end tokens of its own fine-tune.

        Raises:
            RoutingError, MixedBatchError, UnknownAdapterError: as `forward`.
        """
        main = main_input((*args, kwargs.get("inputs")), kwargs)
        with self._calls.routed(adapter_names, main, expandable=True):
            if (current := current_route()) is not None and current.lease is not None:
                self._calls.refuse_uneven_images(main, kwargs, current.adapter_names, current.lease)
            names = BASE if current is None else current.adapter_names
            endings = Endings(names, self._ends_of, getattr(self.model, "generation_config", None))
            if not endings.needed:
                return self._apart.generate(self.model.generate, args, kwargs, self.model)
            named = by_name(self.model.generate, args, kwargs)  # some of them are changed

            def run(**kwargs):
                ids = kwargs.get("input_ids", kwargs.get("inputs"))
                return self.model.generate(**endings.put_in(kwargs, current_route().adapter_names, ids))

            return self._apart.generate(run, (), endings.padded(named), self.model)

    def _common_ends(self, members: Iterable[str]) -> dict[str, list[int]]:
        """Of a mixture: at any of its members' end tokens."""
        base = as_ends(getattr(getattr(self.model, "generation_config", None), EOS_KEY, None))
        ends = [self._ends_of(name) or base for name in members]
        union = list(dict.fromkeys(token for own in ends for token in own))
        return {EOS_KEY: union} if union and set(union) != set(base) else {}

    def _classes_of(self, name: str) -> int | None:
        labels = self.adapter_configs.get(name, {}).get("model_config", {}).get("id2label")
        return len(labels) if labels else self._base_settings and self._base_settings.classes

    def _ends_of(self, name: str) -> Ends | None:
        config = self.adapter_configs.get(name, {})
        return as_ends(config.get(EOS_KEY)) or None

    def compile(self, *args: object, **kwargs: object) -> None:
        """Compile the model's forward in place, as `torch.nn.Module.compile` (arguments are `torch.compile`'s). One
        graph serves all adapters: which of them a row uses is an input of it. That loading does not change what it
        reads, construct with ``max_rank`` or ``max_bytes``, and load an adapter that changes as many layers as any
        before the first call. Heads stored whole are compiled for each adapter. Call the model through this class: a
        `route` around the bare model makes its names constants of the graph.
        """
        self.model.compile(*args, **kwargs)

    def merge_and_unload(self, adapter_name: str | None = None) -> nn.Module:
        """Add one adapter to the base's weights (in their dtype) and return the bare model.

        Args:
            adapter_name: the active one if None; ``"__base__"`` unloads without merging.

        Raises:
            UnknownAdapterError: no such adapter.
            DTSError: the adapter changes a quantised weight, which could only hold the sum rounded anew, or adds tokens
                to the table and not to the head. Nothing is merged.
        """
        name = adapter_name or self.slots.active
        leased = self._lease([name])
        try:
            # All are computed before any is written: layers with tied weights share a parameter.
            wrappers = list(self._wrappers.values())
            merged = [wrapper.dense_parameters(leased[name]) for wrapper in wrappers]
            check_tokens(self.model, {id(w): own for w, own in zip(wrappers, merged, strict=True)})
        finally:
            self.slots.end_lease(leased.values())
        layers = [wrapper.bare_layer() for wrapper in self._wrappers.values()]
        for path in list(self._wrappers):
            self._live.put(path, self._wrappers.pop(path).base_layer)
        self.model = self._live.root
        write_merged(self.model, layers, merged)
        settings, ends = getattr(self.model, "generation_config", None), self._ends_of(name)
        if settings is not None and ends is not None:
            settings.eos_token_id = list(ends)
        for name in self.slots.names:
            self.slots.release(name)
        self.adapter_configs.clear()
        self._sources.clear()
        self._residency.host.clear()
        self._calls.remove_hooks()
        return self.model

    def save_pretrained(self, path: str | Path) -> None:
        """Copy the loaded adapters to ``path/<adapter name>``; the base is not written, nor are mixtures (`fuse` writes
        those).

        Raises:
            DTSError: an adapter's files are gone from where they were loaded, a name is none that a directory below
                ``path`` can have, or a target cannot be written.
        """
        sources = list(self._sources.items())
        for name, source in sources:
            if name in (".", "..") or "\0" in name or Path(name).name != name or len(name.encode()) > 200:
                raise DTSError(
                    f"save_pretrained: {name[:80]!r} is the name of no directory below {path} (a path, or too long). "
                    "Nothing was written; load the adapter under another name."
                )
            if not (source.folder / CONFIG_NAME).is_file():
                raise DTSError(
                    f"save_pretrained: the files of {name!r} are gone from {source.folder}, and memory has no copy of "
                    "them. Nothing was written."
                )
        for name, source in sources:
            with staged_directory(Path(path) / name, overwrite=True, marker=MARKER) as staging:
                for file in source.folder.iterdir():
                    if file.name in (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME):
                        shutil.copyfile(file, staging / file.name)

    def cache_info(self) -> CacheInfo:
        """How often adapters were found in memory, loaded and evicted: what to watch while serving."""
        return self.slots.info

    def memory_report(self) -> dict[str, object]:
        """Bytes in memory: ``base`` (the model's own parameters, each once), ``adapters`` by name (what each uses of
        pages and rows; mixtures use their members' pages, evicted ones nothing), and ``reserved``: the arenas and
        tables, with what is free in them, and tensors that are stored whole; and ``host`` (see ``host_bytes``)."""
        with self.slots.loading:
            return self._residency.memory_of(self.model)

    def push_to_hub(self, repo_id: str, adapter_name: str | None = None, **kwargs: object) -> str:
        """Upload an adapter's files (the base stays where it is) to a repository of its own.

        Args:
            repo_id: ``user/name``.
            adapter_name: the active one if None.
            kwargs: see `hub.push_adapter`.

        Returns:
            The address of the commit.

        Raises:
            UnknownAdapterError: no such adapter.
            DTSError: the base, a mixture (`fuse` writes those as files), or what the hub refuses.
        """
        name = adapter_name or self.slots.active
        self.slots.check(name)
        if name not in self._sources:
            kind = "the base" if name == BASE else "a mixture in memory; write it with dts-fast fuse"
            raise DTSError(f"push_to_hub: {name!r} has no files of its own: it is {kind}.")
        return push_adapter(self._sources[name].folder, repo_id, **kwargs)

    def _lease(self, names: Iterable[str]) -> dict[str, int]:
        return self._residency.lease(names, self._load_again)

    def _has_file(self, name: str) -> bool:
        return name in self._sources

    def _load_again(self, name: str, keep: Iterable[str]) -> None:
        """Load an adapter that was evicted."""
        source = self._sources.get(name)
        if source is None:
            if name in self.slots.names and name not in self.slots.resident:
                raise DTSError(f"adapter {name!r} was evicted, and no file is known to load it from. Delete it.")
            return  # deleted meanwhile

        def wanted() -> bool:  # and not deleted, replaced, or loaded by another thread
            return self._sources.get(name) is source and name not in self.slots.resident

        if wanted() and not self._residency.load_ready(name, keep, wanted):
            now = _Source.of(source.folder, source.verify_base)
            try:
                adapter, verify = open_adapter(source.folder, verify_checksum=now != source)
                checks = source.verify_base and now != source  # it may be another adapter by now
                self._attach(adapter, name, now, verify, verify_base=checks, replace=True, keep=keep, wanted=wanted)
            except (AdapterFormatError, BaseMismatchError) as error:
                raise type(error)(f"adapter {name!r} was evicted, and cannot be loaded again: {error}") from error

    def _attach(
        self,
        adapter: Adapter,
        name: str,
        source: _Source,
        verify: Callable[[], None],
        *,
        verify_base: bool,
        replace: bool = False,
        keep: Iterable[str] = (),
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Load an adapter that `open_adapter` has read, and that ``verify`` verifies before anything can use it."""
        try:
            owned = self._check_attachable(adapter, verify_base)
        except DTSError:
            verify()  # what is damaged is to be called that, whatever it looks like
            raise
        verify()  # before anything goes for it, and before others have to wait

        def publish() -> None:
            if self._sources.get(name) != source:
                self._apart.forget(name)
            self._sources[name], self.adapter_configs[name] = source, adapter.config

        with self.slots.loading:
            self._attaching += 1
        new: dict[str, DTSModule] = {}
        try:
            with self.slots.loading:
                new = self._wrapping.wrap(owned)
                self.model = self._live.root
            parts = [(self._wrappers[path], p) for path, p in owned.items()]
            self._residency.load(name, parts, publish, replace=replace, keep=keep, wanted=wanted)
        except BaseException:
            with self.slots.loading:
                if self._attaching == 1:  # or another thread may be about to load into them
                    self._wrapping.unwrap(new)
                self.model = self._live.root
            raise
        finally:
            with self.slots.loading:
                self._attaching -= 1

    def _check_attachable(self, adapter: Adapter, verify_base: bool) -> Owned:
        """What an adapter has for each layer.

        Raises:
            BaseMismatchError: it is of another base, or changes what rows of one call must share.
        """
        owned, live = self._live.owners(adapter)
        check_settings(self._live.root, self._base_settings, adapter.config["model_config"])
        for path, parameters in owned.items():
            own = self._wrappers.get(path) or DTSModule(self._live.modules[path], slots=self.slots)
            own.check_parameters(parameters, path)
        if verify_base:
            self._live.check_base(adapter, live)
        return owned


# Methods of PEFT's models, and those with which models of transformers take PEFT's adapters themselves.
_OF_OTHER_ADAPTERS = {
    "active_adapters": "active_adapter",
    "add_adapter": "load_adapter()",
    "disable_adapters": "disable_adapter()",
    "enable_adapters": "disable_adapter(), which ends with its block",
    "get_base_model": "model, and merge_and_unload('__base__')",
    "peft_config": "adapter_configs",
    "unload": "merge_and_unload('__base__')",
}


@dataclass(frozen=True)
class _Source:
    """The files of an adapter, and what tells whether they are still those that were checked."""

    folder: Path
    stamp: tuple[int, int]
    verify_base: bool = field(compare=False)

    @classmethod
    def of(cls, folder: Path, verify_base: bool) -> _Source:
        file = folder / WEIGHTS_NAME
        status = file.stat() if file.is_file() else None
        return cls(folder.resolve(), (status.st_mtime_ns, status.st_size) if status else (0, 0), verify_base)

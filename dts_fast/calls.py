"""The calls of a model: which adapters their rows use, what of these stays in memory until a call ends, and what a call
tells of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from .attach import LiveModel
from .batch import BatchRoute, LeasedRoute, has_uneven_images, leave_batch, main_input, tokens_a_row
from .errors import DTSError, NeverMixedError, RoutingError
from .nn import DTSModule
from .routing import Lease, check_names, current_route
from .slots import BASE, BASE_SLOT, SlotTable

_MOST_BASE_ROUTES = 64  # batch sizes
# Models whose layers get [time, batch, features].
_TIME_FIRST = ("xlnet", "fsmt")


class Calls:
    """The routes of a model's calls.

    Args:
        live: the model.
        slots: what its wrappers share.
        wrappers: by path; more may come.
        lease: gives the slots of names, which stay theirs until `SlotTable.end_lease`; it loads what was evicted.
    """

    def __init__(
        self,
        live: LiveModel,
        slots: SlotTable,
        wrappers: Mapping[str, DTSModule],
        lease: Callable[[Iterable[str]], dict[str, int]],
    ) -> None:
        self.live, self.slots, self.wrappers, self.lease = live, slots, wrappers, lease
        self._base_routes: dict[tuple[bool, int | None, torch.device], LeasedRoute] = {}
        model = live.root
        self._time_first = getattr(getattr(model, "config", None), "model_type", None) in _TIME_FIRST
        # generate() calls an encoder by itself.
        encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
        self._hooks = []
        for module in {id(m): m for m in (model, encoder) if isinstance(m, nn.Module)}.values():
            self._hooks.append(module.register_forward_pre_hook(self.enter_batch, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(leave_batch, always_call=True))

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def routed(
        self, adapter_names: str | Sequence[str] | None, main: Tensor | None, *, expandable: bool = False
    ) -> AbstractContextManager[object]:
        """A route whose adapters stay what they are until it ends; without names, that of an outer one or of the
        active adapter. It is to be entered at once.

        Args:
            main: the call's main input, which has the batch's rows.
            expandable: see `route`.
        """
        while isinstance(outer := current_route(), BatchRoute) and outer.lease.table is self.slots:
            outer.__exit__()  # of a call of the bare model that was interrupted: its hooks did not run
        if outer is not None and outer.disables is self.slots:
            return self._base_route(expandable, main)
        if adapter_names is None and outer is not None:
            if outer.lease is not None and outer.lease.table is self.slots:
                return nullcontext()
            adapter_names, expandable = outer.adapter_names, expandable or outer.expandable
        names = self.slots.active if adapter_names is None else check_names(adapter_names)
        if names == BASE:
            return self._base_route(expandable, main)
        if expandable and main is not None and not isinstance(names, str) and len(names) != main.shape[0]:
            raise RoutingError(
                f"{len(names)} adapter names for {main.shape[0]} prompts; expected one name for each prompt, or a "
                "single name for all. (Beams and return sequences get the name of their prompt.)"
            )
        slots = self.lease([names] if isinstance(names, str) else names)
        try:
            lease = Lease(self.slots, slots, self.live.device)
            return LeasedRoute(names, expandable=expandable, lease=lease, rows=None if main is None else main.shape[0])
        except BaseException:
            self.slots.end_lease(slots.values())
            raise

    def _base_route(self, expandable: bool, main: Tensor | None) -> LeasedRoute:
        """A route that has nothing of this call's, and leases nothing: made once."""
        key = expandable, None if main is None else main.shape[0], self.live.device

        def make() -> LeasedRoute:
            lease = Lease(self.slots, {BASE: BASE_SLOT}, key[2])
            return LeasedRoute(BASE, expandable=expandable, lease=lease, rows=key[1])

        # A graph that is traced or captured gets ids of its own: see `slot_ids`.
        if torch.compiler.is_compiling() or (key[2].type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return make()
        found = self._base_routes.get(key)
        if found is None:
            found = make()
            if len(self._base_routes) >= _MOST_BASE_ROUTES:
                self._base_routes.clear()
            if type(found.ids) is Tensor:  # and not a fake one
                self._base_routes[key] = found
        return found

    def enter_batch(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """What runs before the model's own forward (and its encoder's), however it was called: it tells the true number
        of rows, which inner inputs would not. generate() multiplies the batch for beams, position ids are shared by all
        rows, and some models flatten tokens."""
        if torch.compiler.is_compiling():
            return
        current = current_route()
        if isinstance(current, BatchRoute) and current.owner is module:
            current.__exit__()  # of a call that was interrupted: its hooks did not run
            current = current_route()
        names = self.slots.active if current is None else current.adapter_names
        lease = None if current is None else current.lease
        own = lease is not None and lease.table is self.slots
        if isinstance(current, BatchRoute) or (own and isinstance(names, str)):
            return
        tokens: set[int] = set()
        if not isinstance(names, str):
            main = main_input(args, kwargs)
            if main is None:
                return
            names = current.names_for(main.shape[0], in_model=True)
            tokens = tokens_a_row(args, kwargs, main.shape[0])
            if self._time_first and len(set(names)) > 1:
                kind = type(self.live.root).__name__
                raise NeverMixedError(f"{kind} puts time first inside, so that rows get mixed up.")
        if not own:
            slots = self.lease([names] if isinstance(names, str) else names)
            lease = Lease(self.slots, slots, self.live.device)
        entered = BatchRoute(names, module, lease, tokens, ends=not own)
        try:
            if not isinstance(names, str):
                self.refuse_uneven_images(main, kwargs, names, lease)
        except BaseException:
            entered.left()
            raise
        entered.__enter__()

    def refuse_labels(self, kwargs: Mapping[str, object], classes_of: Callable[[str], int | None]) -> None:
        """Causal models compute their loss with the base's number of tokens, and classifiers with that of the model's
        classes.

        Args:
            classes_of: an adapter's, where it is known.

        Raises:
            DTSError: labels, in a call whose adapters have others.
        """
        current, config = current_route(), getattr(self.live.root, "config", None)
        if kwargs.get("labels") is None or getattr(config, "is_encoder_decoder", False):
            return
        names = self.slots.active if current is None else current.adapter_names
        numbers = {classes_of(name) for name in ([names] if isinstance(names, str) else names)} - {None}
        if "Classification" in type(self.live.root).__name__ and numbers - {getattr(config, "num_labels", None)}:
            raise DTSError(
                f"labels: adapters of this call have {', '.join(map(str, sorted(numbers)))} classes, the model would "
                f"compute the loss with {config.num_labels}. Compute it from the logits."
            )
        if current is None or current.lease is None or getattr(self.live.root, "get_output_embeddings", None) is None:
            return
        slots = set(current.lease.slots.values())
        head = self.live.root.get_output_embeddings()
        if any(slot in getattr(head, "added", ()) for slot in slots):
            raise DTSError(
                "labels: adapters of this call have more tokens than the base, with which the model would compute the "
                "loss. Compute it from the logits, as wide as they are."
            )

    def refuse_uneven_images(
        self, main: Tensor | None, kwargs: Mapping[str, object], names: str | Sequence[str], lease: Lease
    ) -> None:
        """Images, videos and sounds come without rows: which of them is whose a layer knows only where each row has as
        many.

        Raises:
            RoutingError: adapters of a mixed batch change layers that see them, of which rows have different numbers.
        """
        if isinstance(names, str) or len(set(names)) == 1 or not isinstance(main, Tensor) or main.is_floating_point():
            return
        root = self.live.root
        if not has_uneven_images(getattr(root, "config", None), main, kwargs):
            return
        parts = [getattr(root, name, None) for name in ("get_decoder", "get_output_embeddings")]
        of_text = {
            id(getattr(module, "base_layer", module)) for part in parts if part and (module := part()) is not None
        }
        inside = tuple(path for path, m in self.live.modules.items() if path and id(m) in of_text)
        slots = {lease.slots[name] for name in names}
        for path, wrapper in list(self.wrappers.items()):
            if any(path == of_it or path.startswith(of_it + ".") for of_it in inside):
                continue
            if any(wrapper.changes(slot, name) for slot in slots for name in wrapper.base_names()):
                raise RoutingError(
                    f"rows of this batch have different numbers of images, and its adapters change {path}, which gets "
                    "images without their rows. Run these adapters in separate batches, or compress without that part "
                    "(--exclude)."
                )

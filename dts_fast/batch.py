"""What a call of a model tells of its rows: the route that layers within it ask."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from .routing import Lease, current_route, route


class CallRoute(route):
    """A route that one call makes and leaves again."""

    of_call = True


class LeasedRoute(CallRoute):
    """A route whose lease ends with it."""

    def left(self) -> None:
        self.lease.table.end_lease(self.lease.slots.values())


class BatchRoute(LeasedRoute):
    """The route of one call of a model, one name for each of its rows; the route it came from lies below it."""

    of_model = True

    def __init__(
        self, names: str | Sequence[str], owner: nn.Module, lease: Lease, tokens: Collection[int], ends: bool
    ) -> None:
        super().__init__(names, flattened=tokens, lease=lease)
        self.owner, self.ends = owner, ends

    def left(self) -> None:
        if self.ends:
            super().left()


def leave_batch(module: nn.Module, args: tuple, output: object) -> None:
    current = current_route()
    if isinstance(current, BatchRoute) and current.owner is module:
        current.__exit__()


def tokens_a_row(args: tuple, kwargs: Mapping[str, object], rows: int) -> set[int]:
    """Lengths of the inputs that have the batch's rows: models may flatten rows and tokens to so many."""
    given = (*args, *(kwargs.get(name) for name in _MAIN_INPUTS))
    return {t.shape[1] for t in given if isinstance(t, Tensor) and t.dim() in (2, 3) and t.shape[0] == rows}


def main_input(args: tuple, kwargs: Mapping[str, object]) -> Tensor | None:
    """What a model is called with that has the batch's rows; None where that is not known."""
    for value in args:
        if isinstance(value, Tensor):
            return value
    for name in _MAIN_INPUTS:
        value = kwargs.get(name)
        if isinstance(value, Tensor):
            return value
    return None


_MAIN_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "pixel_values",
    "pixel_values_videos",
    "input_features",
    "input_values",
    "decoder_input_ids",  # last: generate() may get one prompt for all rows
)


def has_uneven_images(config: object, ids: Tensor, kwargs: Mapping[str, object]) -> bool:
    """Whether rows of a batch have different numbers of images, videos or sounds, by the placeholders in their tokens.

    Args:
        config: the model's.
        ids: ``[B, T]``.
        kwargs: the call's.
    """
    if not any(value is not None and name.startswith(_SEEN_OR_HEARD) for name, value in kwargs.items()):
        return False
    tokens = {getattr(config, f"{kind}_token_{end}", None) for kind in _KINDS for end in ("id", "index")}
    # Of each kind: two images in one row are not a video in another.
    return any(isinstance(token, int) and len((ids == token).sum(1).unique()) > 1 for token in tokens)


# Arguments that come without rows, and what of them a prompt has placeholders for.
_SEEN_OR_HEARD = ("pixel_values", "image_embeds", "input_features", "input_values")
_KINDS = ("image", "video", "audio")

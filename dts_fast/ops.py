"""The ops ``torch.ops.dts_fast``: schemas, checks, fake kernels, gradients and the plain-torch registration.

The schemas are defined here, so that the ops exist without a compiler; a native kernel registers itself for its
device against them (``TORCH_LIBRARY_IMPL`` in csrc/) and then takes precedence over the plain-torch one.

Shape symbols: M rows, N out, K in, P pages, S slots, L pages a slot may list.
"""

from __future__ import annotations

import torch
from torch import Tensor, is_inference_mode_enabled
from torch.autograd.graph import increment_version

from . import gpu, native, reference  # noqa: F401  (native registers its kernels against the schemas below)
from .codes import PageLayout
from .packing import packed_shape, unpack_weight

_LIBRARY = torch.library.Library("dts_fast", "DEF")
_BANK = "Tensor pages, Tensor slot_pages, Tensor slot_weights, Tensor slot_ids"
_LIBRARY.define(f"linear(Tensor x, Tensor weight, Tensor? bias, {_BANK}) -> Tensor")
_LIBRARY.define(f"packed_linear(Tensor x, Tensor weight, Tensor? bias, int out_features, {_BANK}) -> Tensor")
_LIBRARY.define(f"add_delta_(Tensor(a!) y, Tensor x, {_BANK}, *, bool transpose=False) -> ()")
_LIBRARY.define(f"embedding_delta(Tensor ids, SymInt n, SymInt k, {_BANK}) -> Tensor")
# What csrc/cuda leaves of `linear` and `add_delta_`, with checked arguments (gpu.py).
_LIBRARY.define(f"linear_otherwise(Tensor x, Tensor weight, Tensor? bias, {_BANK}) -> Tensor")
_LIBRARY.define(f"add_delta_otherwise_(Tensor(a!) y, Tensor x, {_BANK}, *, bool transpose=False) -> ()")
# Its kernel alone, for benches: y = x W^T + bias + delta, or y += delta without a weight.
_LIBRARY.define(f"decode_(Tensor(a!) y, Tensor x, Tensor? weight, Tensor? bias, {_BANK}, int[] shape=[]) -> ()")

_linear = torch.ops.dts_fast.linear.default
_packed_linear = torch.ops.dts_fast.packed_linear.default
_add_delta_ = torch.ops.dts_fast.add_delta_.default

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pages: Tensor,
    slot_pages: Tensor,
    slot_weights: Tensor,
    slot_ids: Tensor,
) -> Tensor:
    """Base and delta of a linear layer in one op: ``y = x W^T + bias + ((x V) * s) U^T`` row by row (paper, eq. of
    section 3 read from right to left; the personalised weight is never built).

    Args:
        x: ``[M, K]`` float32, float16 or bfloat16, strided or not.
        weight: ``[N, K]`` in the dtype of ``x``.
        bias: ``[N]`` in the dtype of ``x``, or None.
        pages: uint8 ``[P, PageLayout(N, K).nbytes]``, the bank's rank pages.
        slot_pages: int32 ``[S, L]``, the pages of each slot; -1 ends a list.
        slot_weights: float32 ``[S, L]``, what the delta of each listed page is multiplied with.
        slot_ids: int32 ``[M]``, the slot of each row; -1 is the base alone.

    Returns:
        ``[M, N]`` in the dtype of ``x``; sums over K and over ranks are taken in float32. Gradients flow to ``x``,
        ``weight`` and ``bias``; codes have none.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a slot or a page out of range (checked on the CPU only,
            where it costs no synchronisation).
    """
    # The Python part of autograd takes longer than a small layer; inference mode leaves it out by itself.
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or is_inference_mode_enabled():
        return _linear(x, weight, bias, pages, slot_pages, slot_weights, slot_ids)
    with torch._C._AutoDispatchBelowAutograd():
        return _linear(x, weight, bias, pages, slot_pages, slot_weights, slot_ids)


def packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_features: int,
    pages: Tensor,
    slot_pages: Tensor,
    slot_weights: Tensor,
    slot_ids: Tensor,
) -> Tensor:
    """`linear` on a weight ``[out_features, K]`` in the packed form of `packing.pack_weight`.

    Gradients flow to ``x`` and ``bias``.

    Raises:
        ValueError: see `linear`.
    """
    bank = pages, slot_pages, slot_weights, slot_ids
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or is_inference_mode_enabled():  # see `linear`
        return _packed_linear(x, weight, bias, out_features, *bank)
    with torch._C._AutoDispatchBelowAutograd():
        return _packed_linear(x, weight, bias, out_features, *bank)


def add_delta_(
    y: Tensor,
    x: Tensor,
    pages: Tensor,
    slot_pages: Tensor,
    slot_weights: Tensor,
    slot_ids: Tensor,
    *,
    transpose: bool = False,
) -> None:
    """Add the delta alone, in place: ``y += ((x V) * s) U^T``, for a base layer of any other kind.

    Args:
        y: ``[M, N]`` in the dtype of ``x``.
        x: ``[M, K]``, see `linear`, as for the other arguments.
        transpose: multiply by the transposed delta instead, ``y [M, K] += ((x U) * s) V^T`` with ``x [M, N]``; the
            pages stay those of a layer ``[N, K]``.

    Raises:
        ValueError: see `linear`.
    """
    bank = pages, slot_pages, slot_weights, slot_ids
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or is_inference_mode_enabled():  # see `linear`
        _add_delta_(y, x, *bank, transpose=transpose)
        return
    with torch._C._AutoDispatchBelowAutograd():
        _add_delta_(y, x, *bank, transpose=transpose)
    increment_version(y)  # what was saved for backward before is not to be used any more


def embedding_delta(
    ids: Tensor,
    layout: PageLayout,
    pages: Tensor,
    slot_pages: Tensor,
    slot_weights: Tensor,
    slot_ids: Tensor,
) -> Tensor:
    """Rows ``ids`` of the delta of an embedding table ``[N, K]``, each in its own slot: ``(U[ids] * s) V^T``.

    Args:
        ids: int64 or int32 ``[M]`` in ``0..N-1``.
        layout: ``PageLayout(N, K)``.
        slot_ids: int32 ``[M]``; see `linear`, as for the other arguments.

    Returns:
        float32 ``[M, K]``; zero where the slot is -1.

    Raises:
        ValueError: see `linear`; an id out of range (checked on the CPU only).
    """
    return torch.ops.dts_fast.embedding_delta(ids, layout.n, layout.k, pages, slot_pages, slot_weights, slot_ids)


def _check_linear(x, weight, bias, pages, slot_pages, slot_weights, slot_ids) -> None:
    _expect(weight.dim() == 2, "weight", "[N, K]", weight)
    _expect(weight.dtype == x.dtype, "weight", f"dtype of x, {x.dtype} (or convert x)", weight)
    _expect(weight.device == x.device, "weight", f"device {x.device} like x", weight)
    n, k = weight.shape
    _expect(x.dim() == 2 and x.shape[1] == k, "x", f"[M, {k}] for weight {list(weight.shape)}", x)
    if bias is not None:
        _check_bias(bias, n, x)
    _check_bank(x, n, k, pages, slot_pages, slot_weights, slot_ids)


def _check_bias(bias, n, x) -> None:
    _expect(bias.shape == (n,) and bias.dtype == x.dtype, "bias", f"[{n}] {x.dtype}", bias)
    _expect(bias.device == x.device, "bias", f"device {x.device} like x", bias)


def _check_packed_linear(x, weight, bias, out_features, pages, slot_pages, slot_weights, slot_ids) -> None:
    _expect(x.dim() == 2, "x", "[M, K]", x)
    n, k = out_features, x.shape[1]
    shape = packed_shape(n, k, x.dtype)
    _expect(
        weight.shape == shape and weight.dtype == x.dtype and weight.is_contiguous(),
        "weight",
        f"contiguous {x.dtype} {list(shape)}, packed from {[n, k]}",
        weight,
    )
    if bias is not None:
        _check_bias(bias, n, x)
    _check_bank(x, n, k, pages, slot_pages, slot_weights, slot_ids)


def _check_add_delta(y, x, pages, slot_pages, slot_weights, slot_ids, transpose) -> None:
    _expect(x.dim() == 2, "x", "[M, K]", x)
    _expect(y.dim() == 2 and y.shape[0] == x.shape[0], "y", f"[{x.shape[0]}, N] for x {list(x.shape)}", y)
    _expect(y.dtype == x.dtype, "y", f"dtype of x, {x.dtype} (or convert x)", y)
    _expect(y.device == x.device, "y", f"device {x.device} like x", y)
    n, k = (x.shape[1], y.shape[1]) if transpose else (y.shape[1], x.shape[1])
    _check_bank(x, n, k, pages, slot_pages, slot_weights, slot_ids)


def _check_embedding(ids, n, k, pages, slot_pages, slot_weights, slot_ids) -> None:
    _expect(ids.dim() == 1 and ids.dtype in (torch.int64, torch.int32), "ids", "int64 or int32 [M]", ids)
    _check_bank_of(ids, n, k, pages, slot_pages, slot_weights, slot_ids)


def _check_bank(x, n, k, pages, slot_pages, slot_weights, slot_ids) -> None:
    _expect(x.dtype in DTYPES, "x", "float32, float16 or bfloat16", x)
    _check_bank_of(x, n, k, pages, slot_pages, slot_weights, slot_ids)


def _check_bank_of(x, n, k, pages, slot_pages, slot_weights, slot_ids) -> None:
    nbytes = PageLayout(n, k).nbytes
    _expect(
        pages.dtype == torch.uint8 and pages.dim() == 2 and pages.shape[1] == nbytes and pages.is_contiguous(),
        "pages",
        f"contiguous uint8 [P, {nbytes}], the rank pages of a layer [{n}, {k}]",
        pages,
    )
    _expect(
        slot_pages.dtype == torch.int32 and slot_pages.dim() == 2 and slot_pages.is_contiguous(),
        "slot_pages",
        "contiguous int32 [S, L]",
        slot_pages,
    )
    _expect(
        slot_weights.dtype == torch.float32 and slot_weights.shape == slot_pages.shape and slot_weights.is_contiguous(),
        "slot_weights",
        f"contiguous float32 {list(slot_pages.shape)} like slot_pages",
        slot_weights,
    )
    _expect(
        slot_ids.dtype == torch.int32 and slot_ids.shape == (x.shape[0],) and slot_ids.is_contiguous(),
        "slot_ids",
        f"contiguous int32 [{x.shape[0]}], one slot for each row of x",
        slot_ids,
    )
    bank = {"pages": pages, "slot_pages": slot_pages, "slot_weights": slot_weights, "slot_ids": slot_ids}
    for name, tensor in bank.items():
        _expect(tensor.device == x.device, name, f"device {x.device} like x", tensor)


def _check_slot_range(slot_ids: Tensor, slots: int) -> None:
    if slot_ids.device.type == "cpu" and slot_ids.numel():
        low, high = (int(v) for v in slot_ids.aminmax())
        if low < -1 or high >= slots:
            raise ValueError(f"dts_fast: slot_ids: expected -1..{slots - 1} for {slots} slots, got {low}..{high}.")


def _check_pages(slot_pages: Tensor, pages: int) -> None:
    if slot_pages.device.type == "cpu" and slot_pages.numel() and int(slot_pages.max()) >= pages:
        raise ValueError(f"dts_fast: slot_pages: expected pages below {pages}, got {int(slot_pages.max())}.")


def _expect(holds: bool, name: str, expected: str, got: Tensor) -> None:
    if not holds:
        raise ValueError(
            f"dts_fast: {name}: expected {expected}, got {got.dtype} {list(got.shape)}"
            f"{'' if got.is_contiguous() else ' (not contiguous)'} on {got.device}."
        )


def _linear_gpu(*arguments):
    _check_linear(*arguments)
    return gpu.linear(*arguments)


def _add_delta_gpu(*arguments, transpose=False):
    _check_add_delta(*arguments, transpose)
    gpu.add_delta_(*arguments, transpose=transpose)


def _linear_plain(x, weight, bias, pages, slot_pages, slot_weights, slot_ids):
    _check_linear(x, weight, bias, pages, slot_pages, slot_weights, slot_ids)
    _check_slot_range(slot_ids, slot_pages.shape[0])
    _check_pages(slot_pages, pages.shape[0])
    return reference.linear(x, weight, bias, pages, slot_pages, slot_weights, slot_ids)


def _packed_linear_plain(x, weight, bias, out_features, pages, slot_pages, slot_weights, slot_ids):
    _check_packed_linear(x, weight, bias, out_features, pages, slot_pages, slot_weights, slot_ids)
    plain = unpack_weight(weight, out_features, x.shape[1])
    return _linear_plain(x, plain, bias, pages, slot_pages, slot_weights, slot_ids)


def _add_delta_plain(y, x, pages, slot_pages, slot_weights, slot_ids, *, transpose=False):
    _check_add_delta(y, x, pages, slot_pages, slot_weights, slot_ids, transpose)
    _check_slot_range(slot_ids, slot_pages.shape[0])
    _check_pages(slot_pages, pages.shape[0])
    reference.add_delta_(y, x, pages, slot_pages, slot_weights, slot_ids, transpose=transpose)


def _embedding_delta_plain(ids, n, k, pages, slot_pages, slot_weights, slot_ids):
    _check_embedding(ids, n, k, pages, slot_pages, slot_weights, slot_ids)
    _check_slot_range(slot_ids, slot_pages.shape[0])
    _check_pages(slot_pages, pages.shape[0])
    if ids.device.type == "cpu" and ids.numel():
        low, high = (int(v) for v in ids.aminmax())
        if low < 0 or high >= n:
            raise ValueError(f"dts_fast: ids: expected 0..{n - 1}, got {low}..{high}.")
    return reference.embedding_delta(ids, PageLayout(n, k), pages, slot_pages, slot_weights, slot_ids)


def _embedding_delta_gpu(ids, n, k, pages, slot_pages, slot_weights, slot_ids):
    _check_embedding(ids, n, k, pages, slot_pages, slot_weights, slot_ids)
    return gpu.embedding_delta(ids, PageLayout(n, k), pages, slot_pages, slot_weights, slot_ids)


# Below autograd on every device; a kernel registered for one device wins over it.
_LIBRARY.impl("linear", _linear_plain, "CompositeExplicitAutograd")
_LIBRARY.impl("packed_linear", _packed_linear_plain, "CompositeExplicitAutograd")
_LIBRARY.impl("add_delta_", _add_delta_plain, "CompositeExplicitAutograd")
_LIBRARY.impl("embedding_delta", _embedding_delta_plain, "CompositeExplicitAutograd")
_LIBRARY.impl("embedding_delta", _embedding_delta_gpu, "CUDA")
_LIBRARY.impl("linear_otherwise", gpu.linear, "CUDA")
_LIBRARY.impl("add_delta_otherwise_", gpu.add_delta_, "CUDA")
if not torch._C._dispatch_has_kernel_for_dispatch_key("dts_fast::linear", "CUDA"):  # csrc/cuda is not built
    _LIBRARY.impl("linear", _linear_gpu, "CUDA")
    _LIBRARY.impl("add_delta_", _add_delta_gpu, "CUDA")


@torch.library.register_fake("dts_fast::linear", lib=_LIBRARY)
def _linear_fake(x, weight, bias, pages, slot_pages, slot_weights, slot_ids):
    _check_linear(x, weight, bias, pages, slot_pages, slot_weights, slot_ids)
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("dts_fast::packed_linear", lib=_LIBRARY)
def _packed_linear_fake(x, weight, bias, out_features, pages, slot_pages, slot_weights, slot_ids):
    _check_packed_linear(x, weight, bias, out_features, pages, slot_pages, slot_weights, slot_ids)
    return x.new_empty(x.shape[0], out_features)


@torch.library.register_fake("dts_fast::add_delta_", lib=_LIBRARY)
def _add_delta_fake(y, x, pages, slot_pages, slot_weights, slot_ids, *, transpose=False):
    _check_add_delta(y, x, pages, slot_pages, slot_weights, slot_ids, transpose)


@torch.library.register_fake("dts_fast::embedding_delta", lib=_LIBRARY)
def _embedding_delta_fake(ids, n, k, pages, slot_pages, slot_weights, slot_ids):
    _check_embedding(ids, n, k, pages, slot_pages, slot_weights, slot_ids)
    return ids.new_empty(ids.shape[0], k, dtype=torch.float32)


def _linear_setup_context(ctx, inputs, output):
    x, weight, bias, *bank = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, *bank)
    ctx.has_bias = bias is not None


def _linear_backward(ctx, grad):
    x, weight, *bank = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ weight
        torch.ops.dts_fast.add_delta_(grad_x, grad, *bank, transpose=True)
    if ctx.needs_input_grad[1]:
        grad_weight = grad.t() @ x
    if ctx.has_bias and ctx.needs_input_grad[2]:
        grad_bias = grad.sum(0)
    return grad_x, grad_weight, grad_bias, None, None, None, None


torch.library.register_autograd("dts_fast::linear", _linear_backward, setup_context=_linear_setup_context, lib=_LIBRARY)


def _packed_linear_setup_context(ctx, inputs, output):
    x, weight, bias, ctx.out_features, *bank = inputs
    ctx.in_features, ctx.has_bias = x.shape[1], bias is not None
    ctx.save_for_backward(weight, *bank)


def _packed_linear_backward(ctx, grad):
    weight, *bank = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ unpack_weight(weight, ctx.out_features, ctx.in_features)
        torch.ops.dts_fast.add_delta_(grad_x, grad, *bank, transpose=True)
    grad_bias = grad.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
    return grad_x, None, grad_bias, *([None] * 5)


torch.library.register_autograd(
    "dts_fast::packed_linear", _packed_linear_backward, setup_context=_packed_linear_setup_context, lib=_LIBRARY
)


class _AddDelta(torch.autograd.Function):
    """Gradient of the in-place op, which `torch.library.register_autograd` does not serve: dy passes through to y,
    and the transposed delta of it goes to x."""

    @staticmethod
    def forward(ctx, y, x, pages, slot_pages, slot_weights, slot_ids, transpose):
        ctx.mark_dirty(y)
        ctx.save_for_backward(pages, slot_pages, slot_weights, slot_ids)
        ctx.transpose, ctx.x_shape = transpose, x.shape
        with torch._C._AutoDispatchBelowAutograd():
            torch.ops.dts_fast.add_delta_(y, x, pages, slot_pages, slot_weights, slot_ids, transpose=transpose)
        return y

    @staticmethod
    def backward(ctx, grad):
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = grad.new_zeros(ctx.x_shape)
            torch.ops.dts_fast.add_delta_(grad_x, grad, *ctx.saved_tensors, transpose=not ctx.transpose)
        return grad, grad_x, None, None, None, None, None


def _add_delta_autograd(y, x, pages, slot_pages, slot_weights, slot_ids, *, transpose=False):
    _AddDelta.apply(y, x, pages, slot_pages, slot_weights, slot_ids, transpose)


_LIBRARY.impl("add_delta_", _add_delta_autograd, "Autograd")

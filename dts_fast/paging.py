"""Deltas as a bank and its tables hold them: ops with native kernels on CPUs, as that is most of a load."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native  # noqa: F401  (registers its kernel)
from .codes import (
    CodedMatrix,
    CodedVector,
    Delta,
    DeltaSum,
    LowRankDelta,
    PageLayout,
    dequantize,
    num_pages,
    terms_of,
    to_pages,
)

_LIBRARY = torch.library.Library("dts_fast", "FRAGMENT")
_LIBRARY.define(
    "write_pages_(Tensor(a!) pages, Tensor u_codes, Tensor u_levels, Tensor s, Tensor v_codes, Tensor v_levels, int n, "
    "int k) -> ()"
)
_LIBRARY.define("write_vector_(Tensor(a!) out, Tensor base, Tensor codes, Tensor levels) -> ()")


def pages_of(delta: LowRankDelta | DeltaSum, out: Tensor | None = None) -> Tensor:
    """`codes.to_pages`, faster: uint8 ``[P, PageLayout(N, K).nbytes]``, new or written to ``out``."""
    terms = terms_of(delta)
    counts = [num_pages(term.rank) for term in terms]
    if out is None:
        nbytes = PageLayout(terms[0].u.n, terms[0].v.n).nbytes
        out = terms[0].s.new_empty(sum(counts), nbytes, dtype=torch.uint8)
    for term, pages in zip(terms, out.split(counts) if len(terms) > 1 else [out], strict=True):
        u, v = term.u, term.v
        parts = (t.contiguous() for t in (u.codes, u.levels, term.s, v.codes, v.levels))
        torch.ops.dts_fast.write_pages_(pages, *parts, u.n, v.n)
    return out


def write_vector(out: Tensor, base: Tensor, delta: Delta) -> None:
    """Write ``base + delta`` to ``out``, all ``[n]``: the sum in float32 (or wider), rounded once."""
    native_takes = isinstance(delta, CodedVector) and len(delta.shape) == 1 and delta.levels.dtype == torch.float32
    if native_takes and all(t.is_cpu and t.is_contiguous() for t in (out, base, delta.codes, delta.levels)):
        torch.ops.dts_fast.write_vector_(out, base, delta.codes, delta.levels)
    else:
        wide = torch.promote_types(base.dtype, torch.float32)
        out.copy_(base.to(wide) + delta.dequantize(wide).to(base.device))


def _write_vector_plain(out, base, codes, levels):
    wide = torch.promote_types(base.dtype, torch.float32)
    out.copy_(base.to(wide) + dequantize(codes, levels.to(wide), base.shape[0]))


def _write_pages_plain(pages, u_codes, u_levels, s, v_codes, v_levels, n, k):
    u, v = CodedMatrix(u_codes, u_levels, n), CodedMatrix(v_codes, v_levels, k)
    pages.copy_(to_pages(LowRankDelta(u, s, v, (n, k))))


_LIBRARY.impl("write_pages_", _write_pages_plain, "CompositeExplicitAutograd")
_LIBRARY.impl("write_vector_", _write_vector_plain, "CompositeExplicitAutograd")

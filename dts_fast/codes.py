"""The bit layout: 2-bit codes, their four levels, and the rank pages that hold them in memory.

Nothing outside this file knows which bit holds which code. Two layouts are defined here:

* the *canonical* one of the adapter file: rank-major rows, the code of element ``n`` in bits
  ``2 * (n % 4)`` of byte ``n // 4`` (`pack`, `unpack`, `CodedMatrix`, `CodedVector`);
* the *page* of the in-memory bank: 16 ranks with their codes, scales and levels side by side
  (`PageLayout`, `to_pages`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

CODES_PER_BYTE = 4
NUM_LEVELS = 4
PAGE_RANKS = 16  # one tensor-core K step, one AVX-512 register of float32


def packed_size(n: int) -> int:
    """Bytes that hold ``n`` 2-bit codes."""
    return -(-n // CODES_PER_BYTE)


def pack(codes: Tensor) -> Tensor:
    """Pack 2-bit codes four to a byte; the padding of the last byte is zero.

    Args:
        codes: uint8 ``[..., n]`` with values 0 to 3.

    Returns:
        uint8 ``[..., ceil(n / 4)]``, the code of element ``i`` in bits ``2 * (i % 4)`` of byte ``i // 4``.
    """
    n = codes.shape[-1]
    padded = torch.nn.functional.pad(codes, (0, packed_size(n) * CODES_PER_BYTE - n))
    quads = padded.unflatten(-1, (packed_size(n), CODES_PER_BYTE))
    return quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6


def unpack(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack`: uint8 ``[..., ceil(n / 4)]`` to uint8 ``[..., n]``."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts & 3).flatten(-2)[..., :n]


@lru_cache(maxsize=8)
def _codes_of_every_byte(device: torch.device) -> Tensor:
    """int64 ``[256, 4]``: the four codes of each byte value."""
    return unpack(torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(-1), 4).long()


def dequantize(packed: Tensor, levels: Tensor, n: int) -> Tensor:
    """Replace codes by their levels.

    Args:
        packed: uint8 ``[..., ceil(n / 4)]``, strided or not.
        levels: floating point ``[4]``.

    Returns:
        ``[..., n]`` in the dtype of ``levels``.
    """
    # One lookup per byte in a table of 256 x 4 values: four times fewer gathers than one per code.
    table = levels.index_select(0, _codes_of_every_byte(levels.device).view(-1)).view(-1, CODES_PER_BYTE)
    return torch.nn.functional.embedding(packed.int(), table).flatten(-2)[..., :n]


@dataclass(frozen=True, eq=False)
class CodedMatrix:
    """A factor ``[n, rank]`` of a low-rank delta, every element one of four levels.

    Attributes:
        codes: uint8 ``[rank, ceil(n / 4)]``, rank-major.
        levels: float32 ``[4]``, code to value.
        n: elements per rank component (``out_features`` for U, ``in_features`` for V).
    """

    codes: Tensor
    levels: Tensor
    n: int

    @property
    def rank(self) -> int:
        return self.codes.shape[0]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.levels.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The factor as ``[n, rank]`` in ``dtype``."""
        return dequantize(self.codes, self.levels.to(dtype), self.n).t()


@dataclass(frozen=True, eq=False)
class CodedVector:
    """The delta of a parameter without matrix structure, every element one of four levels.

    Attributes:
        codes: uint8 ``[ceil(numel / 4)]``.
        levels: float32 ``[4]``.
        shape: shape of the parameter.
    """

    codes: Tensor
    levels: Tensor
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.levels.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The delta in the parameter's shape and ``dtype``."""
        return dequantize(self.codes, self.levels.to(dtype), self.numel).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class LowRankDelta:
    """A weight delta ``U diag(s) V^T`` with 2-bit factors (DTS, arXiv 2512.01461, sections 3.1 and 3.2).

    Attributes:
        u: factor of the output side, ``[N, r]``.
        s: float32 ``[r]``, scale of each component.
        v: factor of the input side, ``[K, r]``.
        shape: shape of the parameter; more than two dimensions stand for ``[N, K]`` by flattening
            (see `matrix_shape`).
    """

    u: CodedMatrix
    s: Tensor
    v: CodedMatrix
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return self.s.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, levels and scales, as stored."""
        return self.u.nbytes + self.v.nbytes + self.s.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The delta in the parameter's shape, computed in ``dtype``."""
        product = (self.u.dequantize(dtype) * self.s.to(dtype)) @ self.v.dequantize(dtype).t()
        return product.reshape(self.shape)

    def transpose(self) -> LowRankDelta:
        """The delta of the transposed matrix ``[K, N]``; nothing is copied."""
        return LowRankDelta(u=self.v, s=self.s, v=self.u, shape=(self.v.n, self.u.n))


@dataclass(frozen=True, eq=False)
class DeltaSum:
    """The delta of one parameter as a sum: a mixture of adapters, each with codes and levels of its own.

    Concatenated components in one `LowRankDelta` could not hold it, because a factor has one set of levels.

    Attributes:
        terms: one or more, all `LowRankDelta` or all `CodedVector`, of one shape.
    """

    terms: tuple[LowRankDelta, ...] | tuple[CodedVector, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.terms[0].shape

    @property
    def rank(self) -> int:
        """Components of all terms; 0 for vectors."""
        return sum(term.rank for term in self.terms if isinstance(term, LowRankDelta))

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return sum(term.nbytes for term in self.terms)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The delta in the parameter's shape and ``dtype``."""
        if not is_matrix(self):
            return sum(term.dequantize(dtype) for term in self.terms)
        # All components side by side: one product, where each term's own would write the whole matrix.
        u = torch.cat([term.u.dequantize(dtype) * term.s.to(dtype) for term in self.terms], 1)
        v = torch.cat([term.v.dequantize(dtype) for term in self.terms], 1)
        return (u @ v.t()).reshape(self.shape)

    def transpose(self) -> DeltaSum:
        """The delta of the transposed matrix; nothing is copied."""
        return DeltaSum(tuple(term.transpose() for term in self.terms))


Delta = LowRankDelta | CodedVector | DeltaSum


def terms_of(delta: Delta) -> tuple[LowRankDelta, ...] | tuple[CodedVector, ...]:
    """The summands of a delta; itself where it is not a sum."""
    return delta.terms if isinstance(delta, DeltaSum) else (delta,)


def as_matrix(delta):
    """The delta of a single row or column as what a bank holds: one component, exactly; anything else as it is."""
    if isinstance(delta, LowRankDelta):
        return delta
    if isinstance(delta, DeltaSum):
        terms = tuple(as_matrix(term) for term in delta.terms)
        return delta if terms == delta.terms else DeltaSum(terms)
    if not isinstance(delta, CodedVector) or len(delta.shape) != 2 or 1 not in delta.shape:
        return delta
    n, k = delta.shape
    one = delta.levels.new_tensor([1.0, 0.0, 0.0, 0.0])
    long = CodedMatrix(delta.codes[None], delta.levels, delta.numel)
    short = CodedMatrix(torch.zeros_like(delta.codes[None, :1]), one, 1)
    u, v = (short, long) if n == 1 else (long, short)
    return LowRankDelta(u, one[:1], v, (n, k))


def is_matrix(delta: Delta) -> bool:
    """Whether a delta (or each of its terms) is a `LowRankDelta`."""
    return isinstance(terms_of(delta)[0], LowRankDelta)


def owned(delta: Delta) -> Delta:
    """A copy whose codes are no views of anything else (a mapped file, say)."""
    if isinstance(delta, DeltaSum):
        return DeltaSum(tuple(owned(term) for term in delta.terms))
    if isinstance(delta, LowRankDelta):
        u, v = (CodedMatrix(f.codes.clone(), f.levels.clone(), f.n) for f in (delta.u, delta.v))
        return LowRankDelta(u, delta.s.clone(), v, delta.shape)
    return CodedVector(delta.codes.clone(), delta.levels.clone(), delta.shape)


def sizes_of(delta: LowRankDelta | DeltaSum) -> LowRankDelta | DeltaSum:
    """A matrix's delta without its numbers, on the meta device: what a bank has to know where it has the pages."""
    if isinstance(delta, DeltaSum):
        return DeltaSum(tuple(sizes_of(term) for term in delta.terms))
    u, v = (
        CodedMatrix(_sizes(f.codes.shape, torch.uint8), _sizes((4,), torch.float32), f.n) for f in (delta.u, delta.v)
    )
    return LowRankDelta(u, _sizes(delta.s.shape, torch.float32), v, delta.shape)


@lru_cache(maxsize=4096)
def _sizes(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device="meta")


def scaled(delta: Delta, weight: float) -> Delta:
    """``weight`` times a delta: the weight goes to the scales, or to the levels of a vector; codes are shared."""
    if isinstance(delta, DeltaSum):
        return DeltaSum(tuple(scaled(term, weight) for term in delta.terms))
    if isinstance(delta, LowRankDelta):
        return LowRankDelta(delta.u, delta.s * weight, delta.v, delta.shape)
    return CodedVector(delta.codes, delta.levels * weight, delta.shape)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """How a parameter is seen as a matrix ``[N, K]``; None where it has no matrix structure.

    Beyond two dimensions, those of size 1 are dropped, the first that is left is N and the others are flattened
    to K, so that a conv weight ``[out, in, kh, kw]`` is ``[out, in * kh * kw]`` and a position table ``[1, T, H]``
    is ``[T, H]``.
    """
    if len(shape) == 2:
        return shape
    dims = [d for d in shape if d != 1]
    if len(dims) < 2:
        return None
    return dims[0], torch.Size(dims[1:]).numel()


@dataclass(frozen=True)
class PageLayout:
    """Byte offsets within one rank page of a layer ``[N, K]``: 16 ranks, stored together.

        0     s         float32 [16]                   zero for unused ranks
        64    u_levels  float32 [4]
        80    v_levels  float32 [4]
        128   v_tiles   uint8   [ceil(K / 16), 16, 4]  tile, rank, codes of 16 neighbouring inputs
              u_tiles   uint8   [ceil(N / 16), 16, 4]  tile, output, codes of the page's 16 ranks

    A *tile* is 64 bytes, one AVX-512 register: 16 lanes of one 32-bit word each. Lanes are what is computed (ranks in
    the shrink, outputs in the expand), and the 16 codes of a word run along the sum. So a register holds all lanes'
    operands of 16 steps, each a shift away; two neighbouring codes are one of 16 pairs, which is what table lookups on
    a CPU and the fragments of a GPU's matrix instructions want. Padding codes are 0. Pages start at multiples of
    128 bytes, tiles at multiples of 64.
    """

    n: int
    k: int

    S_OFFSET = 0
    U_LEVELS_OFFSET = 64
    V_LEVELS_OFFSET = 80
    V_OFFSET = 128
    TILE_LANES = 16
    TILE_BYTES = 64
    PAGE_ALIGN = 128

    @property
    def v_count(self) -> int:
        """Tiles of V."""
        return -(-self.k // self.TILE_LANES)

    @property
    def u_count(self) -> int:
        """Tiles of U."""
        return -(-self.n // self.TILE_LANES)

    @property
    def u_offset(self) -> int:
        return self.V_OFFSET + self.v_count * self.TILE_BYTES

    @property
    def nbytes(self) -> int:
        """Bytes of one page."""
        return _round_up(self.u_offset + self.u_count * self.TILE_BYTES, self.PAGE_ALIGN)

    def s(self, pages: Tensor) -> Tensor:
        """float32 view ``[P, 16]`` of uint8 ``pages [P, nbytes]``."""
        return pages[:, self.S_OFFSET : self.S_OFFSET + 4 * PAGE_RANKS].view(torch.float32)

    def u_levels(self, pages: Tensor) -> Tensor:
        """float32 view ``[P, 4]``."""
        return pages[:, self.U_LEVELS_OFFSET : self.U_LEVELS_OFFSET + 4 * NUM_LEVELS].view(torch.float32)

    def v_levels(self, pages: Tensor) -> Tensor:
        """float32 view ``[P, 4]``."""
        return pages[:, self.V_LEVELS_OFFSET : self.V_LEVELS_OFFSET + 4 * NUM_LEVELS].view(torch.float32)

    def v_tiles(self, pages: Tensor) -> Tensor:
        """uint8 view ``[P, ceil(K / 16), 16, 4]``."""
        return pages[:, self.V_OFFSET : self.u_offset].unflatten(1, (self.v_count, self.TILE_LANES, 4))

    def u_tiles(self, pages: Tensor) -> Tensor:
        """uint8 view ``[P, ceil(N / 16), 16, 4]``."""
        tiles = pages[:, self.u_offset : self.u_offset + self.u_count * self.TILE_BYTES]
        return tiles.unflatten(1, (self.u_count, self.TILE_LANES, 4))

    def u(self, pages: Tensor, dtype: torch.dtype) -> Tensor:
        """The factor U of all pages, ``[P * 16, N]``."""
        tiles = self.u_tiles(pages).flatten(1, 2)  # [P, outputs, 4]
        values = _dequantize_rows(tiles, self.u_levels(pages).to(dtype)).unflatten(0, tiles.shape[:2])
        return values[:, : self.n].transpose(1, 2).flatten(0, 1)

    def v(self, pages: Tensor, dtype: torch.dtype) -> Tensor:
        """The factor V of all pages, ``[P * 16, K]``."""
        rows = self.v_tiles(pages).transpose(1, 2).flatten(2)  # [P, 16, bytes]
        return _dequantize_rows(rows, self.v_levels(pages).to(dtype))[:, : self.k]

    def coefficients(
        self, ids: Tensor, pages: Tensor, slot_pages: Tensor, slot_weights: Tensor, slot_ids: Tensor
    ) -> Tensor:
        """What the rows of V are multiplied with to give rows ``ids`` of the delta, float32 ``[M, L, 16]``: rows of U
        times scales and weights, without unpacking the others. Zero for unused entries and for slot -1."""
        slots = slot_ids.clamp_min(0)
        listed = slot_pages[slots]
        weights = slot_weights[slots].masked_fill((listed < 0) | (slot_ids < 0)[:, None], 0.0)
        listed = listed.clamp_min(0).long()
        words = self.u_tiles(pages).flatten(1, 2)[listed, ids[:, None]]  # [M, L, 4]
        codes = unpack(words, PAGE_RANKS).long()
        u = self.u_levels(pages)[listed].gather(2, codes)
        return u * self.s(pages)[listed] * weights[..., None]


def _dequantize_rows(packed: Tensor, levels: Tensor) -> Tensor:
    """Like `dequantize` for rows in groups that each have their own levels.

    Args:
        packed: uint8 ``[P, rows, bytes]``.
        levels: floating point ``[P, 4]``.

    Returns:
        ``[P * rows, 4 * bytes]`` in the dtype of ``levels``.
    """
    tables = levels[:, _codes_of_every_byte(levels.device)].reshape(-1, CODES_PER_BYTE)  # [P * 256, 4]
    first = torch.arange(levels.shape[0], dtype=torch.int32, device=levels.device) * 256
    index = packed.int() + first[:, None, None]
    return torch.nn.functional.embedding(index, tables).flatten(-2).flatten(0, 1)


def num_pages(rank: int) -> int:
    """Pages that a delta of this rank takes; rank 0 takes none."""
    return -(-rank // PAGE_RANKS)


def to_pages(delta: LowRankDelta | DeltaSum) -> Tensor:
    """Lay a delta out in rank pages: uint8 ``[P, PageLayout(N, K).nbytes]``, zero where unused; ``ceil(r / 16)`` pages
    for each term, because a page has one set of levels."""
    if isinstance(delta, DeltaSum):
        return torch.cat([to_pages(term) for term in delta.terms])
    layout, count = PageLayout(delta.u.n, delta.v.n), num_pages(delta.rank)
    pages = torch.zeros(count, layout.nbytes, dtype=torch.uint8, device=delta.s.device)
    layout.u_levels(pages)[:] = delta.u.levels
    layout.v_levels(pages)[:] = delta.v.levels
    layout.s(pages)[:] = _padded(delta.s, count * PAGE_RANKS).unflatten(0, (count, PAGE_RANKS))
    v = torch.nn.functional.pad(delta.v.codes, (0, layout.v_count * 4 - delta.v.codes.shape[1]))
    v = _padded(v, count * PAGE_RANKS).reshape(count, PAGE_RANKS, layout.v_count, 4)
    layout.v_tiles(pages)[:] = v.transpose(1, 2)
    u = torch.nn.functional.pad(unpack(delta.u.codes, delta.u.n), (0, layout.u_count * layout.TILE_LANES - delta.u.n))
    u = _padded(u, count * PAGE_RANKS).reshape(count, PAGE_RANKS, layout.u_count, layout.TILE_LANES)
    layout.u_tiles(pages)[:] = pack(u.permute(0, 2, 3, 1))
    return pages


def _padded(rows: Tensor, count: int) -> Tensor:
    """Zeros below, up to ``count`` rows."""
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])])


def from_pages(layout: PageLayout, pages: Tensor, weights: Tensor) -> DeltaSum:
    """The delta that weighted pages hold, 16 ranks a term; codes are copied, padding ranks included (their scale is 0).

    Args:
        pages: uint8 ``[P, nbytes]``, P at least 1.
        weights: float32 ``[P]``.
    """
    v_codes = layout.v_tiles(pages).transpose(1, 2).flatten(2)[..., : packed_size(layout.k)]
    u_codes = pack(unpack(layout.u_tiles(pages).flatten(1, 2), PAGE_RANKS)[:, : layout.n].transpose(1, 2))
    u_levels, v_levels = layout.u_levels(pages).clone(), layout.v_levels(pages).clone()
    s = layout.s(pages) * weights[:, None]
    terms = (
        LowRankDelta(
            CodedMatrix(u_codes[page], u_levels[page], layout.n),
            s[page],
            CodedMatrix(v_codes[page].contiguous(), v_levels[page], layout.k),
            (layout.n, layout.k),
        )
        for page in range(pages.shape[0])
    )
    return DeltaSum(tuple(terms))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

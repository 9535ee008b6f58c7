"""Chosen (token, expert) pairs sorted by expert, on the device, without a host sync, in the same order every time.

``group_pairs`` gives tiles: each tile is up to BM pairs of one expert, and up to ``more`` others where that saves the
expert a tile (which would unpack all of its weights again for a few pairs). The number of tiles is only known on the
device, so callers launch the bound ``max_tiles`` and a tile of count 0 returns at once; a CUDA graph replays with any
routing. Ids outside [0, E) belong to no tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.launch import cdiv, on_its_device, pow2

CHUNK = 256  # pairs a program ranks at most; the ranks inside a chunk cost CHUNK² comparisons


@triton.jit
def _count_kernel(ids_ptr, hist_ptr, S, EP: tl.constexpr, CHUNK: tl.constexpr):
    s = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + s, mask=s < S, other=-1).to(tl.int32)
    e = tl.arange(0, EP)
    tl.store(hist_ptr + tl.program_id(0) * EP + e, tl.sum((ids[:, None] == e[None, :]).to(tl.int32), 0))


@triton.jit
def _place_kernel(
    ids_ptr, hist_ptr, order_ptr, tiles_ptr, S, E, chunks, max_tiles,
    EP: tl.constexpr, BM: tl.constexpr, MORE: tl.constexpr,
    CHUNK: tl.constexpr, ONE_CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    at = tl.arange(0, CHUNK)
    s = chunk * CHUNK + at
    ids = tl.load(ids_ptr + s, mask=s < S, other=-1).to(tl.int32)
    ids = tl.where(ids < E, ids, -1)
    e = tl.arange(0, EP)
    if ONE_CHUNK:
        total = tl.sum((ids[:, None] == e[None, :]).to(tl.int32), 0)
        before = tl.zeros((EP,), tl.int32)
    else:
        total = tl.zeros((EP,), tl.int32)
        before = tl.zeros((EP,), tl.int32)
        for first in range(0, chunks, ROWS):
            c = first + tl.arange(0, ROWS)
            part = tl.load(hist_ptr + c[:, None] * EP + e[None, :], mask=(c < chunks)[:, None], other=0)
            total += tl.sum(part, 0)
            before += tl.sum(tl.where((c < chunk)[:, None], part, 0), 0)
        total = tl.where(e < E, total, 0)
    first_pair = tl.cumsum(total, 0) - total
    tiles_of = (total + BM + MORE - 1) // (BM + MORE)
    # What is left when every tile has BM: up to MORE a tile, from the first one on.
    left = tl.maximum(total - tiles_of * BM, 0)
    tile_start = tl.cumsum(tiles_of, 0) - tiles_of

    # Over the first dimension: a thread has whole columns, and nothing is added across threads.
    rank = tl.sum(((ids[:, None] == ids[None, :]) & (at[:, None] < at[None, :])).to(tl.int32), 0)
    base = tl.gather(first_pair + before, tl.maximum(ids, 0), 0)
    tl.store(order_ptr + base + rank, s, mask=(s < S) & (ids >= 0))

    # Each expert's nth tile, n by n, divided among the programs; then the tiles that no expert needs.
    for n in range(chunk, tl.max(tiles_of, 0), chunks):
        out, skip = tiles_ptr + (tile_start + n) * 3, n * BM + tl.minimum(left, n * MORE)
        tl.store(out, e, mask=n < tiles_of)
        tl.store(out + 1, first_pair + skip, mask=n < tiles_of)
        most = BM + tl.minimum(tl.maximum(left - n * MORE, 0), MORE)
        tl.store(out + 2, tl.minimum(total - skip, most), mask=n < tiles_of)
    for first in range(tl.sum(tiles_of, 0) + chunk * CHUNK, max_tiles, chunks * CHUNK):
        tl.store(tiles_ptr + (first + at) * 3 + 2, 0, mask=first + at < max_tiles)


@triton.jit
def tile_of(tiles_ptr, max_tiles, n_tiles, GROUP: tl.constexpr):
    """Programs in groups of GROUP tiles that share weight rows in L2: (expert, first pair, count, n tile)."""
    pid = tl.program_id(0)
    in_group = GROUP * n_tiles
    first_tile = pid // in_group * GROUP
    size = tl.minimum(max_tiles - first_tile, GROUP)
    tile = first_tile + pid % in_group % size
    info = tiles_ptr + tile * 3
    return tl.load(info), tl.load(info + 1), tl.load(info + 2), pid % in_group // size


@dataclass(frozen=True)
class PairTiles:
    """order: int32 (S,), pairs t·K + k sorted by expert, stable; tiles: int32 (max_tiles, 3): expert, first, count."""

    order: torch.Tensor
    tiles: torch.Tensor
    max_tiles: int


def max_tiles(pairs: int, num_experts: int, block: int) -> int:
    """The most tiles any routing of ``pairs`` can need."""
    return min(pairs, (pairs + min(num_experts, pairs) * (block - 1)) // block)


@on_its_device
def group_pairs(ids_TK: torch.Tensor, num_experts: int, block: int, more: int = 0) -> PairTiles:
    """ids_TK: contiguous int32 or int64 (T, K) with at least one element; block: pairs a tile, a power of two."""
    S, device = ids_TK.numel(), ids_TK.device
    EP, chunk = pow2(num_experts), max(16, min(CHUNK, pow2(S)))
    chunks = cdiv(S, chunk)
    bound = max_tiles(S, num_experts, block)
    order = torch.empty(S, dtype=torch.int32, device=device)
    tiles = torch.empty(bound, 3, dtype=torch.int32, device=device)
    hist = torch.empty(chunks if chunks > 1 else 0, EP, dtype=torch.int32, device=device)
    if chunks > 1:
        _count_kernel[(chunks,)](ids_TK, hist, S, EP=EP, CHUNK=chunk, num_warps=8)
    _place_kernel[(chunks,)](
        ids_TK, hist, order, tiles, S, num_experts, chunks, bound,
        EP=EP, BM=block, MORE=more, CHUNK=chunk, ONE_CHUNK=chunks == 1, ROWS=max(1, 8192 // EP), num_warps=8,
    )  # fmt: skip
    return PairTiles(order, tiles, bound)

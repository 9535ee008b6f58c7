"""What every kernel of tiles with weights as the left operand begins and ends with: its inputs, and where sums go.

Sums are float32 (weight rows, pairs or inputs). Shape suffixes as in ``ktfx.ops.experts``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from ktfx.triton_kernels.dequant import activation, gated, narrow


@triton.jit
def pairs_inputs(order_ptr, first, start, count, H, TOPK: tl.constexpr, MANY: tl.constexpr):
    """Pairs ``start`` … of a tile of ``count`` from ``first`` on: (which are there, where their tokens' rows begin)."""
    m = start + tl.arange(0, MANY)
    there = m < count
    pair = tl.load(order_ptr + first + m, mask=there, other=0)
    return there, (pair // TOPK).to(tl.int64) * H


@triton.jit
def store_up(
    acc, h_ptr, s_ptr, b_ptr, row, srow, ok, first, start, count, n_tile, inter, alpha, limit,
    L: tl.constexpr, FMT: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What the sums acc (L·BN, pairs) of gate and up give, for the tile's pairs from ``start`` on."""
    MANY: tl.constexpr = acc.shape[1]
    if FMT == "int8":
        acc *= tl.load(s_ptr + srow, mask=ok, other=0.0)[:, None]
    if BIAS:
        acc += tl.load(b_ptr + row, mask=ok, other=0.0).to(tl.float32)[:, None]
    if L == 2:
        gate, up = tl.split(acc.reshape(2, BN, MANY).permute(1, 2, 0))
        h = gated(gate, up, ACT, GATE, alpha, limit)
    else:
        h = activation(acc, ACT)
    i, m = n_tile * BN + tl.arange(0, BN), start + tl.arange(0, MANY)
    at = h_ptr + (first + m).to(tl.int64)[None, :] * inter + i[:, None]
    tl.store(at, narrow(h, h_ptr.dtype.element_ty), mask=(i < inter)[:, None] & (m < count)[None, :])


@triton.jit
def store_down(
    acc, order_ptr, y_ptr, s_ptr, b_ptr, row, srow, ok, n, first, start, count, H,
    FMT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The sums acc (BN, pairs) to the places of the tile's pairs from ``start`` on."""
    if FMT == "int8":
        acc *= tl.load(s_ptr + srow, mask=ok, other=0.0)[:, None]
    if BIAS:
        acc += tl.load(b_ptr + row, mask=ok, other=0.0).to(tl.float32)[:, None]
    m = start + tl.arange(0, acc.shape[1])
    there = m < count
    pair = tl.load(order_ptr + first + m, mask=there, other=0).to(tl.int64)
    at = y_ptr + pair[None, :] * H + n[:, None]
    tl.store(at, narrow(acc, y_ptr.dtype.element_ty), mask=ok[:, None] & there[None, :])


@triton.jit
def linear_tile(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """The first input and the first weight row of this program's tile; GROUP tiles share weight rows in L2."""
    pid, m_tiles, n_tiles = tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN)
    in_group = GROUP * n_tiles
    first = pid // in_group * GROUP
    size = tl.minimum(m_tiles - first, GROUP)
    return (first + pid % in_group % size) * BM, pid % in_group // size * BN


@triton.jit
def store_linear(
    acc, y_ptr, s_ptr, b_ptr, m, n, M, N, part, FMT: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """The sums acc of weight rows n and inputs m to y (M, N), or those of one part of a reduction to its (M, N)."""
    there, ok = m < M, n < N
    if FMT == "int8":
        acc *= tl.load(s_ptr + n, mask=ok, other=0.0)[:, None]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    if SPLIT > 1:
        tl.store(y_ptr + part.to(tl.int64) * M * N + at, acc, mask=ok[:, None] & there[None, :])
    else:
        if BIAS:
            acc += tl.load(b_ptr + n, mask=ok, other=0.0).to(tl.float32)[:, None]
        tl.store(y_ptr + at, narrow(acc, y_ptr.dtype.element_ty), mask=ok[:, None] & there[None, :])

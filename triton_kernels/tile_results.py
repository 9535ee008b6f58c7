"""What every kernel of tiles with weights as the left operand begins and ends with: its pairs, and where sums go.

Sums are float32 (weight rows, pairs). Shape suffixes as in ``ktfx.ops.experts``.
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

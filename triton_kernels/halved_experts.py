"""Many tokens through experts stored in fp8 or int8: tensor cores multiply the weights as they are stored.

Unpacking a weight for 16-bit products costs more than the product. Here the inputs become eight bits wide instead, in
two halves whose sum they are (``input_halves``): two products of eight bits take a tensor core as long as one of 16,
and copies by descriptor (TMA, Hopper and later) bring weights from memory straight to where it reads them.

Weights are the left operand. A tile takes up to MORE pairs beyond BM where that saves its expert a tile.
Shape suffixes as in ``ktfx.ops.experts``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.grouping import PairTiles, tile_of
from ktfx.triton_kernels.input_halves import (
    add_products,
    halved_inputs,
    no_products,
    stored_view,
    worth,
)
from ktfx.triton_kernels.launch import cdiv
from ktfx.triton_kernels.matmul import StoredWeight, load_inputs, scale_row
from ktfx.triton_kernels.tile_results import pairs_inputs, store_down, store_up
from triton.tools.tensor_descriptor import TensorDescriptor

from ktfx.ops.experts import ExpertsSpec

if TYPE_CHECKING:
    from ktfx.triton_kernels.experts import TilesConfig


@triton.jit
def _inputs(order_ptr, first, start, count, T, H, TOPK: tl.constexpr, M: tl.constexpr):
    """Of the pairs from ``start`` on: where their tokens' high halves begin, then the low ones, and which are there."""
    m = tl.arange(0, 2 * M)
    there = start + m % M < count
    pair = tl.load(order_ptr + first + start + m % M, mask=there, other=0)
    return (m // M * T + pair // TOPK).to(tl.int64) * H, there


@triton.jit
def _up_tile(
    x_ptr, xs_ptr, order_ptr, w_tiles, s_ptr, b_ptr, h_ptr, e, first, count, n_tile, T, H, inter, lds, alpha, limit,
    TOPK: tl.constexpr, L: tl.constexpr, FMT: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, MORE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """gate and up with the activation for ``count`` ≤ BM + MORE pairs from ``first`` on, all of expert e."""
    rows, there = _inputs(order_ptr, first, 0, count, T, H, TOPK, BM)
    part, i = tl.arange(0, L * BN) // BN, n_tile * BN + tl.arange(0, L * BN) % BN
    n, ok = part * inter + i, i < inter
    row, srow = e.to(tl.int64) * (L * inter) + n, scale_row(e.to(tl.int64), n, L * inter, FMT)
    acc, scale = no_products(L * BN, BM, FMT), tl.zeros((L * BN,), tl.float32)
    if MORE > 0:
        more_rows, more_there = _inputs(order_ptr, first, BM, count, T, H, TOPK, MORE)
        more = no_products(L * BN, MORE, FMT)
    for k0 in tl.range(0, H, BK):
        if FMT == "fp8":
            scale = tl.load(s_ptr + srow * lds + k0 // 128, mask=ok, other=0.0)
        # The rows of gate, then those of up; zeros past I.
        w = w_tiles.load([L * e, n_tile * BN, k0]).reshape(L * BN, BK)
        acc = add_products(acc, w, load_inputs(x_ptr, rows, there, k0, H, BK), scale, FMT)
        if MORE > 0:
            more = add_products(more, w, load_inputs(x_ptr, more_rows, more_there, k0, H, BK), scale, FMT)
    if MORE > 0:
        _, token = pairs_inputs(order_ptr, first, BM, count, 1, TOPK, MORE)
        store_up(
            worth(more, tl.load(xs_ptr + token), MORE, FMT), h_ptr, s_ptr, b_ptr, row, srow, ok, first, BM, count,
            n_tile, inter, alpha, limit, L, FMT, ACT, GATE, BIAS, BN,
        )  # fmt: skip
    _, token = pairs_inputs(order_ptr, first, 0, count, 1, TOPK, BM)
    store_up(
        worth(acc, tl.load(xs_ptr + token), BM, FMT), h_ptr, s_ptr, b_ptr, row, srow, ok, first, 0, count, n_tile,
        inter, alpha, limit, L, FMT, ACT, GATE, BIAS, BN,
    )  # fmt: skip


@triton.jit
def _up_kernel(
    x_ptr, xs_ptr, order_ptr, tiles_ptr, w_tiles, s_ptr, b_ptr, h_ptr,
    T, H, inter, lds, alpha, limit, max_tiles, n_tiles,
    TOPK: tl.constexpr, L: tl.constexpr, FMT: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, MORE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    e, first, count, n_tile = tile_of(tiles_ptr, max_tiles, n_tiles, GROUP)
    if count <= 0:
        return
    # An expert's last tile is half empty half the time.
    if BM > 16 and count <= BM // 2:
        _up_tile(
            x_ptr, xs_ptr, order_ptr, w_tiles, s_ptr, b_ptr, h_ptr, e, first, count, n_tile,
            T, H, inter, lds, alpha, limit, TOPK, L, FMT, ACT, GATE, BIAS, BM // 2, 0, BN, BK,
        )  # fmt: skip
    elif MORE == 0 or count <= BM:
        _up_tile(
            x_ptr, xs_ptr, order_ptr, w_tiles, s_ptr, b_ptr, h_ptr, e, first, count, n_tile,
            T, H, inter, lds, alpha, limit, TOPK, L, FMT, ACT, GATE, BIAS, BM, 0, BN, BK,
        )  # fmt: skip
    else:
        _up_tile(
            x_ptr, xs_ptr, order_ptr, w_tiles, s_ptr, b_ptr, h_ptr, e, first, count, n_tile,
            T, H, inter, lds, alpha, limit, TOPK, L, FMT, ACT, GATE, BIAS, BM, MORE, BN, BK,
        )  # fmt: skip


@triton.jit
def _down_tile(
    h_tiles, h_more_tiles, hs_ptr, order_ptr, w_tiles, s_ptr, b_ptr, y_ptr, e, first, count, n_tile, H, inter, lds,
    FMT: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, MORE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """down for ``count`` ≤ BM + MORE pairs from ``first`` on, all of expert e, to the pairs' own places."""
    n = n_tile * BN + tl.arange(0, BN)
    ok = n < H
    row, srow = e.to(tl.int64) * H + n, scale_row(e.to(tl.int64), n, H, FMT)
    acc, scale = no_products(BN, BM, FMT), tl.zeros((BN,), tl.float32)
    if MORE > 0:
        more = no_products(BN, MORE, FMT)
    for i0 in tl.range(0, inter, BK):
        if FMT == "fp8":
            scale = tl.load(s_ptr + srow * lds + i0 // 128, mask=ok, other=0.0)
        # Rows past the expert's are other pairs', and past H another expert's: nothing of them is stored.
        w = w_tiles.load([e * H + n_tile * BN, i0])
        acc = add_products(acc, w, h_tiles.load([0, first, i0]).reshape(2 * BM, BK).T, scale, FMT)
        if MORE > 0:
            more = add_products(more, w, h_more_tiles.load([0, first + BM, i0]).reshape(2 * MORE, BK).T, scale, FMT)
    if MORE > 0:
        m = BM + tl.arange(0, MORE)
        result = worth(more, tl.load(hs_ptr + first + m, mask=m < count, other=0.0), MORE, FMT)
        store_down(result, order_ptr, y_ptr, s_ptr, b_ptr, row, srow, ok, n, first, BM, count, H, FMT, BIAS)
    m = tl.arange(0, BM)
    result = worth(acc, tl.load(hs_ptr + first + m, mask=m < count, other=0.0), BM, FMT)
    store_down(result, order_ptr, y_ptr, s_ptr, b_ptr, row, srow, ok, n, first, 0, count, H, FMT, BIAS)


@triton.jit
def _down_kernel(
    h_tiles, h_half_tiles, h_more_tiles, hs_ptr, order_ptr, tiles_ptr, w_tiles, s_ptr, b_ptr, y_ptr,
    H, inter, lds, max_tiles, n_tiles,
    FMT: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, MORE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    e, first, count, n_tile = tile_of(tiles_ptr, max_tiles, n_tiles, GROUP)
    if count <= 0:
        return
    if BM > 16 and count <= BM // 2:
        _down_tile(
            h_half_tiles, h_more_tiles, hs_ptr, order_ptr, w_tiles, s_ptr, b_ptr, y_ptr, e, first, count, n_tile,
            H, inter, lds, FMT, BIAS, BM // 2, 0, BN, BK,
        )  # fmt: skip
    elif MORE == 0 or count <= BM:
        _down_tile(
            h_tiles, h_more_tiles, hs_ptr, order_ptr, w_tiles, s_ptr, b_ptr, y_ptr, e, first, count, n_tile,
            H, inter, lds, FMT, BIAS, BM, 0, BN, BK,
        )  # fmt: skip
    else:
        _down_tile(
            h_tiles, h_more_tiles, hs_ptr, order_ptr, w_tiles, s_ptr, b_ptr, y_ptr, e, first, count, n_tile,
            H, inter, lds, FMT, BIAS, BM, MORE, BN, BK,
        )  # fmt: skip


def halved_tiles(
    spec: ExpertsSpec, x: torch.Tensor, K: int, grouped: PairTiles, up: StoredWeight, down: StoredWeight,
    biases: Sequence[torch.Tensor], h: torch.Tensor, y: torch.Tensor, first: TilesConfig, second: TilesConfig,
) -> None:  # fmt: skip
    """h (S, I), what gate and up give for the pairs by expert, and y (S, H), each pair's result in its own place.

    The weights must say ``takes_halves`` for x's dtype.
    """
    E, (T, H), inter, fmt = spec.num_experts, x.shape, spec.intermediate, up.fmt
    L = spec.up_parts
    xs = halved_inputs(x, fmt)
    up_data = stored_view(up.data, fmt).view(L * E, inter, H)
    n_tiles = cdiv(inter, first.BN)
    _up_kernel[(grouped.max_tiles * n_tiles,)](
        xs.halves, xs.scales, grouped.order, grouped.tiles,
        TensorDescriptor.from_tensor(up_data, [L, first.BN, first.BK]), up.scales, biases[0], h,
        T, H, inter, up.lds, spec.alpha, spec.limit, grouped.max_tiles, n_tiles,
        TOPK=K, L=L, FMT=fmt, ACT=spec.activation, GATE=spec.gate, BIAS=spec.has_bias,
        BM=first.BM, MORE=first.MORE, BN=first.BN, BK=first.BK,
        GROUP=first.GROUP, num_warps=first.num_warps, num_stages=first.num_stages,
    )  # fmt: skip
    hs = halved_inputs(h, fmt)
    n_tiles = cdiv(H, second.BN)
    tiles = [
        TensorDescriptor.from_tensor(hs.halves, [2, many, second.BK])
        for many in (second.BM, second.BM // 2, max(first.MORE, 16))
    ]
    down_data = stored_view(down.data, fmt).view(E * H, inter)
    _down_kernel[(grouped.max_tiles * n_tiles,)](
        *tiles, hs.scales, grouped.order, grouped.tiles,
        TensorDescriptor.from_tensor(down_data, [second.BN, second.BK]), down.scales, biases[1], y,
        H, inter, down.lds, grouped.max_tiles, n_tiles,
        FMT=fmt, BIAS=spec.has_bias, BM=second.BM, MORE=first.MORE, BN=second.BN, BK=second.BK,
        GROUP=second.GROUP, num_warps=second.num_warps, num_stages=second.num_stages,
    )  # fmt: skip

"""Many tokens through experts whose weights are 16 bits wide, as they are: tiles that the GPU's copy engine feeds.

On Hopper and later a descriptor of a tensor lets one thread order a whole tile (TMA), where every thread orders pieces
of 16 bytes else: weights and, for down, its inputs come so, already in the order that tensor cores read. Tokens are the
left operand and up to 256 weight rows the right one, whose shared memory is read least for each product. The tokens of
gate and up lie apart and are gathered by the threads as in ``experts``, with which this shares grouping and the sum.

Shape suffixes as in ``ktfx.ops.experts``. Reductions must be whole steps: what lies past a row would be the next row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.dequant import activation, gated, narrow, product
from ktfx.triton_kernels.grouping import PairTiles, tile_of
from ktfx.triton_kernels.launch import cdiv
from ktfx.triton_kernels.matmul import StoredWeight
from triton.tools.tensor_descriptor import TensorDescriptor

from ktfx.ops.experts import ExpertsSpec

if TYPE_CHECKING:
    from ktfx.triton_kernels.experts import TilesConfig


@triton.jit
def _up_tile(
    x_ptr, order_ptr, w_tiles, b_ptr, h_ptr, e, first, count, n_tile, H, inter, alpha, limit,
    TOPK: tl.constexpr, L: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """gate and up with the activation for ``count`` ≤ BM pairs from ``first`` on, all of expert e."""
    m, k = tl.arange(0, BM), tl.arange(0, BK)
    there = m < count
    # Rows past the expert's read token 0: nothing of them is stored.
    pair = tl.load(order_ptr + first + m, mask=there, other=0)
    x_rows = x_ptr + (pair // TOPK).to(tl.int64)[:, None] * H
    acc = tl.zeros((BM, L * BN), tl.float32)
    for k0 in tl.range(0, H, BK):
        # The rows of gate, then those of up; zeros past I.
        w = w_tiles.load([L * e, n_tile * BN, k0]).reshape(L * BN, BK)
        acc = product(tl.load(x_rows + (k0 + k)[None, :]), w.T, acc)
    i = n_tile * BN + tl.arange(0, BN)
    if BIAS:
        part, row = tl.arange(0, L * BN) // BN, n_tile * BN + tl.arange(0, L * BN) % BN
        b = tl.load(b_ptr + (e.to(tl.int64) * L + part) * inter + row, mask=row < inter, other=0.0)
        acc += b.to(tl.float32)[None, :]
    if L == 2:
        gate, up = tl.split(acc.reshape(BM, 2, BN).permute(0, 2, 1))
        h = gated(gate, up, ACT, GATE, alpha, limit)
    else:
        h = activation(acc, ACT)
    at = h_ptr + (first + m).to(tl.int64)[:, None] * inter + i[None, :]
    tl.store(at, narrow(h, h_ptr.dtype.element_ty), mask=(i < inter)[None, :] & there[:, None])


@triton.jit
def _up_kernel(
    x_ptr, order_ptr, tiles_ptr, w_tiles, b_ptr, h_ptr, H, inter, alpha, limit, max_tiles, n_tiles,
    TOPK: tl.constexpr, L: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    e, first, count, n_tile = tile_of(tiles_ptr, max_tiles, n_tiles, GROUP)
    if count <= 0:
        return
    # An expert's last tile is half empty half the time.
    if BM > 16 and count <= BM // 2:
        _up_tile(
            x_ptr, order_ptr, w_tiles, b_ptr, h_ptr, e, first, count, n_tile, H, inter, alpha, limit,
            TOPK, L, ACT, GATE, BIAS, BM // 2, BN, BK,
        )  # fmt: skip
    else:
        _up_tile(
            x_ptr, order_ptr, w_tiles, b_ptr, h_ptr, e, first, count, n_tile, H, inter, alpha, limit,
            TOPK, L, ACT, GATE, BIAS, BM, BN, BK,
        )  # fmt: skip


@triton.jit
def _down_tile(
    h_tiles, order_ptr, w_tiles, b_ptr, y_ptr, e, first, count, n_tile, H, inter,
    BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """down for ``count`` ≤ BM pairs from ``first`` on, all of expert e, to the pairs' own places."""
    m, n = tl.arange(0, BM), n_tile * BN + tl.arange(0, BN)
    there = m < count
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in tl.range(0, inter, BK):
        # Rows past the expert's are other pairs', and past H another expert's: nothing of them is stored.
        acc = product(h_tiles.load([first, k0]), w_tiles.load([e * H + n_tile * BN, k0]).T, acc)
    if BIAS:
        acc += tl.load(b_ptr + e.to(tl.int64) * H + n, mask=n < H, other=0.0).to(tl.float32)[None, :]
    pair = tl.load(order_ptr + first + m, mask=there, other=0).to(tl.int64)
    at = y_ptr + pair[:, None] * H + n[None, :]
    tl.store(at, narrow(acc, y_ptr.dtype.element_ty), mask=there[:, None] & (n < H)[None, :])


@triton.jit
def _down_kernel(
    h_tiles, h_half_tiles, order_ptr, tiles_ptr, w_tiles, b_ptr, y_ptr, H, inter, max_tiles, n_tiles,
    BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    e, first, count, n_tile = tile_of(tiles_ptr, max_tiles, n_tiles, GROUP)
    if count <= 0:
        return
    if BM > 16 and count <= BM // 2:
        _down_tile(
            h_half_tiles, order_ptr, w_tiles, b_ptr, y_ptr, e, first, count, n_tile, H, inter, BIAS, BM // 2, BN, BK
        )
    else:
        _down_tile(h_tiles, order_ptr, w_tiles, b_ptr, y_ptr, e, first, count, n_tile, H, inter, BIAS, BM, BN, BK)


def plain_tiles(
    spec: ExpertsSpec, x: torch.Tensor, K: int, grouped: PairTiles, up: StoredWeight, down: StoredWeight,
    biases: Sequence[torch.Tensor], h: torch.Tensor, y: torch.Tensor, first: TilesConfig, second: TilesConfig,
) -> None:  # fmt: skip
    """h (S, I), what gate and up give for the pairs by expert, and y (S, H), each pair's result in its own place.

    The weights must say ``takes_tma`` for x's dtype; H and I are then whole steps of up to 64.
    """
    E, H, inter = spec.num_experts, spec.hidden, spec.intermediate
    L = spec.up_parts
    BN, BK = first.BN, first.BK
    n_tiles = cdiv(inter, BN)
    _up_kernel[(grouped.max_tiles * n_tiles,)](
        x, grouped.order, grouped.tiles, TensorDescriptor.from_tensor(up.data.view(L * E, inter, H), [L, BN, BK]),
        biases[0], h, H, inter, spec.alpha, spec.limit, grouped.max_tiles, n_tiles,
        TOPK=K, L=L, ACT=spec.activation, GATE=spec.gate, BIAS=spec.has_bias, BM=first.BM, BN=BN, BK=BK,
        GROUP=first.GROUP, num_warps=first.num_warps, num_stages=first.num_stages,
    )  # fmt: skip
    BN, BK = second.BN, second.BK
    n_tiles = cdiv(H, BN)
    _down_kernel[(grouped.max_tiles * n_tiles,)](
        TensorDescriptor.from_tensor(h, [second.BM, BK]), TensorDescriptor.from_tensor(h, [second.BM // 2, BK]),
        grouped.order, grouped.tiles, TensorDescriptor.from_tensor(down.data.view(E * H, inter), [BN, BK]),
        biases[1], y, H, inter, grouped.max_tiles, n_tiles,
        BIAS=spec.has_bias, BM=second.BM, BN=BN, BK=BK,
        GROUP=second.GROUP, num_warps=second.num_warps, num_stages=second.num_stages,
    )  # fmt: skip

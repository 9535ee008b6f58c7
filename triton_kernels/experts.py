"""Fused experts: two ways through the same layout, chosen by how many pairs share an expert's weights.

*Pairs* (decode): one program per (pair, rows of gate and up) multiplies its weight rows with the token in float32 and
applies the gate; a second kernel does all K chosen down projections of a token at once, with the routing weights, and
writes the sum. Nothing is sorted, nothing is added atomically, and the rows are split so finely that every
multiprocessor reads.

*Tiles* (many tokens): pairs are grouped by expert on the device (``grouping``), each tile of up to BM pairs goes
through the tensor cores with the weights as the left operand (they can be dequantised in registers there), and a last
kernel weighs and sums the K results of each token. On Hopper, weights of 16 bits (``plain_experts``) and of eight
(``halved_experts``) need no unpacking and have tiles of their own.

Both work for any routing and any T, allocate only by shape, and never synchronise with the host.
Shape suffixes as in ``ktfx.ops.experts``: T tokens, H hidden, I intermediate, E experts, K chosen, S = T·K pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.dependent_launch import dependent, prefetch_part, prefetch_rows, wait_for_previous
from ktfx.triton_kernels.dequant import activation, gated, narrow
from ktfx.triton_kernels.grouping import PairTiles, group_pairs, tile_of
from ktfx.triton_kernels.halved_experts import halved_tiles
from ktfx.triton_kernels.integer_products import READY
from ktfx.triton_kernels.launch import cdiv, on_its_device, pow2
from ktfx.triton_kernels.matmul import (
    StoredWeight,
    accumulator,
    integer_run,
    load_inputs,
    multiply_both,
    multiply_rows,
    multiply_tile,
    row_inputs,
    scale_row,
    step_of,
    stored_weight,
    tile_shape,
)
from ktfx.triton_kernels.plain_experts import plain_tiles
from ktfx.triton_kernels.tile_results import pairs_inputs, store_down, store_up

from ktfx.ops.experts import ExpertsSpec
from ktfx.tuning import bucket, remembered


@triton.jit
def _pairs_up_kernel(
    x_ptr, xs_ptr, ids_ptr, w_ptr, s_ptr, z_ptr, b_ptr, h_ptr, next_ptr, next_s_ptr,
    E, H, inter, ldx, ldw, lds, alpha, limit, next_bytes, next_s_bytes,
    TOPK: tl.constexpr, L: tl.constexpr, FMT: tl.constexpr, G: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr,
    BIAS: tl.constexpr, NATIVE: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    X: tl.constexpr, LINES: tl.constexpr, S_LINES: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    # Behind the inputs' integers the choice of experts was written by a kernel that has ended, and weights can be read.
    if X != READY:
        wait_for_previous(DEPENDENT)
    s = tl.program_id(0)
    e = tl.load(ids_ptr + s).to(tl.int64)
    i = tl.program_id(1) * R + tl.arange(0, R)
    n = tl.arange(0, L)[:, None] * inter + i[None, :]
    # A tile of ids: the interpreter cannot splat a scalar mask.
    ok = (tl.zeros_like(n) + i[None, :] < inter) & (tl.zeros_like(n) + e >= 0) & (tl.zeros_like(n) + e < E)
    row, srow = e * (L * inter) + n, scale_row(e, n, L * inter, FMT)
    xrow = tl.zeros((1,), tl.int64) + s // TOPK
    acc = multiply_rows(
        accumulator(L, R, FMT, G, BK, X), w_ptr, s_ptr, z_ptr, row, srow, ok, x_ptr, xs_ptr, xrow, ldx, 0, H,
        ldw, lds, FMT, G, BK, NATIVE, X, DEPENDENT and X == READY,
    )  # fmt: skip
    for k0 in tl.range(BK, H, BK, num_stages=STAGES):
        acc = multiply_rows(
            acc, w_ptr, s_ptr, z_ptr, row, srow, ok, x_ptr, xs_ptr, xrow, ldx, k0, H, ldw, lds,
            FMT, G, BK, NATIVE, X,
        )  # fmt: skip
    if LINES > 0:
        there = tl.minimum(tl.maximum(e, 0), E - 1)
        prefetch_part(next_ptr, there, next_bytes, tl.program_id(1), LINES)
        prefetch_part(next_s_ptr, there, next_s_bytes, tl.program_id(1), S_LINES)
    y = tl.sum(acc, 2)
    if FMT == "int8":
        y *= tl.load(s_ptr + srow, mask=ok, other=0.0)
    if BIAS:
        y += tl.load(b_ptr + row, mask=ok, other=0.0).to(tl.float32)
    if L == 1:
        h = activation(tl.sum(y, 0), ACT)
    else:
        first = tl.arange(0, L)[:, None] == 0
        h = gated(tl.sum(tl.where(first, y, 0.0), 0), tl.sum(tl.where(first, 0.0, y), 0), ACT, GATE, alpha, limit)
    tl.store(h_ptr + s.to(tl.int64) * inter + i, narrow(h, h_ptr.dtype.element_ty), mask=i < inter)


@triton.jit
def _pairs_down_kernel(
    h_ptr, hs_ptr, ids_ptr, weights_ptr, w_ptr, s_ptr, z_ptr, b_ptr, out_ptr,
    E, H, inter, ldh, ldw, lds,
    TOPK: tl.constexpr, KP: tl.constexpr, FMT: tl.constexpr, G: tl.constexpr, BIAS: tl.constexpr, NATIVE: tl.constexpr,
    R: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    X: tl.constexpr, LINES: tl.constexpr = 0, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    t = tl.program_id(0)
    k = tl.arange(0, KP)
    e = tl.load(ids_ptr + t * TOPK + k, mask=k < TOPK, other=-1).to(tl.int64)
    valid = (e >= 0) & (e < E)
    weight = tl.load(weights_ptr + t * TOPK + k, mask=valid, other=0.0).to(tl.float32)
    n = tl.program_id(1) * R + tl.arange(0, R)
    ok = valid[:, None] & (n < H)[None, :]
    row, srow = e[:, None] * H + n[None, :], scale_row(e[:, None], n[None, :], H, FMT)
    # The kernels before, back to _pairs_up_kernel, let this one begin when the choice of experts was there to be read.
    if DEPENDENT and LINES > 0 and inter > BK:
        there = tl.minimum(tl.maximum(e, 0), E - 1)[:, None] * H + tl.minimum(n, H - 1)[None, :]
        prefetch_rows(w_ptr, tl.reshape(there, (KP * R,)), inter, ldw, LINES)
    xrow = (t * TOPK + tl.where(valid, k, 0)).to(tl.int64)
    acc = multiply_rows(
        accumulator(KP, R, FMT, G, BK, X), w_ptr, s_ptr, z_ptr, row, srow, ok, h_ptr, hs_ptr, xrow, ldh, 0, inter,
        ldw, lds, FMT, G, BK, NATIVE, X, DEPENDENT,
    )  # fmt: skip
    for i0 in tl.range(BK, inter, BK, num_stages=STAGES):
        acc = multiply_rows(
            acc, w_ptr, s_ptr, z_ptr, row, srow, ok, h_ptr, hs_ptr, xrow, ldh, i0, inter, ldw, lds,
            FMT, G, BK, NATIVE, X,
        )  # fmt: skip
    y = tl.sum(acc, 2)
    if FMT == "int8":
        y *= tl.load(s_ptr + srow, mask=ok, other=0.0)
    if BIAS:
        y += tl.load(b_ptr + row, mask=ok, other=0.0).to(tl.float32)
    out = tl.sum(tl.where(ok, y * weight[:, None], 0.0), 0)
    tl.store(out_ptr + t.to(tl.int64) * H + n, narrow(out, out_ptr.dtype.element_ty), mask=n < H)


@triton.jit
def _tile_up(
    x_ptr, order_ptr, w_ptr, s_ptr, z_ptr, b_ptr, h_ptr, e, first, count, n_tile,
    H, inter, ldw, lds, alpha, limit,
    TOPK: tl.constexpr, L: tl.constexpr, FMT: tl.constexpr, G: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr,
    BIAS: tl.constexpr, NATIVE: tl.constexpr, PAIRED: tl.constexpr, BM: tl.constexpr, MORE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """gate and up with the activation for ``count`` ≤ BM + MORE pairs from ``first`` on, all of expert e."""
    there, xrow = pairs_inputs(order_ptr, first, 0, count, H, TOPK, BM)
    # The rows of gate, then those of up, in one product: its sums of one place lie in one thread.
    part, i = tl.arange(0, L * BN) // BN, n_tile * BN + tl.arange(0, L * BN) % BN
    n, ok = part * inter + i, i < inter
    row, srow = e * (L * inter) + n, scale_row(e, n, L * inter, FMT)
    acc = tl.zeros((L * BN, BM), tl.float32)
    if MORE > 0:
        more_there, more_xrow = pairs_inputs(order_ptr, first, BM, count, H, TOPK, MORE)
        more = tl.zeros((L * BN, MORE), tl.float32)
        for k0 in tl.range(0, H, BK):
            x = load_inputs(x_ptr, xrow, there, k0, H, BK)
            x_more = load_inputs(x_ptr, more_xrow, more_there, k0, H, BK)
            acc, more = multiply_both(
                acc, more, x, x_more, w_ptr, s_ptr, z_ptr, row, srow, ok, k0, H, ldw, lds, FMT, G, BK, NATIVE, PAIRED
            )
        store_up(
            more, h_ptr, s_ptr, b_ptr, row, srow, ok, first, BM, count, n_tile, inter, alpha, limit,
            L, FMT, ACT, GATE, BIAS, BN,
        )  # fmt: skip
    else:
        for k0 in tl.range(0, H, BK):
            x = load_inputs(x_ptr, xrow, there, k0, H, BK)
            acc = multiply_tile(acc, x, w_ptr, s_ptr, z_ptr, row, srow, ok, k0, H, ldw, lds, FMT, G, BK, NATIVE, PAIRED)
    store_up(
        acc, h_ptr, s_ptr, b_ptr, row, srow, ok, first, 0, count, n_tile, inter, alpha, limit,
        L, FMT, ACT, GATE, BIAS, BN,
    )  # fmt: skip


@triton.jit
def _tiles_up_kernel(
    x_ptr, order_ptr, tiles_ptr, w_ptr, s_ptr, z_ptr, b_ptr, h_ptr,
    H, inter, ldw, lds, alpha, limit, max_tiles, n_tiles,
    TOPK: tl.constexpr, L: tl.constexpr, FMT: tl.constexpr, G: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr,
    BIAS: tl.constexpr, NATIVE: tl.constexpr, PAIRED: tl.constexpr, BM: tl.constexpr, MORE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    e, first, count, n_tile = tile_of(tiles_ptr, max_tiles, n_tiles, GROUP)
    if count <= 0:
        return
    e = e.to(tl.int64)
    # An expert's last tile is half empty half the time.
    if BM > 16 and count <= BM // 2:
        _tile_up(
            x_ptr, order_ptr, w_ptr, s_ptr, z_ptr, b_ptr, h_ptr, e, first, count, n_tile,
            H, inter, ldw, lds, alpha, limit, TOPK, L, FMT, G, ACT, GATE, BIAS, NATIVE, PAIRED, BM // 2, 0, BN, BK,
        )  # fmt: skip
    elif MORE == 0 or count <= BM:
        _tile_up(
            x_ptr, order_ptr, w_ptr, s_ptr, z_ptr, b_ptr, h_ptr, e, first, count, n_tile,
            H, inter, ldw, lds, alpha, limit, TOPK, L, FMT, G, ACT, GATE, BIAS, NATIVE, PAIRED, BM, 0, BN, BK,
        )  # fmt: skip
    else:
        _tile_up(
            x_ptr, order_ptr, w_ptr, s_ptr, z_ptr, b_ptr, h_ptr, e, first, count, n_tile,
            H, inter, ldw, lds, alpha, limit, TOPK, L, FMT, G, ACT, GATE, BIAS, NATIVE, PAIRED, BM, MORE, BN, BK,
        )  # fmt: skip


@triton.jit
def _tile_down(
    h_ptr, order_ptr, w_ptr, s_ptr, z_ptr, b_ptr, y_ptr, e, first, count, n_tile,
    H, inter, ldw, lds,
    FMT: tl.constexpr, G: tl.constexpr, BIAS: tl.constexpr, NATIVE: tl.constexpr, PAIRED: tl.constexpr,
    BM: tl.constexpr, MORE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """down for ``count`` ≤ BM + MORE pairs from ``first`` on, all of expert e, to the pairs' own places."""
    m = tl.arange(0, BM)
    there = m < count
    n = n_tile * BN + tl.arange(0, BN)
    ok = n < H
    row, srow = e * H + n, scale_row(e, n, H, FMT)
    hrow = (first + m).to(tl.int64) * inter
    acc = tl.zeros((BN, BM), tl.float32)
    if MORE > 0:
        m_more = BM + tl.arange(0, MORE)
        more_there, more_hrow = m_more < count, (first + m_more).to(tl.int64) * inter
        more = tl.zeros((BN, MORE), tl.float32)
        for i0 in tl.range(0, inter, BK):
            h = load_inputs(h_ptr, hrow, there, i0, inter, BK)
            h_more = load_inputs(h_ptr, more_hrow, more_there, i0, inter, BK)
            acc, more = multiply_both(
                acc, more, h, h_more, w_ptr, s_ptr, z_ptr, row, srow, ok, i0, inter, ldw, lds,
                FMT, G, BK, NATIVE, PAIRED,
            )  # fmt: skip
        store_down(more, order_ptr, y_ptr, s_ptr, b_ptr, row, srow, ok, n, first, BM, count, H, FMT, BIAS)
    else:
        for i0 in tl.range(0, inter, BK):
            h = load_inputs(h_ptr, hrow, there, i0, inter, BK)
            acc = multiply_tile(
                acc, h, w_ptr, s_ptr, z_ptr, row, srow, ok, i0, inter, ldw, lds, FMT, G, BK, NATIVE, PAIRED
            )
    store_down(acc, order_ptr, y_ptr, s_ptr, b_ptr, row, srow, ok, n, first, 0, count, H, FMT, BIAS)


@triton.jit
def _tiles_down_kernel(
    h_ptr, order_ptr, tiles_ptr, w_ptr, s_ptr, z_ptr, b_ptr, y_ptr,
    H, inter, ldw, lds, max_tiles, n_tiles,
    FMT: tl.constexpr, G: tl.constexpr, BIAS: tl.constexpr, NATIVE: tl.constexpr, PAIRED: tl.constexpr,
    BM: tl.constexpr, MORE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    e, first, count, n_tile = tile_of(tiles_ptr, max_tiles, n_tiles, GROUP)
    if count <= 0:
        return
    e = e.to(tl.int64)
    if BM > 16 and count <= BM // 2:
        _tile_down(
            h_ptr, order_ptr, w_ptr, s_ptr, z_ptr, b_ptr, y_ptr, e, first, count, n_tile,
            H, inter, ldw, lds, FMT, G, BIAS, NATIVE, PAIRED, BM // 2, 0, BN, BK,
        )  # fmt: skip
    elif MORE == 0 or count <= BM:
        _tile_down(
            h_ptr, order_ptr, w_ptr, s_ptr, z_ptr, b_ptr, y_ptr, e, first, count, n_tile,
            H, inter, ldw, lds, FMT, G, BIAS, NATIVE, PAIRED, BM, 0, BN, BK,
        )  # fmt: skip
    else:
        _tile_down(
            h_ptr, order_ptr, w_ptr, s_ptr, z_ptr, b_ptr, y_ptr, e, first, count, n_tile,
            H, inter, ldw, lds, FMT, G, BIAS, NATIVE, PAIRED, BM, MORE, BN, BK,
        )  # fmt: skip


@triton.jit
def _combine_kernel(y_ptr, ids_ptr, weights_ptr, out_ptr, E, H, TOPK: tl.constexpr, KP: tl.constexpr, BH: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, KP)
    e = tl.load(ids_ptr + t * TOPK + k, mask=k < TOPK, other=-1)
    valid = (e >= 0) & (e < E)
    weight = tl.load(weights_ptr + t * TOPK + k, mask=valid, other=0.0).to(tl.float32)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    y = tl.load(y_ptr + (t * TOPK + k)[:, None] * H + h[None, :], mask=valid[:, None] & (h < H)[None, :], other=0.0)
    out = tl.sum(y.to(tl.float32) * weight[:, None], 0)
    tl.store(out_ptr + t * H + h, narrow(out, out_ptr.dtype.element_ty), mask=h < H)


@dataclass(frozen=True)
class PairsConfig:
    """R rows a program (of gate and up each, or of down), BK values of k a step."""

    R: int
    BK: int
    num_warps: int
    STAGES: int = 1


@dataclass(frozen=True)
class TilesConfig:
    """BM pairs and BN weight rows a tile, BK values of k a step, GROUP tiles that share weight rows in L2.

    MORE: pairs that a tile takes beyond BM where that saves their expert a tile. tma: by ``plain_experts``, halves: by
    ``halved_experts``, where both weights and the inputs allow it.
    """

    BM: int
    BN: int
    BK: int
    GROUP: int
    num_warps: int
    num_stages: int
    MORE: int = 0
    tma: bool = False
    halves: bool = False


# Of mxfp4 programs make integers of their inputs themselves up to so many tokens: its look-ups leave no room for more.
MADE_FOR_MXFP4 = 4

PairsPair = tuple[PairsConfig, PairsConfig]
TilesPair = tuple[TilesConfig, TilesConfig]


def pairs_config(weight: StoredWeight, K: int, leading: int, dtype: torch.dtype, T: int = 1) -> PairsConfig:
    """leading: how many weight rows each of the R rows stands for (2 for gate and up, K chosen for down).

    By sweeps on one H100 over the shapes of Qwen3-30B-A3B, gpt-oss-20b, DeepSeek-V2-Lite and DeepSeek-V3.
    """
    rows = pow2(leading)
    if weight.small_integers and dtype.itemsize == 2:
        return _integer_pairs_config(weight, rows, T)
    BK = step_of(K, (512, 256, 128)) if K > 128 else max(pow2(K), 16)
    if weight.grouped:
        BK = max(BK, weight.group)
    return PairsConfig(R=4 if leading <= 4 else max(1, 16 // rows), BK=BK, num_warps=max(1, min(4, BK // 128)))


def _integer_pairs_config(weight: StoredWeight, rows: int, T: int) -> PairsConfig:
    """``pairs_config`` where products are in integers, by sweeps on one H200 (mxfp4 of more tokens: on one H100)."""
    run, int8, mxfp4 = integer_run(weight), weight.fmt == "int8", weight.fmt == "mxfp4"
    if rows <= 2:
        narrow = T == 1 or int8 or (mxfp4 and T <= MADE_FOR_MXFP4)
        return PairsConfig(R=(4 if narrow else 8) // rows, BK=2 * run if T == 1 and int8 else run, num_warps=1)
    if T == 1:
        # mxfp4's look-ups keep more in registers: fewer, longer programs.
        return PairsConfig(R=4 if int8 else 8, BK=run, num_warps=max(4, min(16, rows // 2 if mxfp4 else rows)))
    if int8 or (mxfp4 and T > MADE_FOR_MXFP4):
        return PairsConfig(R=4, BK=run // 2, num_warps=max(1, rows // 2))
    return PairsConfig(R=8, BK=run // 2 if rows > 4 else run, num_warps=max(4, rows // 2))


def asked_ahead(down: StoredWeight, H: int, K: int, programs: int) -> tuple[int, int]:
    """Lines of 128 bytes of down's rows and scales that each program of gate and up, of an expert, asks for ahead.

    mxfp4's gate and up are bound by instructions and leave memory idle. Other formats' gain nothing, and lose where
    down is large.
    """
    if down.fmt != "mxfp4" or K * H * down.row_bytes > 32 << 20:
        return 0, 0
    return cdiv(H * down.row_bytes, 128 * programs), cdiv(H * down.scale_row_bytes, 128 * programs)


def tiles_config(weight: StoredWeight, rows_an_expert: float, dtype: torch.dtype, parts: int) -> TilesConfig:
    """parts: how many weight rows each of the BN rows stands for (2 for gate and up)."""
    BM = 16 if rows_an_expert <= 16 else 32 if rows_an_expert <= 32 else 64 if rows_an_expert <= 96 else 128
    shape = tile_shape(weight, dtype, BM, parts)
    more = 16 if BM >= 64 and weight.fmt != "model" and dtype.itemsize == 2 else 0
    config = TilesConfig(BM, shape.BN, shape.BK, 8, shape.num_warps, shape.num_stages, more)
    if BM < 128 or not weight.takes_tma(dtype):
        return config
    return replace(config, BN=256 // parts, num_stages=4, tma=True)


def halves_config(weight: StoredWeight, rows_an_expert: float, parts: int) -> TilesConfig:
    """For ``halved_experts``: programs of four warps, of which a multiprocessor takes two.

    By sweeps on one H100 over the shapes of Qwen3-30B-A3B, gpt-oss-20b, DeepSeek-V2-Lite and DeepSeek-V3, 4 to 8192
    tokens; fp8's sums of a step leave no registers for MORE.
    """
    BM = 32 if rows_an_expert <= 16 else 64
    more = 16 if BM == 64 and weight.fmt == "int8" else 0
    return TilesConfig(BM, 128 // parts, 128, 8, 4, 3, more, halves=True)


def weight_of(spec: ExpertsSpec, packed: Sequence[torch.Tensor], which: int) -> StoredWeight:
    """gate_up (0) or down (1) of what ``ktfx.ops.experts_triton.pack`` made."""
    many = (len(packed) - 2 * spec.has_bias) // 2
    return stored_weight(spec.weights, packed[which * many : (which + 1) * many])


def tiles_choice(spec: ExpertsSpec, packed: Sequence[torch.Tensor], rows: float, dtype: torch.dtype) -> TilesPair:
    up, down, parts = weight_of(spec, packed, 0), weight_of(spec, packed, 1), spec.up_parts
    if up.takes_halves(dtype) and down.takes_halves(dtype):
        return halves_config(up, rows, parts), halves_config(down, rows, 1)
    return tiles_config(up, rows, dtype, parts), tiles_config(down, rows, dtype, 1)


def default_configs(
    spec: ExpertsSpec,
    packed: Sequence[torch.Tensor],
    T: int,
    K: int,
    pairs: bool,
    E: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> PairsPair | TilesPair:
    """What a call with T tokens runs with; E: the experts to reckon with, if not those of ``spec``."""
    if pairs:
        up, down = weight_of(spec, packed, 0), weight_of(spec, packed, 1)
        up_config = pairs_config(up, spec.hidden, spec.up_parts, dtype, T)
        return up_config, pairs_config(down, spec.intermediate, K, dtype, T)
    return tiles_choice(spec, packed, T * K / min(T * K, E or spec.num_experts), dtype)


def tuning_key(spec: ExpertsSpec, T: int, K: int, pairs: bool, dtype: torch.dtype) -> str:
    """The line under which ``ktfx.tuning`` keeps what a sweep found for such a call."""
    shape = f"E{spec.num_experts} H{spec.hidden} I{spec.intermediate} K{K} {spec.gate}"
    return f"experts {'pairs' if pairs else 'tiles'} {spec.weights} {shape} T{bucket(T)} {str(dtype)[6:]}"


def tuned_configs(
    spec: ExpertsSpec, packed: Sequence[torch.Tensor], T: int, K: int, pairs: bool, x: torch.Tensor
) -> PairsPair | TilesPair | None:
    """What a sweep remembered for such a call, if one ran on this kind of GPU and it still fits the weights."""
    found = remembered(tuning_key(spec, T, K, pairs, x.dtype), x.device)
    if found is None or len(found) != 2:
        return None
    kind = PairsConfig if pairs else TilesConfig
    try:
        first, second = (kind(**one) for one in found)
    except TypeError:  # written by a version with other fields
        return None
    good = all(fits(c, weight_of(spec, packed, i), first) for i, c in enumerate((first, second)))
    return (first, second) if good else None  # type: ignore[return-value]


def neighbours(config: PairsConfig | TilesConfig) -> list[PairsConfig | TilesConfig]:
    """What a sweep tries beside a configuration: one field halved or doubled, and BK with the warps over it."""
    if isinstance(config, PairsConfig):
        steps = [(f, 1) for f in (0.5, 2)] + [(1, f) for f in (0.5, 2)] + [(0.5, 0.5), (2, 2)]
        found: list[PairsConfig | TilesConfig] = [replace(config, R=int(config.R * f)) for f in (0.5, 2)]
        found += [replace(config, BK=int(config.BK * b), num_warps=int(config.num_warps * w)) for b, w in steps]
        return [c for c in found if isinstance(c, PairsConfig) and min(c.R, c.num_warps) >= 1 and c.num_warps <= 16]
    c = config
    tiles = [replace(c, BN=int(c.BN * f)) for f in (0.5, 2)] + [replace(c, BK=int(c.BK * f)) for f in (0.5, 2)]
    tiles += [replace(c, num_stages=c.num_stages + d) for d in (-1, 1)] + [replace(c, num_warps=12 - c.num_warps)]
    # Two programs a multiprocessor, where one unpacks while the other multiplies.
    tiles += [replace(c, BN=int(c.BN * f), num_warps=int(c.num_warps * f)) for f in (0.5, 2)]
    tiles = [t for t in tiles if t.BN >= 32 and t.BK >= 32 and t.num_warps in (4, 8)]
    longest = 64 if c.tma else 128 if c.halves else 1 << 30
    return [t for t in tiles if longest >= t.BK and (not t.tma or t.BN <= 256)]


def fits(config: PairsConfig | TilesConfig, weight: StoredWeight, first: PairsConfig | TilesConfig) -> bool:
    """Whether a candidate makes sense for a weight (whole groups a step) beside the first kernel's block of pairs."""
    if isinstance(config, TilesConfig):
        serves = weight.whole_groups(config.BK) and (not config.tma or weight.takes_tma(weight.data.dtype))
        # What was remembered was remembered for a dtype, so this one stands for those that can be halved.
        serves = serves and (not config.halves or weight.takes_halves(torch.bfloat16))
        return serves and isinstance(first, TilesConfig) and config.BM == first.BM
    return weight.group <= config.BK and config.BK % max(weight.group, 1) == 0


def prefer_pairs(T: int, E: int, K: int, weight: StoredWeight, dtype: torch.dtype) -> bool:
    """Whether so few pairs share an expert that multiplying each for itself costs little.

    Pairs of one expert run beside each other, so that memory is read once for them; what they cost is arithmetic, of
    which products in integers need least. The shares of distinct experts are those at which one H100 took as long
    either way, over the shapes of Qwen3-30B-A3B, gpt-oss-20b and DeepSeek-V2-Lite.
    """
    integers = weight.small_integers and dtype.itemsize == 2
    least = 0.8 if not integers else 0.44 if weight.nibbles else 0.6
    pairs, most = T * K, 256 if integers else 128
    distinct = E * (1 - (1 - K / E) ** T)
    return pairs <= most and (T == 1 or distinct / pairs > least)


@on_its_device
def routed_experts(
    spec: ExpertsSpec,
    x_TH: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    packed: Sequence[torch.Tensor],
    pairs: bool | None = None,
    configs: PairsPair | TilesPair | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """(T, H) → (T, H) in x's dtype; sums in float32. Ids outside [0, E) contribute nothing.

    packed: gate_up's tensors, then down's, then the two biases if there are any (``ktfx.ops.experts_triton``).
    pairs and configs force a path and its two configurations (tuning, tests); out: where to write, contiguous.
    """
    T, K = x_TH.shape[0], ids_TK.shape[1]
    out = torch.empty_like(x_TH, memory_format=torch.contiguous_format) if out is None else out
    if T == 0:
        return out
    if K == 0:
        return out.zero_()
    up, down = weight_of(spec, packed, 0), weight_of(spec, packed, 1)
    biases = packed[-2:] if spec.has_bias else (up.data, down.data)
    x, ids, weights = x_TH.contiguous(), ids_TK.contiguous(), weights_TK.contiguous()
    use_pairs = prefer_pairs(T, spec.num_experts, K, up, x.dtype) if pairs is None else pairs
    chosen = configs or tuned_configs(spec, packed, T, K, use_pairs, x)
    chosen = chosen or default_configs(spec, packed, T, K, use_pairs, dtype=x.dtype)
    run = _run_pairs if use_pairs else _run_tiles
    run(spec, x, ids, weights, up, down, biases, out, *chosen)
    return out


def _run_pairs(
    spec: ExpertsSpec, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, up: StoredWeight,
    down: StoredWeight, biases: Sequence[torch.Tensor], out: torch.Tensor, first: PairsConfig, second: PairsConfig,
) -> None:  # fmt: skip
    (T, H), K, inter, E = x.shape, ids.shape[1], spec.intermediate, spec.num_experts
    L = spec.up_parts
    h = torch.empty(T * K, inter, dtype=x.dtype, device=x.device)
    # Not early: the kernel before may be the router.
    made, programs = up.fmt != "mxfp4" or T <= MADE_FOR_MXFP4, cdiv(inter, first.R)
    xs = row_inputs(x, up, made)
    lines = asked_ahead(down, H, K, programs) if T == 1 and dependent(x.device) else (0, 0)
    _pairs_up_kernel[(T * K, programs)](
        xs.data, xs.scales, ids, up.data, up.scales, up.zeros, biases[0], h, down.data, down.scales,
        E, H, inter, xs.ldx, up.ldw, up.lds, spec.alpha, spec.limit, H * down.row_bytes, H * down.scale_row_bytes,
        TOPK=K, L=L, ACT=spec.activation, GATE=spec.gate, R=first.R, BK=first.BK, STAGES=first.STAGES,
        X=xs.kind, LINES=lines[0], S_LINES=lines[1],
        num_warps=first.num_warps, BIAS=spec.has_bias, **dependent(x.device), **up.constants(),
    )  # fmt: skip
    hs = row_inputs(h, down, made, early=True)
    _pairs_down_kernel[(T, cdiv(H, second.R))](
        hs.data, hs.scales, ids, weights, down.data, down.scales, down.zeros, biases[1], out,
        E, H, inter, hs.ldx, down.ldw, down.lds,
        TOPK=K, KP=pow2(K), R=second.R, BK=second.BK, STAGES=second.STAGES,
        X=hs.kind, LINES=down.lines,
        num_warps=second.num_warps, BIAS=spec.has_bias, **dependent(x.device), **down.constants(),
    )  # fmt: skip


def _run_tiles(
    spec: ExpertsSpec, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, up: StoredWeight,
    down: StoredWeight, biases: Sequence[torch.Tensor], out: torch.Tensor, first: TilesConfig, second: TilesConfig,
) -> None:  # fmt: skip
    (T, H), K, inter, E = x.shape, ids.shape[1], spec.intermediate, spec.num_experts
    S = T * K
    if second.BM != first.BM:
        second = replace(second, BM=first.BM)  # both walk the same tiles
    tma, halves = first.tma and second.tma, first.halves and second.halves
    grouped = group_pairs(ids, E, first.BM, 0 if tma else first.MORE)
    h = torch.empty(S, inter, dtype=x.dtype, device=x.device)
    y = torch.empty(S, H, dtype=x.dtype, device=x.device)
    run = plain_tiles if tma else halved_tiles if halves else _stored_tiles
    run(spec, x, K, grouped, up, down, biases, h, y, first, second)
    BH = min(1024, pow2(H))
    _combine_kernel[(T, cdiv(H, BH))](y, ids, weights, out, E, H, TOPK=K, KP=pow2(K), BH=BH, num_warps=4)


def _stored_tiles(
    spec: ExpertsSpec, x: torch.Tensor, K: int, grouped: PairTiles, up: StoredWeight, down: StoredWeight,
    biases: Sequence[torch.Tensor], h: torch.Tensor, y: torch.Tensor, first: TilesConfig, second: TilesConfig,
) -> None:  # fmt: skip
    """h (S, I) and y (S, H) of all pairs, for weights in any format."""
    H, inter, L = spec.hidden, spec.intermediate, spec.up_parts
    n_tiles = cdiv(inter, first.BN)
    _tiles_up_kernel[(grouped.max_tiles * n_tiles,)](
        x, grouped.order, grouped.tiles, up.data, up.scales, up.zeros, biases[0], h,
        H, inter, up.ldw, up.lds, spec.alpha, spec.limit, grouped.max_tiles, n_tiles,
        TOPK=K, L=L, ACT=spec.activation, GATE=spec.gate, BM=first.BM, MORE=first.MORE, BN=first.BN, GROUP=first.GROUP,
        num_warps=first.num_warps, num_stages=first.num_stages, BIAS=spec.has_bias, **up.tile_constants(x, first.BK),
    )  # fmt: skip
    n_tiles = cdiv(H, second.BN)
    _tiles_down_kernel[(grouped.max_tiles * n_tiles,)](
        h, grouped.order, grouped.tiles, down.data, down.scales, down.zeros, biases[1], y,
        H, inter, down.ldw, down.lds, grouped.max_tiles, n_tiles,
        BM=second.BM, MORE=first.MORE, BN=second.BN, GROUP=second.GROUP,
        num_warps=second.num_warps, num_stages=second.num_stages, BIAS=spec.has_bias,
        **down.tile_constants(h, second.BK),
    )  # fmt: skip

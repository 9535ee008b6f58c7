"""y = x·Wᵀ + b over a stored weight: rows for few inputs, tiles split along the reduction for more.

Decode has few output rows and a long reduction, so tiles alone would leave most multiprocessors idle: the reduction is
split over SPLIT programs that write float32 partial sums, and a second kernel adds them in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.dependent_launch import dependent
from ktfx.triton_kernels.dequant import narrow
from ktfx.triton_kernels.halved_linear import halved_linear
from ktfx.triton_kernels.launch import cdiv, interpreted, on_its_device, pow2, sm_count
from ktfx.triton_kernels.matmul import (
    StoredWeight,
    accumulator,
    integer_run,
    load_inputs,
    multiply_rows,
    multiply_tile,
    row_inputs,
    scale_row,
    step_of,
    stored_weight,
    tile_shape,
)
from ktfx.triton_kernels.tile_results import linear_tile, store_linear


@triton.jit
def _rows_kernel(
    x_ptr, xs_ptr, w_ptr, s_ptr, z_ptr, b_ptr, y_ptr, M, N, K, ldx, ldw, lds,
    FMT: tl.constexpr, G: tl.constexpr, BIAS: tl.constexpr, NATIVE: tl.constexpr,
    BM: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, X: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * R + tl.arange(0, R)
    row, ok = n[None, :].to(tl.int64), (n < N)[None, :]
    srow = scale_row(tl.zeros((1, 1), tl.int64), row, N, FMT)
    xrow = tl.minimum(m, M - 1).to(tl.int64)
    acc = multiply_rows(
        accumulator(BM, R, FMT, G, BK, X), w_ptr, s_ptr, z_ptr, row, srow, ok, x_ptr, xs_ptr, xrow, ldx, 0, K,
        ldw, lds, FMT, G, BK, NATIVE, X, DEPENDENT,
    )  # fmt: skip
    for k0 in tl.range(BK, K, BK, num_stages=STAGES):
        acc = multiply_rows(
            acc, w_ptr, s_ptr, z_ptr, row, srow, ok, x_ptr, xs_ptr, xrow, ldx, k0, K, ldw, lds,
            FMT, G, BK, NATIVE, X,
        )  # fmt: skip
    y = tl.sum(acc, 2)
    if FMT == "int8":
        y *= tl.load(s_ptr + n, mask=n < N, other=0.0)[None, :]
    if BIAS:
        y += tl.load(b_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr + at, narrow(y, y_ptr.dtype.element_ty), mask=(m < M)[:, None] & ok)


@triton.jit
def _tiles_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, b_ptr, y_ptr, M, N, K, ldx, ldw, lds, span,
    FMT: tl.constexpr, G: tl.constexpr, BIAS: tl.constexpr, NATIVE: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    m_first, n_first = linear_tile(M, N, BM, BN, GROUP)
    m, n = m_first + tl.arange(0, BM), n_first + tl.arange(0, BN)
    there, ok = m < M, n < N
    xrow = m.to(tl.int64) * ldx
    row = n.to(tl.int64)
    srow = scale_row(tl.zeros((1,), tl.int64), row, N, FMT)
    acc = tl.zeros((BN, BM), tl.float32)
    for k0 in tl.range(part * span, tl.minimum((part + 1) * span, K), BK):
        x = load_inputs(x_ptr, xrow, there, k0, K, BK)
        acc = multiply_tile(acc, x, w_ptr, s_ptr, z_ptr, row, srow, ok, k0, K, ldw, lds, FMT, G, BK, NATIVE, PAIRED)
    store_linear(acc, y_ptr, s_ptr, b_ptr, m, n, M, N, part, FMT, BIAS, SPLIT)


@triton.jit
def _add_parts_kernel(parts_ptr, b_ptr, y_ptr, MN, N, BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLIT):
        y += tl.load(parts_ptr + part * MN + at, mask=at < MN, other=0.0)
    if BIAS:
        y += tl.load(b_ptr + at % N, mask=at < MN, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, narrow(y, y_ptr.dtype.element_ty), mask=at < MN)


@dataclass(frozen=True)
class LinearConfig:
    """rows: one program for BM inputs and R output rows; else tiles of BM inputs by BN rows over a SPLIT reduction.

    halves: tiles by ``halved_linear``, where weights and inputs allow it.
    """

    rows: bool
    R: int = 4
    BM: int = 16
    BN: int = 64
    BK: int = 64
    SPLIT: int = 1
    GROUP: int = 8
    num_warps: int = 4
    num_stages: int = 4
    halves: bool = False


def linear_config(weight: StoredWeight, M: int, N: int, K: int, dtype: torch.dtype) -> LinearConfig:
    """A choice by shape alone; ``ktfx.tuning`` may know a better one."""
    if M <= 4 and weight.small_integers and dtype.itemsize == 2:
        run = integer_run(weight)
        BK = step_of(K, (4 * run, 2 * run, run))
        R = 8 if weight.fmt == "int8" and N >= 4096 and M <= 2 else 4
        return LinearConfig(True, R=R, BM=pow2(M), BK=BK, num_warps=BK // run, num_stages=1)
    if M <= 2:
        BK = min(1024 if weight.nibbles else 512, max(pow2(K), 16))
        return LinearConfig(True, R=4, BM=1, BK=max(BK, weight.group), num_stages=1)
    if M > 16 and weight.takes_halves(dtype):
        tiles = cdiv(M, 64) * cdiv(N, 128)
        split = max(1, min(2 * sm_count(weight.data.device) // tiles, K // 256, 16))
        return LinearConfig(False, BM=64, BN=128, BK=128, SPLIT=split, num_warps=4, num_stages=3, halves=True)
    BM = 16 if M <= 16 else 32 if M <= 32 else 64 if M <= 64 else 128
    shape = tile_shape(weight, dtype, BM)
    tiles = cdiv(M, BM) * cdiv(N, shape.BN)
    # Four programs a multiprocessor keep the memory busy; no part shorter than 256.
    split = max(1, min(4 * sm_count(weight.data.device) // tiles, K // 256, 16)) if BM <= 64 else 1
    return LinearConfig(False, BM=BM, SPLIT=split, **asdict(shape))


@on_its_device
def linear(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    weights: str,
    N: int,
    config: LinearConfig | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (…, K), tensors: ``QuantizedWeight.tensors()`` of a weight (N, K) in the format ``weights``; returns (…, N)."""
    K = x.shape[-1]
    flat = x.reshape(-1, K)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    M = flat.shape[0]
    y = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device) if out is None else out
    if M == 0:
        return y
    weight = stored_weight(weights, tensors)
    if weight.fmt == "model" and M > 2 and config is None and not interpreted():
        # A plain weight leaves nothing to fuse: the vendor's matmul is as fast for few rows, and faster for many.
        plain = torch.nn.functional.linear(flat, weight.data.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return y.view(M, N).copy_(plain).view_as(y) if out is not None else plain.view(y.shape)
    c = config or linear_config(weight, M, N, K, x.dtype)
    b = weight.data if bias is None else bias
    if c.rows:
        # Each program makes integers of x itself; of more rows, or beside mxfp4's look-ups, that is too much work.
        inputs = row_inputs(flat, weight, made=M == 1 and weight.fmt != "mxfp4", early=True)
        _rows_kernel[(cdiv(M, c.BM), cdiv(N, c.R))](
            inputs.data, inputs.scales, weight.data, weight.scales, weight.zeros, b, y,
            M, N, K, inputs.ldx, weight.ldw, weight.lds,
            BM=c.BM, R=c.R, BK=c.BK, STAGES=c.num_stages, X=inputs.kind, num_warps=c.num_warps,
            BIAS=bias is not None, **dependent(x.device), **weight.constants(),
        )  # fmt: skip
        return y
    span = cdiv(cdiv(K, c.SPLIT), max(c.BK, weight.group)) * max(c.BK, weight.group)  # parts begin at whole groups
    split = cdiv(K, span)
    c = replace(c, SPLIT=split)
    target = torch.empty(split, M, N, dtype=torch.float32, device=x.device) if split > 1 else y
    if c.halves:
        halved_linear(flat, weight, b, bias is not None, target, c, span)
    else:
        _tiles(flat, weight, b, bias is not None, target, c, span)
    if split > 1:
        _add_parts_kernel[(cdiv(M * N, 1024),)](target, b, y, M * N, N, BIAS=bias is not None, SPLIT=split, BLOCK=1024)
    return y


def _tiles(
    x: torch.Tensor, weight: StoredWeight, bias: torch.Tensor, has_bias: bool, y: torch.Tensor, c: LinearConfig,
    span: int,
) -> None:  # fmt: skip
    """What ``halved_linear`` does, for weights in any format."""
    (M, K), N = x.shape, y.shape[-1]
    _tiles_kernel[(cdiv(M, c.BM) * cdiv(N, c.BN), c.SPLIT)](
        x, weight.data, weight.scales, weight.zeros, bias, y,
        M, N, K, x.stride(0), weight.ldw, weight.lds, span,
        SPLIT=c.SPLIT, BM=c.BM, BN=c.BN, GROUP=c.GROUP, num_warps=c.num_warps, num_stages=c.num_stages,
        BIAS=has_bias, **weight.tile_constants(x, c.BK),
    )  # fmt: skip

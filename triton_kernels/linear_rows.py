"""y = x·Wᵀ + b for one or two rows of x and up to four weights that read it, in one launch, read where they lie.

One program works out R outputs of one weight. Nothing is split along the reduction: R rows of K values are enough work
for a program, and N / R programs are enough for every multiprocessor. The weights' rows are read, or asked for, before
the kernel that writes x has ended (``dependent_launch``).

The norm before can be done here: each program works it out for itself, from rows that are in the cache, while its
weights are on their way; the first one writes it down for others. That costs less than a kernel of its own. Nor does
what follows need one: a program that has a gate's and up's rows side by side writes act(gate)·up, and one of a layer
whose result is only added to another writes the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.dependent_launch import dependent, prefetch_rows, wait_for_previous
from ktfx.triton_kernels.dequant import gated, narrow
from ktfx.triton_kernels.launch import cdiv, on_its_device, pow2, sm_count
from ktfx.triton_kernels.norms import normed

from ktfx.ops.linear_rows import MOST_WEIGHTS, empty_norm_results, empty_results

Item = TypeVar("Item")


@triton.jit
def _input(x_ptr, r_ptr, m, k, K, ldx, ADD: tl.constexpr):
    """x[m, k], or its sum with the residual as their dtype rounds it; float32."""
    x = tl.load(x_ptr + m.to(tl.int64) * ldx + k, mask=k < K, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(r_ptr + m.to(tl.int64) * K + k, mask=k < K, other=0.0).to(tl.float32)
        x = narrow(x, x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _outputs(
    block, m, x_ptr, r_ptr, g_ptr, normed_ptr, sum_ptr, w_ptr, up_ptr, b_ptr, up_b_ptr, y_ptr, addend_ptr, share_ptr,
    N, K, ldx, eps,
    KIND: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, ADDEND: tl.constexpr,
    SHARE: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, ONCE: tl.constexpr, LINES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """y[m, n] for R values of n. w (N, K) and y (M, N) contiguous. KIND: of the norm before, of weight g, or empty.

    ACT: rows of w, a gate's, and of up alternate, and y = act(gate)·up for R / 2 values of n; or empty. ADDEND, SHARE:
    y is added to addend (M, N), times the sigmoid of share (M,). ONCE: BK holds all of K, and the weight is read, not
    only asked for, before the kernel before has ended.
    """
    DT: tl.constexpr = x_ptr.dtype.element_ty
    PER: tl.constexpr = R if ACT == "" else R // 2
    n = block * PER + tl.arange(0, PER)
    at = tl.arange(0, BK)
    if ACT == "":
        row = tl.minimum(n, N - 1).to(tl.int64)
        w_rows, b_rows = w_ptr + row * K, b_ptr + row
    else:
        r = tl.arange(0, R)
        row = tl.minimum(block * PER + r // 2, N - 1).to(tl.int64)
        w_rows, b_rows = _either(r % 2 == 1, w_ptr, up_ptr) + row * K, _either(r % 2 == 1, b_ptr, up_b_ptr) + row
    if ONCE:
        w_once = tl.load(w_rows[:, None] + at[None, :], mask=(at < K)[None, :], other=0.0)
        if KIND != "":
            g_once = tl.load(g_ptr + at, mask=at < K, other=0.0).to(tl.float32)
    elif DEPENDENT and LINES > 0:
        first_rows = tl.minimum(n, N - 1).to(tl.int64)
        prefetch_rows(w_ptr, first_rows, K, K, LINES)
        if ACT != "":
            prefetch_rows(up_ptr, first_rows, K, K, LINES)
    wait_for_previous(DEPENDENT)
    if ADDEND:
        addend = tl.load(addend_ptr + m.to(tl.int64) * N + n, mask=n < N, other=0.0).to(tl.float32)
        if SHARE:
            share = tl.sigmoid(tl.load(share_ptr + m).to(tl.float32))
    if KIND != "":
        if ONCE:
            x_once = _input(x_ptr, r_ptr, m, at, K, ldx, ADD)
            squares = x_once * x_once
        else:
            squares = tl.zeros((BK,), tl.float32)
            for k0 in tl.range(0, K, BK):
                x = _input(x_ptr, r_ptr, m, k0 + at, K, ldx, ADD)
                squares += x * x
        scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    first = tl.program_id(0) == 0
    acc = tl.zeros((R, BK), tl.float32)
    for k0 in tl.range(0, 1 if ONCE else K, BK):
        k = k0 + at
        w = w_once if ONCE else tl.load(w_rows[:, None] + k[None, :], mask=(k < K)[None, :], other=0.0)
        if KIND != "":
            x = x_once if ONCE else _input(x_ptr, r_ptr, m, k, K, ldx, ADD)
            g = g_once if ONCE else tl.load(g_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            y = normed(x, scale, g, KIND, DT)
            if first:
                tl.store(normed_ptr + m.to(tl.int64) * K + k, y, mask=k < K)
                if ADD:
                    tl.store(sum_ptr + m.to(tl.int64) * K + k, narrow(x, DT), mask=k < K)
            x = y.to(tl.float32)
        else:
            x = _input(x_ptr, r_ptr, m, k, K, ldx, ADD)
        acc += w.to(tl.float32) * x[None, :]
    y = tl.sum(acc, 1)
    if BIAS:
        y += tl.load(b_rows).to(tl.float32)
    if ACT != "":
        gate, up = tl.split(tl.reshape(narrow(y, DT).to(tl.float32), (PER, 2)))
        y = gated(gate, up, ACT, "mul", 0.0, 0.0)
    if ADDEND:
        y = narrow(y, DT).to(tl.float32)
        y = addend + (y * share if SHARE else y)
    tl.store(y_ptr + m.to(tl.int64) * N + n, narrow(y, y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _either(second, a, b):
    return tl.where(second, b, a)


@triton.jit
def _rows_kernel(
    x_ptr, r_ptr, g_ptr, normed_ptr, sum_ptr, w0, w1, w2, w3, b0, b1, b2, b3, y0, y1, y2, y3, addend_ptr, share_ptr,
    N0, N1, N2, N3, K, ldx, eps,
    COUNT: tl.constexpr, KIND: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
    ADDEND: tl.constexpr, SHARE: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, ONCE: tl.constexpr,
    LINES: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """COUNT results, each of the w and b of its number; with ACT one, of w0 and w1."""
    block, m = tl.program_id(0), tl.program_id(1)
    end0 = tl.cdiv(N0, R)
    end1 = end0 + tl.cdiv(N1, R)
    end2 = end1 + tl.cdiv(N2, R)
    w, b, y = w0, b0, y0
    N, start = N0 + block * 0, block * 0  # tensors, as what they are chosen from below
    if COUNT > 1:
        w, b, y = _either(block >= end0, w0, w1), _either(block >= end0, b0, b1), _either(block >= end0, y0, y1)
        N, start = _either(block >= end0, N, N1), _either(block >= end0, start, end0)
    if COUNT > 2:
        w, b, y = _either(block >= end1, w, w2), _either(block >= end1, b, b2), _either(block >= end1, y, y2)
        N, start = _either(block >= end1, N, N2), _either(block >= end1, start, end1)
    if COUNT > 3:
        w, b, y = _either(block >= end2, w, w3), _either(block >= end2, b, b3), _either(block >= end2, y, y3)
        N, start = _either(block >= end2, N, N3), _either(block >= end2, start, end2)
    block -= start
    _outputs(
        block, m, x_ptr, r_ptr, g_ptr, normed_ptr, sum_ptr, w, w1, b, b1, y, addend_ptr, share_ptr, N, K, ldx, eps,
        KIND, ADD, BIAS, ACT, ADDEND, SHARE, R, BK, ONCE, LINES, DEPENDENT,
    )  # fmt: skip


@dataclass(frozen=True)
class RowsConfig:
    """R outputs a program, BK values of k a step."""

    R: int
    BK: int
    num_warps: int


def rows_config(total: int, K: int, device: torch.device) -> RowsConfig:
    """By shape alone, as a sweep on one H100 had it (tests/benchmarks/linear_rows.py). total: outputs together."""
    BK = min(max(pow2(K), 16), 2048)
    if K % BK == 0 and total >= 12 * sm_count(device):
        return RowsConfig(4, BK, 4)
    return RowsConfig(2 if total >= 24 * sm_count(device) else 1, BK, 4)


@on_its_device
def linear_rows(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], wide: bool = False, act: str = "",
    out: Sequence[torch.Tensor] | None = None, config: RowsConfig | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """x (…, K), weights (N, K) of x's dtype, at most four, biases (N,) for all or none: one (…, N) a weight, in x's
    dtype or, ``wide``, in float32; with ``act`` one (…, N), act(gate)·up of two weights."""
    ys = empty_results(x, weights, wide, act) if out is None else list(out)
    _launch(x, None, None, 0.0, "", weights, biases, ys, x, x, config, act=act)
    return ys


@on_its_device
def norm_linear_rows(
    x: torch.Tensor, residual: torch.Tensor | None, norm: torch.Tensor, eps: float, kind: str,
    weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], wide: bool = False, act: str = "",
    out: Sequence[torch.Tensor] | None = None, config: RowsConfig | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """See ``ktfx.ops.linear_rows``: the normed x, with a residual the sum, then what follows; or into out."""
    before = 1 if residual is None else 2
    made = empty_norm_results(x, residual, weights, wide, act) if out is None else list(out)
    _launch(x, residual, norm, eps, kind, weights, biases, made[before:], made[0], made[before - 1], config, act=act)
    return made


@on_its_device
def linear_rows_add(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, addend: torch.Tensor,
    share: torch.Tensor | None = None, out: torch.Tensor | None = None, config: RowsConfig | None = None,
) -> torch.Tensor:  # fmt: skip
    """See ``ktfx.ops.linear_rows``: addend (rows of N) + x·weightᵀ, the product times sigmoid(share); or into out."""
    y = addend.new_empty(addend.shape) if out is None else out
    biases = [] if bias is None else [bias]
    _launch(x, None, None, 0.0, "", [weight], biases, [y], x, x, config, addend=addend.contiguous(), share=share)
    return y


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, norm: torch.Tensor | None, eps: float, kind: str,
    weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], ys: Sequence[torch.Tensor], normed_x: torch.Tensor,
    total: torch.Tensor, config: RowsConfig | None, act: str = "", addend: torch.Tensor | None = None,
    share: torch.Tensor | None = None,
) -> None:  # fmt: skip
    K = x.shape[-1]
    flat = x.reshape(-1, K)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    M = flat.shape[0]
    if M == 0:
        return
    ws = [w.contiguous() for w in weights]
    bs = [b.contiguous() for b in biases] or ws
    sizes = [w.shape[0] for w in ws]
    c = config or rows_config(sum(sizes), K, x.device)
    R = max(c.R, 2) if act else c.R
    programs = cdiv(sizes[0], R // 2) if act else sum(cdiv(n, R) for n in sizes)
    lines = pow2(cdiv(K * x.element_size(), 128))
    _rows_kernel[(programs, M)](
        flat, flat if residual is None else residual.contiguous(), flat if norm is None else norm, normed_x, total,
        *_padded(ws), *_padded(bs), *_padded(list(ys)), ys[0] if addend is None else addend,
        flat if share is None else share.contiguous(), *_padded(sizes), K, flat.stride(0), eps,
        COUNT=len(ys), KIND=kind, ADD=residual is not None, BIAS=bool(biases), ACT=act, ADDEND=addend is not None,
        SHARE=share is not None, R=R, BK=c.BK, ONCE=c.BK >= K, LINES=lines if lines <= 256 else 0,
        num_warps=c.num_warps, **dependent(x.device),
    )  # fmt: skip


def _padded(items: Sequence[Item]) -> list[Item]:
    """As many as the kernel has arguments for; those beyond the count are not looked at."""
    return [*items, *[items[0]] * (MOST_WEIGHTS - len(items))]

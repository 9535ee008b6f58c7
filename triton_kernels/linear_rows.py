"""y = x·Wᵀ + b for one or two rows of x and up to four weights that read it, in one launch, read where they lie.

One program works out R outputs of one weight. Nothing is split along the reduction: R rows of K values are enough work
for a program, and N / R programs are enough for every multiprocessor. The weights' rows are asked for before the
kernel that writes x has ended (``dependent_launch``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.dependent_launch import dependent, prefetch_rows, wait_for_previous
from ktfx.triton_kernels.dequant import narrow
from ktfx.triton_kernels.launch import cdiv, on_its_device, pow2, sm_count

from ktfx.ops.linear_rows import MOST_WEIGHTS

Item = TypeVar("Item")


@triton.jit
def _outputs(
    block, m, x_ptr, w_ptr, b_ptr, y_ptr, N, K, ldx,
    BIAS: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, LINES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """y[m, n] for R values of n. w (N, K) and y (M, N) contiguous."""
    n = block * R + tl.arange(0, R)
    row = tl.minimum(n, N - 1).to(tl.int64)
    if DEPENDENT and LINES > 0:
        prefetch_rows(w_ptr, row, K, K, LINES)
    wait_for_previous(DEPENDENT)
    acc = tl.zeros((R, BK), tl.float32)
    for k0 in tl.range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        w = tl.load(w_ptr + row[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
        x = tl.load(x_ptr + m.to(tl.int64) * ldx + k, mask=k < K, other=0.0)
        acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
    y = tl.sum(acc, 1)
    if BIAS:
        y += tl.load(b_ptr + row).to(tl.float32)
    tl.store(y_ptr + m.to(tl.int64) * N + n, narrow(y, y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _rows_kernel(
    x_ptr, w0, w1, w2, w3, b0, b1, b2, b3, y0, y1, y2, y3, N0, N1, N2, N3, K, ldx,
    COUNT: tl.constexpr, BIAS: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, LINES: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    block, m = tl.program_id(0), tl.program_id(1)
    blocks = tl.cdiv(N0, R)
    if block < blocks:
        _outputs(block, m, x_ptr, w0, b0, y0, N0, K, ldx, BIAS, R, BK, LINES, DEPENDENT)
    else:
        if COUNT > 1:
            block -= blocks
            blocks = tl.cdiv(N1, R)
            if block < blocks:
                _outputs(block, m, x_ptr, w1, b1, y1, N1, K, ldx, BIAS, R, BK, LINES, DEPENDENT)
            else:
                if COUNT > 2:
                    block -= blocks
                    blocks = tl.cdiv(N2, R)
                    if block < blocks:
                        _outputs(block, m, x_ptr, w2, b2, y2, N2, K, ldx, BIAS, R, BK, LINES, DEPENDENT)
                    else:
                        if COUNT > 3:
                            _outputs(block - blocks, m, x_ptr, w3, b3, y3, N3, K, ldx, BIAS, R, BK, LINES, DEPENDENT)


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
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor] | None = None,
    config: RowsConfig | None = None,
) -> list[torch.Tensor]:
    """x (…, K), weights (N, K) of x's dtype, at most four, biases (N,) for all or none: one (…, N) a weight."""
    K = x.shape[-1]
    flat = x.reshape(-1, K)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    M, count = flat.shape[0], len(weights)
    ys = [x.new_empty(*x.shape[:-1], w.shape[0]) for w in weights] if out is None else list(out)
    if M == 0:
        return ys
    ws = [w.contiguous() for w in weights]
    bs = [b.contiguous() for b in biases] or ws
    sizes = [w.shape[0] for w in ws]
    c = config or rows_config(sum(sizes), K, x.device)
    lines = pow2(cdiv(K * x.element_size(), 128))
    _rows_kernel[(sum(cdiv(n, c.R) for n in sizes), M)](
        flat, *_padded(ws), *_padded(bs), *_padded(ys), *_padded(sizes), K, flat.stride(0),
        COUNT=count, BIAS=bool(biases), R=c.R, BK=c.BK, LINES=lines if lines <= 256 else 0, num_warps=c.num_warps,
        **dependent(x.device),
    )  # fmt: skip
    return ys


def _padded(items: Sequence[Item]) -> list[Item]:
    """As many as the kernel has arguments for; those beyond the count are not looked at."""
    return [*items, *[items[0]] * (MOST_WEIGHTS - len(items))]

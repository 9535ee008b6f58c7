"""Weight rows of 4 and 8 bits times one vector, in integers: ``multiply_rows`` for int4, int4zp, int8 and mxfp4.

About one instruction a weight, where unpacking to float32 takes five to seven and keeps a GPU from reading at full
speed. The vector's integers are made by a kernel before (``integer_rows``) or by every program (``made_integers``).
"""

from __future__ import annotations

import triton
import triton.language as tl
from ktfx.triton_kernels.dependent_launch import wait_for_previous
from ktfx.triton_kernels.dequant import load_group_scale
from ktfx.triton_kernels.integer_rows import ready_sums, words_of_runs
from ktfx.triton_kernels.made_integers import made_sums

# How a kernel has x: as it is, as it is to make integers of it, or as ``IntegerInputs``.
FLOATS, MADE, READY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def multiply_integers(
    acc, w_ptr, s_ptr, z_ptr, row, srow, ok, x_ptr, xs_ptr, xrow, k0, K, blocks, ldw, lds,
    FMT: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, X: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """acc (B, R, parts) += w[row, k0:k0+BK] · x, still apart by runs of 16 bytes of weights: BK/32 of them, int8 BK/16.

    row, srow, ok: (B or 1, R), weight rows, scale rows and which exist. X: ``MADE``, and x are 16-bit floats, whose
    rows begin at xrow (B or 1,); or ``READY``, ``IntegerInputs``, and xrow are rows times ``blocks``. Needs rows of
    whole 16-byte runs, of both. WAIT: the kernel's wait for the kernels before it stands here, when the weights are on
    their way and before x is read.
    """
    WORDS: tl.constexpr = BK // 4 if FMT == "int8" else BK // 8
    RUNS: tl.constexpr = WORDS // 4
    # Threads lie along a row, each with one run. Words are asked for by whole rows and scales transposed, since a load
    # of which Triton knows no neighbours is laid out by its first dimension: otherwise results change threads here.
    c = tl.arange(0, WORDS)
    word = (k0 // 4 if FMT == "int8" else k0 // 8) + c
    # All loads first: they are issued in this order, and only then is one waited for.
    w = tl.load(
        w_ptr.to(tl.pointer_type(tl.int32)) + row[:, :, None] * (ldw // 4) + word[None, None, :],
        mask=ok[:, :, None] & (word < ldw // 4)[None, None, :], other=0,
    )  # fmt: skip
    # (2b + 1) // 2 is b, and hides that scales of groups of 32 are neighbours, which one thread would load together.
    block = k0 // 32 + (tl.arange(0, RUNS) if FMT == "int8" else tl.arange(0, RUNS) * 2 + 1) // 2
    if FMT != "int8":
        g = (block // (G // 32))[:, None, None] + srow[None, :, :] * lds
        exists = (block * 16 < ldw)[:, None, None] & ok[None, :, :]
        scale = tl.permute(load_group_scale(s_ptr, g, exists, FMT), 1, 2, 0)
        if FMT == "int4zp":
            least = tl.permute(tl.load(z_ptr + g, mask=exists, other=0).to(tl.float32), 1, 2, 0)
    wait_for_previous(WAIT)
    ws = words_of_runs(w)
    if X == READY:
        dot, worth, x_sum = ready_sums(ws, acc, x_ptr, xs_ptr, xrow, word, block, blocks, FMT)
    else:
        dot, worth, x_sum = made_sums(ws, acc, x_ptr, xrow, c, k0, K, FMT)
    if FMT == "int8":
        acc += dot * worth
    elif FMT == "mxfp4":
        half = 0.5 if X == READY else 1.0
        acc += (dot - 12.0 * x_sum) * (scale * half * worth)
    elif FMT == "int4zp":
        if X != READY:
            least = 16.0 * least - 128.0
        acc += (dot - least * x_sum) * (scale * worth)
    elif X == READY:
        acc += (dot - 8.0 * x_sum) * (scale * worth)
    else:
        acc += dot * (scale * worth)
    return acc

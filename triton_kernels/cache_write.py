"""New keys and values into a static cache, in one launch, and the cache's count of rows moved on with them.

Programs of one launch all read the count, and none may see it moved on. So each, when it has read, adds 2³² to it; the
one that finds all others there already takes these back and adds the new rows. Whoever reads masks the upper half out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.dependent_launch import dependent, wait_for_previous
from ktfx.triton_kernels.launch import cdiv, on_its_device, pow2, with_asserts

_ROWS = tl.constexpr(0xFFFFFFFF)


@triton.jit
def row_to_write(count_ptr, s, capacity):
    """Where the s-th new row goes. An error on the device, before anything is written, if that is no row."""
    row = (tl.load(count_ptr) & _ROWS) + s
    tl.device_assert((row >= 0) & (row < capacity), "the cache has no room for the new keys and values")
    return row


@triton.jit
def move_count(count_ptr, programs, new_rows):
    """count += new_rows, by the last of ``programs`` programs to come here. Each must have read the count before."""
    tl.debug_barrier()  # all threads of this program have read it
    if (tl.atomic_add(count_ptr, 1 << 32) >> 32) == programs - 1:
        tl.atomic_add(count_ptr, new_rows - (programs.to(tl.int64) << 32))


@triton.jit
def copy_heads(
    x_ptr, y_ptr, b, s, row, h, heads, D, capacity, x_b, x_h, x_s, y_b, y_h, y_s, DP: tl.constexpr
):  # fmt: skip
    """y[b, h, row] = x[b, h, s], for heads h that exist."""
    d = tl.arange(0, DP)
    exists = (h < heads) & (tl.zeros_like(h) + row < capacity)  # the interpreter cannot splat a scalar mask
    there = exists[:, None] & (d < D)[None, :]
    at = b.to(tl.int64) * x_b + h.to(tl.int64)[:, None] * x_h + s * x_s + d[None, :]
    to = b.to(tl.int64) * y_b + h.to(tl.int64)[:, None] * y_h + row * y_s + d[None, :]
    tl.store(y_ptr + to, tl.load(x_ptr + at, mask=there, other=0.0), mask=there)


@triton.jit
def _cache_write_kernel(
    k_ptr, v_ptr, keys_ptr, values_ptr, count_ptr, heads, length, D, DV, capacity,
    k_b, k_h, k_s, v_b, v_h, v_s, keys_b, keys_h, keys_s, values_b, values_h, values_s,
    HEADS: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, MOVES: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    wait_for_previous(DEPENDENT)
    b, s = tl.program_id(0) // length, tl.program_id(0) % length
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    row = row_to_write(count_ptr, s, capacity)
    copy_heads(k_ptr, keys_ptr, b, s, row, h, heads, D, capacity, k_b, k_h, k_s, keys_b, keys_h, keys_s, DP)
    copy_heads(v_ptr, values_ptr, b, s, row, h, heads, DV, capacity, v_b, v_h, v_s, values_b, values_h, values_s, DVP)
    if MOVES:
        move_count(count_ptr, tl.num_programs(0) * tl.num_programs(1), length)


def row_strides(t: torch.Tensor) -> tuple[int, int, int]:
    return t.stride(0), t.stride(1), t.stride(2)


@on_its_device
def cache_write(
    keys: torch.Tensor, values: torch.Tensor, count: torch.Tensor, k: torch.Tensor, v: torch.Tensor, moves: bool
) -> None:
    """See ``ktfx.ops.cache_write``: rows of k and v to keys and values, in place, and the count moved on."""
    B, heads, S, D = k.shape
    DV = v.shape[3]
    if B * heads * S == 0:
        return
    k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (k, v))
    DP, DVP = pow2(D), pow2(DV)
    per = min(pow2(heads), max(1, 1024 // max(DP, DVP)))
    _cache_write_kernel[(B * S, cdiv(heads, per))](
        k, v, keys, values, count, heads, S, D, DV, keys.shape[2],
        *row_strides(k), *row_strides(v), *row_strides(keys), *row_strides(values),
        HEADS=per, DP=DP, DVP=DVP, MOVES=moves, num_warps=4, **with_asserts(), **dependent(k.device),
    )  # fmt: skip

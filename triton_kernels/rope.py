"""Rotary position embedding of q and k in one launch. Layouts and styles: see ``ktfx.ops.rope``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.dependent_launch import dependent, wait_for_previous
from ktfx.triton_kernels.dequant import narrow
from ktfx.triton_kernels.launch import cdiv, on_its_device, pow2


@triton.jit
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, heads, length, D, pairs,
    x_b, x_h, x_s, y_b, y_h, y_s, t_b, t_s,
    STYLE: tl.constexpr, HEADS: tl.constexpr, PP: tl.constexpr, RESTP: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    wait_for_previous(DEPENDENT)
    b, s = tl.program_id(0) // length, tl.program_id(0) % length
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    j = tl.arange(0, PP)
    there = (h < heads)[:, None] & (j < pairs)[None, :]
    table = b.to(tl.int64) * t_b + s * t_s + j
    cos = tl.load(cos_ptr + table, mask=j < pairs, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + table, mask=j < pairs, other=0.0).to(tl.float32)[None, :]
    x_row = b.to(tl.int64) * x_b + h.to(tl.int64)[:, None] * x_h + s.to(tl.int64) * x_s
    y_row = b.to(tl.int64) * y_b + h.to(tl.int64)[:, None] * y_h + s.to(tl.int64) * y_s
    if STYLE == "half":
        first, second = j[None, :], j[None, :] + pairs
    else:
        first, second = 2 * j[None, :], 2 * j[None, :] + 1
    a = tl.load(x_ptr + x_row + first, mask=there, other=0.0).to(tl.float32)
    c = tl.load(x_ptr + x_row + second, mask=there, other=0.0).to(tl.float32)
    if STYLE == "split":
        first, second = j[None, :], j[None, :] + pairs
    DT: tl.constexpr = y_ptr.dtype.element_ty
    tl.store(y_ptr + y_row + first, narrow(a * cos - c * sin, DT), mask=there)
    tl.store(y_ptr + y_row + second, narrow(c * cos + a * sin, DT), mask=there)
    if RESTP > 0:
        d = 2 * pairs + tl.arange(0, RESTP)
        rest = (h < heads)[:, None] & (d < D)[None, :]
        tl.store(y_ptr + y_row + d[None, :], tl.load(x_ptr + x_row + d[None, :], mask=rest, other=0.0), mask=rest)


@on_its_device
def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x (B, heads, S, D) with neighbours along D, cos and sin (B or 1, S, R/2), read with any strides over B and S."""
    B, heads, S, D = x.shape
    y = torch.empty_like(x) if out is None else out
    if y.numel() == 0:
        return y
    if x.stride(-1) != 1:
        x = x.contiguous()
    cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
    if sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    pairs = cos.shape[-1]
    rest = D - 2 * pairs
    per = min(pow2(heads), max(1, 2048 // pow2(D)))
    _rope_kernel[(B * S, cdiv(heads, per))](
        x, cos, sin, y, heads, S, D, pairs,
        x.stride(0), x.stride(1), x.stride(2), y.stride(0), y.stride(1), y.stride(2),
        cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
        STYLE=style, HEADS=per, PP=pow2(pairs), RESTP=pow2(rest) if rest else 0, num_warps=4,
        **dependent(x.device),
    )  # fmt: skip
    return y

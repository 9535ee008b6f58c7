"""Rotary position embedding, alone or of q and k together with the norms before it. See ``ktfx.ops.rope``."""

from __future__ import annotations

from collections.abc import Sequence

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


@triton.jit
def _normed(v, r, w, KIND: tl.constexpr, DT: tl.constexpr):
    """What an RMS norm of the kind writes for v, as float32; r: the row's 1 / root mean square."""
    y = v * r
    if KIND == "llama":
        y = narrow(y, DT).to(tl.float32) * w
    elif KIND == "gemma":
        y = y * (1.0 + w)
    else:
        tl.static_assert(KIND == "late")
        y = y * w
    return narrow(y, DT).to(tl.float32)


@triton.jit
def _norm_and_turn(
    block, b, s, x_ptr, w_ptr, y_ptr, cos, sin, heads, length, D, pairs, eps, x_b, x_h, x_s,
    STYLE: tl.constexpr, KIND: tl.constexpr, HEADS: tl.constexpr, PP: tl.constexpr, RESTP: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token. cos, sin: (1, PP). y (B, heads, S, D) contiguous. KIND: of the norm, or empty."""
    DT: tl.constexpr = y_ptr.dtype.element_ty
    h = block * HEADS + tl.arange(0, HEADS)
    j = tl.arange(0, PP)
    there = (h < heads)[:, None] & (j < pairs)[None, :]
    x_row = b.to(tl.int64) * x_b + h.to(tl.int64)[:, None] * x_h + s.to(tl.int64) * x_s
    y_row = ((b.to(tl.int64) * heads + h.to(tl.int64)[:, None]) * length + s) * D
    if STYLE == "half":
        first, second = j[None, :], j[None, :] + pairs
    else:
        first, second = 2 * j[None, :], 2 * j[None, :] + 1
    a = tl.load(x_ptr + x_row + first, mask=there, other=0.0).to(tl.float32)
    c = tl.load(x_ptr + x_row + second, mask=there, other=0.0).to(tl.float32)
    if KIND != "":
        squares = tl.sum(a * a + c * c, 1)
        if RESTP > 0:
            d = 2 * pairs + tl.arange(0, RESTP)
            rest = (h < heads)[:, None] & (d < D)[None, :]
            behind = tl.load(x_ptr + x_row + d[None, :], mask=rest, other=0.0).to(tl.float32)
            squares += tl.sum(behind * behind, 1)
        r = tl.rsqrt(squares / D + eps)[:, None]
        known = (j < pairs)[None, :]
        a = _normed(a, r, tl.load(w_ptr + first, mask=known, other=0.0).to(tl.float32), KIND, DT)
        c = _normed(c, r, tl.load(w_ptr + second, mask=known, other=0.0).to(tl.float32), KIND, DT)
        if RESTP > 0:
            w = tl.load(w_ptr + d[None, :], mask=(d < D)[None, :], other=0.0).to(tl.float32)
            tl.store(y_ptr + y_row + d[None, :], narrow(_normed(behind, r, w, KIND, DT), DT), mask=rest)
    else:
        if RESTP > 0:
            d = 2 * pairs + tl.arange(0, RESTP)
            rest = (h < heads)[:, None] & (d < D)[None, :]
            tl.store(y_ptr + y_row + d[None, :], tl.load(x_ptr + x_row + d[None, :], mask=rest, other=0.0), mask=rest)
    if STYLE == "split":
        first, second = j[None, :], j[None, :] + pairs
    tl.store(y_ptr + y_row + first, narrow(a * cos - c * sin, DT), mask=there)
    tl.store(y_ptr + y_row + second, narrow(c * cos + a * sin, DT), mask=there)


@triton.jit
def _norm_rope_kernel(
    x0, x1, w0, w1, y0, y1, cos_ptr, sin_ptr, heads0, heads1, length, D, pairs, eps,
    x0_b, x0_h, x0_s, x1_b, x1_h, x1_s, t_b, t_s,
    STYLE: tl.constexpr, KIND: tl.constexpr, HEADS: tl.constexpr, PP: tl.constexpr, RESTP: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    wait_for_previous(DEPENDENT)
    b, s, block = tl.program_id(0) // length, tl.program_id(0) % length, tl.program_id(1)
    j = tl.arange(0, PP)
    table = b.to(tl.int64) * t_b + s * t_s + j
    cos = tl.load(cos_ptr + table, mask=j < pairs, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + table, mask=j < pairs, other=0.0).to(tl.float32)[None, :]
    blocks = tl.cdiv(heads0, HEADS)
    if block < blocks:
        _norm_and_turn(
            block, b, s, x0, w0, y0, cos, sin, heads0, length, D, pairs, eps, x0_b, x0_h, x0_s,
            STYLE, KIND, HEADS, PP, RESTP,
        )  # fmt: skip
    else:
        _norm_and_turn(
            block - blocks, b, s, x1, w1, y1, cos, sin, heads1, length, D, pairs, eps, x1_b, x1_h, x1_s,
            STYLE, KIND, HEADS, PP, RESTP,
        )  # fmt: skip


@on_its_device
def norm_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str, weights: Sequence[torch.Tensor],
    eps: float, kind: str, out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """q and k (B, their heads, S, D), normed by a weight (D,) each if there are any, then turned: contiguous."""
    B, heads_q, S, D = q.shape
    heads_k = k.shape[1]
    made = out or (q.new_empty(q.shape), k.new_empty(k.shape))
    if made[0].numel() == 0 and made[1].numel() == 0:
        return made
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
    if sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    pairs = cos.shape[-1]
    rest = D - 2 * pairs
    per = min(pow2(heads_k), max(1, 512 // pow2(D)))
    _norm_rope_kernel[(B * S, cdiv(heads_q, per) + cdiv(heads_k, per))](
        q, k, *(weights or (q, k)), *made, cos, sin, heads_q, heads_k, S, D, pairs, eps,
        q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
        cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
        STYLE=style, KIND=kind if weights else "", HEADS=per, PP=pow2(pairs), RESTP=pow2(rest) if rest else 0,
        num_warps=2, **dependent(q.device),
    )  # fmt: skip
    return made

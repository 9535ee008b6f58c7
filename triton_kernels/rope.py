"""Rotary position embedding, alone or of q and k together, with the norms before it and the cache's update after it.

See ``ktfx.ops.rope`` and ``ktfx.ops.cache_write``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.cache_write import copy_heads, move_count, row_strides, row_to_write
from ktfx.triton_kernels.dependent_launch import dependent, wait_for_previous
from ktfx.triton_kernels.dequant import narrow
from ktfx.triton_kernels.launch import cdiv, on_its_device, pow2, with_asserts
from ktfx.triton_kernels.norms import normed


@triton.jit
def _norm_and_turn(
    x_ptr, w_ptr, y_ptr, cos, sin, b, s, row, h, heads, D, pairs, eps, rows, x_b, x_h, x_s, y_b, y_h, y_s,
    STYLE: tl.constexpr, KIND: tl.constexpr, PP: tl.constexpr, RESTP: tl.constexpr,
):  # fmt: skip
    """y[b, h, row] from x[b, h, s], for heads h that exist. cos, sin: (1, PP). KIND: of the norm, or empty."""
    DT: tl.constexpr = y_ptr.dtype.element_ty
    j = tl.arange(0, PP)
    exists = ((h < heads) & (tl.zeros_like(h) + row < rows))[:, None]  # the interpreter cannot splat a scalar mask
    there = exists & (j < pairs)[None, :]
    x_row = b.to(tl.int64) * x_b + h.to(tl.int64)[:, None] * x_h + s * x_s
    y_row = b.to(tl.int64) * y_b + h.to(tl.int64)[:, None] * y_h + row * y_s
    if STYLE == "half":
        first, second = j[None, :], j[None, :] + pairs
    else:
        first, second = 2 * j[None, :], 2 * j[None, :] + 1
    a = tl.load(x_ptr + x_row + first, mask=there, other=0.0).to(tl.float32)
    c = tl.load(x_ptr + x_row + second, mask=there, other=0.0).to(tl.float32)
    squares = tl.sum(a * a + c * c, 1)
    if RESTP > 0:
        d = 2 * pairs + tl.arange(0, RESTP)
        beside = exists & (d < D)[None, :]
        rest = tl.load(x_ptr + x_row + d[None, :], mask=beside, other=0.0)
        squares += tl.sum(rest.to(tl.float32) * rest.to(tl.float32), 1)
    if KIND != "":
        r = tl.rsqrt(squares / D + eps)[:, None]
        known = (j < pairs)[None, :]
        a = normed(a, r, tl.load(w_ptr + first, mask=known, other=0.0).to(tl.float32), KIND, DT).to(tl.float32)
        c = normed(c, r, tl.load(w_ptr + second, mask=known, other=0.0).to(tl.float32), KIND, DT).to(tl.float32)
    if RESTP > 0:
        if KIND != "":
            w = tl.load(w_ptr + d[None, :], mask=(d < D)[None, :], other=0.0).to(tl.float32)
            rest = normed(rest.to(tl.float32), r, w, KIND, DT)
        tl.store(y_ptr + y_row + d[None, :], rest, mask=beside)
    if STYLE == "split":
        first, second = j[None, :], j[None, :] + pairs
    tl.store(y_ptr + y_row + first, narrow(a * cos - c * sin, DT), mask=there)
    tl.store(y_ptr + y_row + second, narrow(c * cos + a * sin, DT), mask=there)


@triton.jit
def _norm_rope_kernel(
    q_ptr, k_ptr, wq_ptr, wk_ptr, q_out, k_out, cos_ptr, sin_ptr, v_ptr, values_ptr, count_ptr,
    q_heads, k_heads, length, D, DV, pairs, eps, rows,
    q_b, q_h, q_s, k_b, k_h, k_s, qo_b, qo_h, qo_s, ko_b, ko_h, ko_s, v_b, v_h, v_s, values_b, values_h, values_s,
    t_b, t_s,
    STYLE: tl.constexpr, KIND: tl.constexpr, HEADS: tl.constexpr, PP: tl.constexpr, RESTP: tl.constexpr,
    DVP: tl.constexpr, MOVES: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    # DVP > 0: k_out is a cache of ``rows`` rows, to which k goes behind the ``count`` that are there, and v beside it.
    wait_for_previous(DEPENDENT)
    b, s, block = tl.program_id(0) // length, (tl.program_id(0) % length).to(tl.int64), tl.program_id(1)
    j = tl.arange(0, PP)
    table = b.to(tl.int64) * t_b + s * t_s + j
    cos = tl.load(cos_ptr + table, mask=j < pairs, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + table, mask=j < pairs, other=0.0).to(tl.float32)[None, :]
    q_blocks = tl.cdiv(q_heads, HEADS)
    if block < q_blocks:
        h = block * HEADS + tl.arange(0, HEADS)
        _norm_and_turn(
            q_ptr, wq_ptr, q_out, cos, sin, b, s, s, h, q_heads, D, pairs, eps, length, q_b, q_h, q_s, qo_b, qo_h, qo_s,
            STYLE, KIND, PP, RESTP,
        )  # fmt: skip
    else:
        h = (block - q_blocks) * HEADS + tl.arange(0, HEADS)
        row, end = s, s * 0 + length
        if DVP > 0:
            row, end = row_to_write(count_ptr, s, rows), s * 0 + rows
        _norm_and_turn(
            k_ptr, wk_ptr, k_out, cos, sin, b, s, row, h, k_heads, D, pairs, eps, end, k_b, k_h, k_s, ko_b, ko_h, ko_s,
            STYLE, KIND, PP, RESTP,
        )  # fmt: skip
        if DVP > 0:
            copy_heads(
                v_ptr, values_ptr, b, s, row, h, k_heads, DV, rows, v_b, v_h, v_s, values_b, values_h, values_s, DVP
            )
            if MOVES:
                move_count(count_ptr, tl.num_programs(0) * (tl.num_programs(1) - q_blocks), length)


@dataclass(frozen=True)
class CacheRows:
    """Where k and v go: keys (B, Hk, rows, D) and values (B, Hk, rows, DV) behind the ``count`` rows that are there;
    moves: whether the count moves on."""

    keys: torch.Tensor
    values: torch.Tensor
    count: torch.Tensor
    v: torch.Tensor
    moves: bool


def _launch(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str, weights: Sequence[torch.Tensor],
    eps: float, kind: str, q_out: torch.Tensor, k_out: torch.Tensor, per: int, num_warps: int,
    cache: CacheRows | None = None,
) -> None:  # fmt: skip
    (B, q_heads, S, D), k_heads = q.shape, k.shape[1]
    if B * S * (q_heads + k_heads) == 0:
        return
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
    if sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    pairs = cos.shape[-1]
    rest = D - 2 * pairs
    v, values, count, DV, rows, moves = q, q, q, 0, S, False
    checks: dict[str, bool] = {}
    if cache is not None:
        v, values, count, moves = cache.v, cache.values, cache.count, cache.moves
        v = v if v.stride(-1) == 1 else v.contiguous()
        DV, rows, checks = v.shape[3], k_out.shape[2], with_asserts()
    _norm_rope_kernel[(B * S, cdiv(q_heads, per) + cdiv(k_heads, per))](
        q, k, *(weights or (q, k)), q_out, k_out, cos, sin, v, values, count,
        q_heads, k_heads, S, D, DV, pairs, eps, rows,
        *row_strides(q), *row_strides(k), *row_strides(q_out), *row_strides(k_out), *row_strides(v),
        *row_strides(values), cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
        STYLE=style, KIND=kind if weights else "", HEADS=per, PP=pow2(pairs), RESTP=pow2(rest) if rest else 0,
        DVP=pow2(DV) if cache is not None else 0, MOVES=moves, num_warps=num_warps, **checks, **dependent(q.device),
    )  # fmt: skip


@on_its_device
def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x (B, heads, S, D) with neighbours along D, cos and sin (B or 1, S, R/2), read with any strides over B and S."""
    y = torch.empty_like(x) if out is None else out
    heads, D = x.shape[1], x.shape[3]
    per = min(pow2(heads), max(1, 2048 // pow2(D)))
    _launch(x, x[:, :0], cos, sin, style, (), 0.0, "", y, y, per, 4)
    return y


@on_its_device
def norm_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str, weights: Sequence[torch.Tensor],
    eps: float, kind: str, out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """q and k (B, their heads, S, D), normed by a weight (D,) each if there are any, then turned: contiguous."""
    made = out or (q.new_empty(q.shape), k.new_empty(k.shape))
    _launch(q, k, cos, sin, style, weights, eps, kind, *made, _heads_a_program(k), 2)
    return made


@on_its_device
def norm_rope_write(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str, weights: Sequence[torch.Tensor],
    eps: float, kind: str, cache: CacheRows, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """``norm_rope`` whose k goes to the cache, with v beside it. Returns q."""
    made = q.new_empty(q.shape) if out is None else out
    _launch(q, k, cos, sin, style, weights, eps, kind, made, cache.keys, _heads_a_program(k), 2, cache)
    return made


def _heads_a_program(k: torch.Tensor) -> int:
    return min(pow2(k.shape[1]), max(1, 512 // pow2(k.shape[3])))

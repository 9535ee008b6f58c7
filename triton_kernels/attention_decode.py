"""Attention of one new token over a cache, split along the cache so that every multiprocessor reads a part of it.

The first kernel handles one (sequence, key head, part): all query heads that share the key head go through the tensor
cores at once, with an online softmax over the part. The second merges the parts (and the sinks). The number of parts is
fixed by shape; where a part begins and ends is worked out on the device from the valid length, so a CUDA graph replays
for any length, every part has work, and nothing beyond the valid part (or before the window) is read. With a mask in
place of lengths the same holds between its bounds, which are found once for all layers that share the mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.dependent_launch import dependent, wait_for_previous
from ktfx.triton_kernels.dequant import narrow, product
from ktfx.triton_kernels.launch import cdiv, on_its_device, pow2, sm_count
from ktfx.triton_kernels.online_softmax import masked, part_of, softmax_step


@triton.jit
def _part_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, mask_ptr, acc_ptr, stat_ptr,
    heads_kv, D, DV, scale, softcap, window, length_step, capacity, mask_b, mask_h, mask_l,
    q_b, q_h, k_b, k_h, k_l, v_b, v_h, v_l,
    GROUP: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, BL: tl.constexpr, PARTS: tl.constexpr,
    SOFTCAP: tl.constexpr, SPAN: tl.constexpr, MASK: tl.constexpr, BY_HEAD: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    wait_for_previous(DEPENDENT)
    # SPAN: what lengths_ptr holds: "length", "window" (also lengths), "bounds" (first and last), or nothing ("all").
    # MASK: "", "keep" (booleans) or "add" (floats); BY_HEAD: each query head has its own.
    part, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = 0
    if SPAN == "all":
        length = capacity
    elif SPAN == "bounds":
        first = tl.load(lengths_ptr + b * length_step)
        length = tl.load(lengths_ptr + b * length_step + 1)
    else:
        length = tl.load(lengths_ptr + b * length_step).to(tl.int32)
        if SPAN == "window":
            first = tl.maximum(length - window, 0)
    start, end = part_of(first, length, part, PARTS, BL)

    g, d, dv = tl.arange(0, GP), tl.arange(0, DP), tl.arange(0, DVP)
    q_at = b.to(tl.int64) * q_b + (head * GROUP + g)[:, None] * q_h + d[None, :]
    q = tl.load(q_ptr + q_at, mask=(g < GROUP)[:, None] & (d < D)[None, :], other=0.0)
    k_row = k_ptr + b.to(tl.int64) * k_b + head.to(tl.int64) * k_h
    v_row = v_ptr + b.to(tl.int64) * v_b + head.to(tl.int64) * v_h
    mask_row = mask_ptr + b.to(tl.int64) * mask_b
    acc = tl.zeros((GP, DVP), tl.float32)
    top = tl.full((GP,), float("-inf"), tl.float32)
    total = tl.zeros((GP,), tl.float32)
    for at in tl.range(start, end, BL):
        pos = at + tl.arange(0, BL)
        there = pos < end
        k = tl.load(
            k_row + pos.to(tl.int64)[None, :] * k_l + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0
        )
        s = product(q, k, tl.zeros((GP, BL), tl.float32)) * scale
        if SOFTCAP:
            s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)  # tanh
        s = masked(s, mask_row, head * GROUP + g, g < GROUP, pos, there, mask_h, mask_l, MASK, BY_HEAD)
        p, shrink, top, total = softmax_step(s, top, total)
        v = tl.load(
            v_row + pos.to(tl.int64)[:, None] * v_l + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0
        )
        acc = product(narrow(p, v.dtype), v, acc * shrink[:, None])
    out = ((b * heads_kv + head) * PARTS + part).to(tl.int64) * GROUP + g
    tl.store(acc_ptr + out[:, None] * DV + dv[None, :], acc, mask=(g < GROUP)[:, None] & (dv < DV)[None, :])
    tl.store(stat_ptr + out * 2, top, mask=g < GROUP)
    tl.store(stat_ptr + out * 2 + 1, total, mask=g < GROUP)


@triton.jit
def _merge_kernel(
    acc_ptr, stat_ptr, sinks_ptr, out_ptr, heads_kv, DV, o_b, o_h,
    GROUP: tl.constexpr, PARTS: tl.constexpr, PP: tl.constexpr, DVP: tl.constexpr, SINKS: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    wait_for_previous(DEPENDENT)
    h, b = tl.program_id(0), tl.program_id(1)
    head, g = h // GROUP, h % GROUP
    part, dv = tl.arange(0, PP), tl.arange(0, DVP)
    at = ((b * heads_kv + head) * PARTS + part).to(tl.int64) * GROUP + g
    top = tl.load(stat_ptr + at * 2, mask=part < PARTS, other=float("-inf"))
    total = tl.load(stat_ptr + at * 2 + 1, mask=part < PARTS, other=0.0)
    acc = tl.load(
        acc_ptr + at[:, None] * DV + dv[None, :], mask=(part < PARTS)[:, None] & (dv < DV)[None, :], other=0.0
    )
    best = tl.max(top, 0)
    if SINKS:
        sink = tl.load(sinks_ptr + h).to(tl.float32)
        best = tl.maximum(best, sink)
    # A sequence of length 0 has no finite maximum; its output is 0.
    factor = tl.where(total > 0.0, tl.exp(top - best), 0.0)
    norm = tl.sum(total * factor, 0)
    if SINKS:
        norm += tl.exp(sink - best)
    out = tl.sum(acc * factor[:, None], 0) / tl.where(norm > 0.0, norm, 1.0)
    tl.store(out_ptr + b.to(tl.int64) * o_b + h * o_h + dv, narrow(out, out_ptr.dtype.element_ty), mask=dv < DV)


def parts_for(batch: int, heads_kv: int, capacity: int, device: torch.device) -> int:
    """Parts of the cache: two programs a multiprocessor, no part shorter than 64 of the cache's capacity."""
    return max(1, min(cdiv(2 * sm_count(device), batch * heads_kv), cdiv(capacity, 64), 128))


@on_its_device
def attention_decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, scale: float, window: int,
    sinks: torch.Tensor | None, softcap: float, out: torch.Tensor, parts: int | None = None, block: int = 64,
) -> torch.Tensor:  # fmt: skip
    """See ``ktfx.ops.attention``; out (B, Hq, 1, DV). parts and block: the split, by shape unless given."""
    step = 0 if lengths.numel() == 1 else 1
    span = "window" if window > 0 else "length"
    return _launch(q, k, v, lengths, step, span, None, scale, window, sinks, softcap, out, parts, block)


@on_its_device
def attention_decode_masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, bounds: torch.Tensor | None,
    scale: float, sinks: torch.Tensor | None, softcap: float, out: torch.Tensor, parts: int | None = None,
    block: int = 64,
) -> torch.Tensor:  # fmt: skip
    """See ``ktfx.ops.attention``; out (B, Hq, 1, DV). mask (1 or B, 1 or Hq, 1, L), booleans or floats; its bounds
    (1 or B, 2) int32, or None for the whole cache."""
    if bounds is None:
        return _launch(q, k, v, q, 0, "all", mask, scale, 0, sinks, softcap, out, parts, block)
    bounds = bounds.contiguous()
    step = 0 if bounds.shape[0] == 1 else 2
    return _launch(q, k, v, bounds, step, "bounds", mask, scale, 0, sinks, softcap, out, parts, block)


def _launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, length_step: int, span: str,
    mask: torch.Tensor | None, scale: float, window: int, sinks: torch.Tensor | None, softcap: float,
    out: torch.Tensor, parts: int | None, block: int,
) -> torch.Tensor:  # fmt: skip
    """Both kernels. lengths, length_step: what tells the valid part, as ``span`` says, and its stride by sequence."""
    B, heads, _, D = q.shape
    heads_kv, capacity, DV = k.shape[1], k.shape[2], v.shape[3]
    if out.numel() == 0:
        return out
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    group = heads // heads_kv
    n = parts_for(B, heads_kv, capacity, q.device) if parts is None else parts
    acc = torch.empty(B, heads_kv, n, group, DV, dtype=torch.float32, device=q.device)
    stat = torch.empty(B, heads_kv, n, group, 2, dtype=torch.float32, device=q.device)
    wide = max(D, DV) > 256
    kind, by_head, m_strides = "", False, (0, 0, 0)
    if mask is not None:
        kind, by_head = "keep" if mask.dtype == torch.bool else "add", mask.shape[1] > 1
        mask = mask.expand(B, heads, 1, capacity)
        m_strides = (mask.stride(0), mask.stride(1), mask.stride(3))
    _part_kernel[(n, heads_kv, B)](
        q, k, v, lengths, q if mask is None else mask, acc, stat,
        heads_kv, D, DV, scale, softcap, window, length_step, capacity, *m_strides,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
        GROUP=group, GP=max(16, pow2(group)), DP=max(16, pow2(D)), DVP=max(16, pow2(DV)), BL=block, PARTS=n,
        SOFTCAP=softcap > 0, SPAN=span, MASK=kind, BY_HEAD=by_head,
        num_warps=8 if wide else 4, num_stages=2 if wide else 3, **dependent(q.device),
    )  # fmt: skip
    _merge_kernel[(heads, B)](
        acc, stat, q if sinks is None else sinks.contiguous(), out, heads_kv, DV, out.stride(0), out.stride(1),
        GROUP=group, PARTS=n, PP=pow2(n), DVP=pow2(DV), SINKS=sinks is not None, num_warps=4,
        **dependent(q.device),
    )  # fmt: skip
    return out

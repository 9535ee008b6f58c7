"""Attention of one new token over a cache, split along the cache so that every multiprocessor reads a part of it.

The first kernel handles one (sequence, key head, part): all query heads that share the key head go through the tensor
cores at once, with an online softmax over the part. The second merges the parts (and the sinks). The number of parts is
fixed by shape; where a part begins and ends is worked out on the device from the valid length, so a CUDA graph replays
for any length, every part has work, and nothing beyond the valid part (or before the window) is read. With a mask in
place of lengths, blocks that it hides whole are not read either.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.dequant import narrow, product
from ktfx.triton_kernels.launch import cdiv, on_its_device, pow2, sm_count


@triton.jit
def _part_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, acc_ptr, stat_ptr,
    heads_kv, D, DV, scale, softcap, window, length_step, capacity, mask_h, mask_l,
    q_b, q_h, k_b, k_h, k_l, v_b, v_h, v_l,
    GROUP: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, BL: tl.constexpr, PARTS: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    # MASK: "" (lengths_ptr holds lengths), "keep" (booleans) or "add" (floats), then length_step is its batch stride.
    part, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if MASK == "":  # noqa: SIM108  (decided when the kernel is compiled)
        length = tl.load(lengths_ptr + b * length_step).to(tl.int32)
    else:
        length = capacity
    first = 0
    if WINDOW:
        first = tl.maximum(length - window, 0)
    span = tl.cdiv(tl.cdiv(length - first, PARTS), BL) * BL
    start = first + part * span
    end = tl.minimum(start + span, length)

    g, d, dv = tl.arange(0, GP), tl.arange(0, DP), tl.arange(0, DVP)
    q_at = b.to(tl.int64) * q_b + (head * GROUP + g)[:, None] * q_h + d[None, :]
    q = tl.load(q_ptr + q_at, mask=(g < GROUP)[:, None] & (d < D)[None, :], other=0.0)
    k_row = k_ptr + b.to(tl.int64) * k_b + head.to(tl.int64) * k_h
    v_row = v_ptr + b.to(tl.int64) * v_b + head.to(tl.int64) * v_h
    acc = tl.zeros((GP, DVP), tl.float32)
    top = tl.full((GP,), float("-inf"), tl.float32)
    total = tl.zeros((GP,), tl.float32)
    for at in tl.range(start, end, BL):
        pos = at + tl.arange(0, BL)
        there = pos < end
        if MASK == "":
            bias = tl.zeros((GP, BL), tl.float32)
        else:
            m_at = b.to(tl.int64) * length_step + (head * GROUP + g)[:, None] * mask_h + pos[None, :] * mask_l
            seen = (g < GROUP)[:, None] & there[None, :]
            if MASK == "keep":
                bias = tl.where(tl.load(lengths_ptr + m_at, mask=seen, other=0) != 0, 0.0, float("-inf"))
            else:
                bias = tl.load(lengths_ptr + m_at, mask=seen, other=float("-inf")).to(tl.float32)
        if MASK == "":  # noqa: SIM108  (as above)
            some = True
        else:
            some = tl.max(tl.max(bias, 1), 0) > float("-inf")
        if some:
            k = tl.load(
                k_row + pos.to(tl.int64)[None, :] * k_l + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0
            )
            s = product(q, k, tl.zeros((GP, BL), tl.float32)) * scale
            if SOFTCAP:
                s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)  # tanh
            s = tl.where(there[None, :], s + bias, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            # A row of which nothing was kept so far has no maximum to subtract.
            safe_top = tl.where(new_top > float("-inf"), new_top, 0.0)
            p = tl.exp(s - safe_top[:, None])
            shrink = tl.exp(top - safe_top)
            total = total * shrink + tl.sum(p, 1)
            v = tl.load(
                v_row + pos.to(tl.int64)[:, None] * v_l + dv[None, :],
                mask=there[:, None] & (dv < DV)[None, :],
                other=0.0,
            )
            acc = product(narrow(p, v.dtype), v, acc * shrink[:, None])
            top = new_top
    out = ((b * heads_kv + head) * PARTS + part).to(tl.int64) * GROUP + g
    tl.store(acc_ptr + out[:, None] * DV + dv[None, :], acc, mask=(g < GROUP)[:, None] & (dv < DV)[None, :])
    tl.store(stat_ptr + out * 2, top, mask=g < GROUP)
    tl.store(stat_ptr + out * 2 + 1, total, mask=g < GROUP)


@triton.jit
def _merge_kernel(
    acc_ptr, stat_ptr, sinks_ptr, out_ptr, heads_kv, DV, o_b, o_h,
    GROUP: tl.constexpr, PARTS: tl.constexpr, PP: tl.constexpr, DVP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
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
    _part_kernel[(n, heads_kv, B)](
        q, k, v, lengths, acc, stat, heads_kv, D, DV, scale, softcap, window, 0 if lengths.numel() == 1 else 1,
        capacity, 0, 0,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
        GROUP=group, GP=max(16, pow2(group)), DP=max(16, pow2(D)), DVP=max(16, pow2(DV)), BL=block, PARTS=n,
        SOFTCAP=softcap > 0, WINDOW=window > 0, MASK="", num_warps=8 if wide else 4, num_stages=2 if wide else 3,
    )  # fmt: skip
    _merge_kernel[(heads, B)](
        acc, stat, q if sinks is None else sinks.contiguous(), out, heads_kv, DV, out.stride(0), out.stride(1),
        GROUP=group, PARTS=n, PP=pow2(n), DVP=pow2(DV), SINKS=sinks is not None, num_warps=4,
    )  # fmt: skip
    return out


@on_its_device
def attention_decode_masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, out: torch.Tensor,
    parts: int | None = None, block: int = 64,
) -> torch.Tensor:  # fmt: skip
    """See ``ktfx.ops.attention``; out (B, Hq, 1, DV). mask (1 or B, 1 or Hq, 1, L), booleans or floats."""
    B, heads, _, D = q.shape
    heads_kv, capacity, DV = k.shape[1], k.shape[2], v.shape[3]
    if out.numel() == 0:
        return out
    if mask is None:
        mask = torch.ones(1, 1, 1, capacity, dtype=torch.bool, device=q.device)
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    kind = "keep" if mask.dtype == torch.bool else "add"
    mask = mask.expand(B, heads, 1, capacity)
    group = heads // heads_kv
    n = parts_for(B, heads_kv, capacity, q.device) if parts is None else parts
    acc = torch.empty(B, heads_kv, n, group, DV, dtype=torch.float32, device=q.device)
    stat = torch.empty(B, heads_kv, n, group, 2, dtype=torch.float32, device=q.device)
    wide = max(D, DV) > 256
    _part_kernel[(n, heads_kv, B)](
        q, k, v, mask, acc, stat, heads_kv, D, DV, scale, 0.0, 0, mask.stride(0),
        capacity, mask.stride(1), mask.stride(3),
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
        GROUP=group, GP=max(16, pow2(group)), DP=max(16, pow2(D)), DVP=max(16, pow2(DV)), BL=block, PARTS=n,
        SOFTCAP=False, WINDOW=False, MASK=kind, num_warps=8 if wide else 4, num_stages=2 if wide else 3,
    )  # fmt: skip
    _merge_kernel[(heads, B)](
        acc, stat, q, out, heads_kv, DV, out.stride(0), out.stride(1),
        GROUP=group, PARTS=n, PP=pow2(n), DVP=pow2(DV), SINKS=False, num_warps=4,
    )  # fmt: skip
    return out

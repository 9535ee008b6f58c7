"""Attention of one new token over MLA's compressed cache: keys and values are one latent that all heads share.

The first kernel handles one (part of the cache, block of heads, sequence): a tile of the latent is read once, gives the
scores and then the values, with an online softmax over the part. The second merges the parts. As in
``attention_decode`` the parts divide what lies between the mask's bounds on the device, so a graph replays for any
length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.dependent_launch import dependent, wait_for_previous
from ktfx.triton_kernels.dequant import narrow, product
from ktfx.triton_kernels.launch import cdiv, on_its_device, pow2, shared_memory, sm_count
from ktfx.triton_kernels.online_softmax import masked, part_of, softmax_step


@triton.jit
def _part_kernel(
    q_ptr, qr_ptr, c_ptr, kr_ptr, bounds_ptr, mask_ptr, acc_ptr, stat_ptr,
    H, R, P, scale, bounds_step, capacity, mask_b, mask_h, mask_l,
    q_b, q_h, qr_b, qr_h, c_b, c_l, kr_b, kr_l,
    BH: tl.constexpr, RP: tl.constexpr, PP: tl.constexpr, BL: tl.constexpr, PARTS: tl.constexpr,
    BOUNDS: tl.constexpr, MASK: tl.constexpr, BY_HEAD: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    wait_for_previous(DEPENDENT)
    part, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last = 0, capacity
    if BOUNDS:
        first = tl.load(bounds_ptr + b * bounds_step)
        last = tl.load(bounds_ptr + b * bounds_step + 1)
    start, end = part_of(first, last, part, PARTS, BL)

    h, r, p = block * BH + tl.arange(0, BH), tl.arange(0, RP), tl.arange(0, PP)
    heads = (h < H)[:, None]
    q = tl.load(q_ptr + b.to(tl.int64) * q_b + h[:, None] * q_h + r[None, :], mask=heads & (r < R)[None, :], other=0.0)
    qr = tl.load(
        qr_ptr + b.to(tl.int64) * qr_b + h[:, None] * qr_h + p[None, :], mask=heads & (p < P)[None, :], other=0.0
    )
    c_row, kr_row = c_ptr + b.to(tl.int64) * c_b, kr_ptr + b.to(tl.int64) * kr_b
    mask_row = mask_ptr + b.to(tl.int64) * mask_b
    acc = tl.zeros((BH, RP), tl.float32)
    top = tl.full((BH,), float("-inf"), tl.float32)
    total = tl.zeros((BH,), tl.float32)
    for at in tl.range(start, end, BL):
        pos = at + tl.arange(0, BL)
        there = pos < end
        c = tl.load(
            c_row + pos.to(tl.int64)[:, None] * c_l + r[None, :], mask=there[:, None] & (r < R)[None, :], other=0.0
        )
        kr = tl.load(
            kr_row + pos.to(tl.int64)[:, None] * kr_l + p[None, :], mask=there[:, None] & (p < P)[None, :], other=0.0
        )
        s = product(q, tl.trans(c), tl.zeros((BH, BL), tl.float32))
        s = product(qr, tl.trans(kr), s) * scale
        s = masked(s, mask_row, h, h < H, pos, there, mask_h, mask_l, MASK, BY_HEAD)
        e, shrink, top, total = softmax_step(s, top, total)
        acc = product(narrow(e, c.dtype), c, acc * shrink[:, None])
    out = (b * PARTS + part).to(tl.int64) * H + h
    tl.store(acc_ptr + out[:, None] * R + r[None, :], acc, mask=heads & (r < R)[None, :])
    tl.store(stat_ptr + out * 2, top, mask=h < H)
    tl.store(stat_ptr + out * 2 + 1, total, mask=h < H)


@triton.jit
def _merge_kernel(
    acc_ptr, stat_ptr, out_ptr, H, R,
    PARTS: tl.constexpr, NP: tl.constexpr, BR: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    wait_for_previous(DEPENDENT)
    h, b = tl.program_id(0), tl.program_id(1)
    part, r = tl.arange(0, NP), tl.program_id(2) * BR + tl.arange(0, BR)
    at = (b * PARTS + part).to(tl.int64) * H + h
    top = tl.load(stat_ptr + at * 2, mask=part < PARTS, other=float("-inf"))
    total = tl.load(stat_ptr + at * 2 + 1, mask=part < PARTS, other=0.0)
    acc = tl.load(acc_ptr + at[:, None] * R + r[None, :], mask=(part < PARTS)[:, None] & (r < R)[None, :], other=0.0)
    # Where the mask keeps nothing there is no finite maximum, and the output is 0.
    factor = tl.where(total > 0.0, tl.exp(top - tl.max(top, 0)), 0.0)
    norm = tl.sum(total * factor, 0)
    out = tl.sum(acc * factor[:, None], 0) / tl.where(norm > 0.0, norm, 1.0)
    tl.store(out_ptr + (b.to(tl.int64) * H + h) * R + r, narrow(out, out_ptr.dtype.element_ty), mask=r < R)


def split_for(batch: int, heads: int, capacity: int, device: torch.device) -> tuple[int, int]:
    """(heads a program, parts): 64 heads where that still gives each multiprocessor a program, else 16, as a tile of
    the latent is read once for them; two programs a multiprocessor, no part shorter than 64 of the capacity."""
    units, sms = cdiv(capacity, 64), sm_count(device)
    block = 64 if heads >= 64 and batch * units * cdiv(heads, 64) >= sms else 16
    return block, max(1, min(cdiv(2 * sms, batch * cdiv(heads, block)), units, 128))


def _positions(block_heads: int, latent: torch.Tensor) -> int:
    """Positions of a tile: 64 is up to a third faster than 32 (one H100), where the shared memory holds two of them
    beside the queries (221 KB with 64 heads of 512)."""
    if latent.dtype == torch.float32:
        return 16
    if not latent.is_cuda or latent.shape[3] > 512:
        return 32
    return 64 if block_heads == 16 or shared_memory(latent.device) >= 225_000 else 32


@on_its_device
def mla_decode(
    q_latent: torch.Tensor, q_rope: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor,
    mask: torch.Tensor | None, bounds: torch.Tensor | None, scale: float, out: torch.Tensor,
    parts: int | None = None, block_heads: int | None = None, block: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """See ``ktfx.ops.mla``; out (B, H, 1, R) contiguous. bounds: the mask's, or None for the whole cache. parts,
    block_heads, block: the split and the positions of a tile, by shape unless given."""
    B, H, _, R = q_latent.shape
    capacity, P = latent.shape[2], q_rope.shape[3]
    if out.numel() == 0:
        return out
    q_latent, q_rope, latent, k_rope = (
        t if t.stride(3) == 1 else t.contiguous() for t in (q_latent, q_rope, latent, k_rope)
    )
    by_shape = split_for(B, H, capacity, latent.device)
    BH = (16 if latent.dtype == torch.float32 else by_shape[0]) if block_heads is None else block_heads
    n = by_shape[1] if parts is None else parts
    BL = _positions(BH, latent) if block is None else block
    acc = torch.empty(B, n, H, R, dtype=torch.float32, device=latent.device)
    stat = torch.empty(B, n, H, 2, dtype=torch.float32, device=latent.device)
    kind, by_head, m_strides = "", False, (0, 0, 0)
    if mask is not None:
        kind, by_head = "keep" if mask.dtype == torch.bool else "add", mask.shape[1] > 1
        mask = mask.expand(B, H, 1, capacity)
        m_strides = (mask.stride(0), mask.stride(1), mask.stride(3))
    if bounds is not None:
        bounds = bounds.contiguous()
    _part_kernel[(n, cdiv(H, BH), B)](
        q_latent, q_rope, latent, k_rope, q_latent if bounds is None else bounds, q_latent if mask is None else mask,
        acc, stat, H, R, P, scale, 0 if bounds is None or bounds.shape[0] == 1 else 2, capacity, *m_strides,
        q_latent.stride(0), q_latent.stride(1), q_rope.stride(0), q_rope.stride(1),
        latent.stride(0), latent.stride(2), k_rope.stride(0), k_rope.stride(2),
        BH=BH, RP=max(16, pow2(R)), PP=max(16, pow2(P)), BL=BL, PARTS=n, BOUNDS=bounds is not None, MASK=kind,
        BY_HEAD=by_head, num_warps=8 if BH > 16 else 4, num_stages=2, **dependent(latent.device),
    )  # fmt: skip
    BR = min(128, max(16, pow2(R)))
    _merge_kernel[(H, B, cdiv(R, BR))](
        acc, stat, out, H, R, PARTS=n, NP=pow2(n), BR=BR, num_warps=4, **dependent(latent.device)
    )  # fmt: skip
    return out

"""What the decode attention kernels share: which part of a cache a program reads, the mask, the online softmax.

Shape suffixes: R query rows (heads), L positions of a tile. See ``attention_decode`` and ``mla_decode``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def part_of(first, last, part, PARTS: tl.constexpr, BL: tl.constexpr):
    """Where one of PARTS parts of [first, last) starts and ends; parts are whole tiles of BL but for the last."""
    span = tl.cdiv(tl.cdiv(last - first, PARTS), BL) * BL
    start = first + part * span
    return start, tl.minimum(start + span, last)


@triton.jit
def masked(
    s_RL, mask_row, heads_R, exists_R, pos_L, there_L, mask_h, mask_l, MASK: tl.constexpr, BY_HEAD: tl.constexpr
):
    """Scores with the mask applied; -inf where no position is there.

    MASK: "", "keep" (booleans) or "add" (floats). BY_HEAD: each of ``heads_R`` has its own row of the mask.
    """
    if MASK != "":
        if BY_HEAD:
            at = mask_row + heads_R[:, None] * mask_h + pos_L[None, :] * mask_l
            seen = exists_R[:, None] & there_L[None, :]
        else:
            at = mask_row + pos_L[None, :] * mask_l
            seen = there_L[None, :]
        if MASK == "keep":
            s_RL = tl.where(tl.load(at, mask=seen, other=0) != 0, s_RL, float("-inf"))
        else:
            s_RL += tl.load(at, mask=seen, other=float("-inf")).to(tl.float32)
    return tl.where(there_L[None, :], s_RL, float("-inf"))


@triton.jit
def softmax_step(s_RL, top_R, total_R):
    """One tile more: (exp of its scores, what earlier sums shrink by, the new maximum, the new sum)."""
    new_top_R = tl.maximum(top_R, tl.max(s_RL, 1))
    # A row of which nothing was kept so far has no maximum to subtract.
    safe_top_R = tl.where(new_top_R > float("-inf"), new_top_R, 0.0)
    p_RL = tl.exp(s_RL - safe_top_R[:, None])
    shrink_R = tl.exp(top_R - safe_top_R)
    return p_RL, shrink_R, new_top_R, total_R * shrink_R + tl.sum(p_RL, 1)

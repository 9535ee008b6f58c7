"""Attention of one new token over a cache: by length (``ktfx::attention_decode``) or by mask
(``ktfx::attention_decode_masked``), defined in ATen."""

from __future__ import annotations

import torch

from ktfx.errors import KtfxError
from ktfx.ops.triton_loader import kernels, runs_kernels


def attention_decode_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """The definition, in ATen over the whole cache with the invalid part masked; float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    position = torch.arange(k.shape[2], device=q.device)
    length = lengths.reshape(-1, 1)
    valid = position < length
    if window > 0:
        valid = valid & (position >= length - window)
    keep = valid[:, None, None, :]
    keys = torch.where(keep.transpose(2, 3), k.to(wide), 0.0).repeat_interleave(group, 1)
    values = torch.where(keep.transpose(2, 3), v.to(wide), 0.0).repeat_interleave(group, 1)
    scores = q.to(wide) @ keys.transpose(2, 3) * scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~keep, float("-inf"))
    if sinks is not None:
        sink = sinks.to(wide).view(1, -1, 1, 1).expand(scores.shape[0], -1, 1, 1)
        scores = torch.cat((scores, sink), -1)
    p = torch.nan_to_num(scores.softmax(-1))[..., : k.shape[2]]  # a length of 0 without sinks gives 0
    return (p @ values).to(q.dtype)


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, sinks: torch.Tensor | None
) -> None:
    problem = None
    if q.shape[2] != 1:
        problem = f"{q.shape[2]} query tokens", "1: decode; more go through scaled_dot_product_attention"
    elif k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        problem = shapes, "(B, Hq, 1, D), (B, Hkv, L, D), (B, Hkv, L, DV), Hkv dividing Hq"
    elif lengths.numel() not in (1, q.shape[0]) or lengths.is_floating_point():
        problem = f"lengths {lengths.dtype} {tuple(lengths.shape)}", f"integers, one or one for each of {q.shape[0]}"
    elif sinks is not None and tuple(sinks.shape) != (q.shape[1],):
        problem = f"sinks of shape {tuple(sinks.shape)}", f"({q.shape[1]},), one a query head"
    if problem:
        raise KtfxError(f"attention_decode got {problem[0]}", expected=problem[1], mend="check the cache's layout")


@torch.library.custom_op("ktfx::attention_decode", mutates_args=())
def attention_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """softmax(q·kᵀ·scale)·v over the first ``lengths`` entries of a cache: (B, Hq, 1, DV) in q's dtype, contiguous.

    q (B, Hq, 1, D); k (B, Hkv, L, D), v (B, Hkv, L, DV): the whole static cache, the new token written already; Hkv
    divides Hq. lengths: integer tensor, one value or one a sequence, how many entries are valid (at most L), read on
    the device. window: 0, or how many of the last entries count. sinks (Hq,): a logit a head that takes probability
    and adds nothing (gpt-oss). softcap: 0, or c in c·tanh(score/c) (Gemma 2).
    """
    _check(q, k, v, lengths, sinks)
    if runs_kernels(q):
        out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
        family = kernels("attention_decode")
        result: torch.Tensor = family.attention_decode(q, k, v, lengths, scale, window, sinks, softcap, out)
        return result
    return attention_decode_reference(q, k, v, lengths, scale, window, sinks, softcap).contiguous()


@attention_decode.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    return q.new_empty([*q.shape[:3], v.shape[3]])


def check_mask(op: str, mask: torch.Tensor | None, bounds: torch.Tensor | None, sizes: tuple[int, int, int]) -> None:
    """KtfxError unless the mask fits sizes = (batch, query heads, cache length), and the bounds the mask."""
    B, heads, L = sizes
    if mask is not None:
        wanted = ((1, B), (1, heads), (1,), (L,))
        if mask.dim() != 4 or any(size not in known for size, known in zip(mask.shape, wanted, strict=True)):
            raise KtfxError(
                f"{op} got a mask of shape {tuple(mask.shape)}",
                expected=f"(1 or {B}, 1 or {heads}, 1, {L})",
                mend="give the mask of scaled_dot_product_attention, four-dimensional",
            )
    if bounds is not None and (mask is None or bounds.shape != (mask.shape[0], 2) or bounds.dtype != torch.int32):
        raise KtfxError(
            f"{op} got bounds {bounds.dtype} {tuple(bounds.shape)}",
            expected="a mask, and (its first dimension, 2) int32",
            mend="give ktfx::mask_bounds(mask), or leave them out",
        )


def with_mask(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Scores where a boolean mask is True and -inf elsewhere, or scores plus a mask of floats."""
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask.to(scores.dtype)


def probabilities(scores: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension; 0 in a row of which nothing is kept, as SDPA has it."""
    hidden = (scores == float("-inf")).all(-1, keepdim=True)
    return torch.where(hidden, 0.0, scores.softmax(-1))


def attention_decode_masked_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """The definition, in ATen; float32 or wider. A row of which the mask keeps nothing gives 0, as SDPA does."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    keys, values = (t.to(wide).repeat_interleave(group, 1) for t in (k, v))
    scores = q.to(wide) @ keys.transpose(2, 3) * scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    scores = with_mask(scores, mask)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(wide).view(1, -1, 1, 1).expand(scores.shape[0], -1, 1, 1)), -1)
    return (probabilities(scores)[..., : k.shape[2]] @ values).to(q.dtype)


_library = torch.library.Library("ktfx", "FRAGMENT")
# Composite: the compiler sees the ATen in it and makes it part of the kernel that makes the mask.
_library.define("mask_bounds(Tensor mask) -> Tensor")


@torch.library.impl(_library, "mask_bounds", "CompositeImplicitAutograd")
def mask_bounds(mask: torch.Tensor) -> torch.Tensor:
    """First entry that a mask (B, heads, 1, L) keeps for any head, and one past the last: (B, 2) int32.

    Hidden are False, and a float that is -inf or the least of its dtype. (0, L) where all is hidden.
    """
    length = mask.shape[3]
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    # In int64 up to the end: torch 2.11's Inductor cannot reduce int32 on a GPU.
    position = torch.arange(length, device=mask.device)
    first = torch.where(seen, position, length).amin((1, 2, 3))
    last = torch.where(seen, position + 1, 0).amax((1, 2, 3))
    nothing = last == 0
    return torch.stack((torch.where(nothing, 0, first), torch.where(nothing, length, last)), -1).to(torch.int32)


@torch.library.custom_op("ktfx::attention_decode_masked", mutates_args=())
def attention_decode_masked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
    bounds: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q·kᵀ·scale + mask)·v: scaled_dot_product_attention of one query token, (B, Hq, 1, DV) contiguous.

    q (B, Hq, 1, D); k (B, Hkv, L, D), v (B, Hkv, L, DV): the whole static cache, not repeated for the query heads of a
    group. mask: None, or (1 or B, 1 or Hq, 1, L), booleans (True: attended to) or floats that are added. sinks (Hq,): a
    logit a head that takes probability and adds nothing (gpt-oss). softcap: 0, or c in c·tanh(score/c) before the mask
    (Gemma 2). bounds: ``ktfx::mask_bounds`` of the mask, made here if not given; the cache is read between them
    only.
    """
    _check(q, k, v, torch.zeros(1, dtype=torch.int64), sinks)
    check_mask("attention_decode_masked", mask, bounds, (q.shape[0], q.shape[1], k.shape[2]))
    if runs_kernels(q):
        out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
        if mask is not None and bounds is None:
            bounds = mask_bounds(mask)
        family = kernels("attention_decode")
        result: torch.Tensor = family.attention_decode_masked(q, k, v, mask, bounds, scale, sinks, softcap, out)
        return result
    return attention_decode_masked_reference(q, k, v, mask, scale, sinks, softcap).contiguous()


@attention_decode_masked.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
    bounds: torch.Tensor | None = None,
) -> torch.Tensor:
    return q.new_empty([*q.shape[:3], v.shape[3]])

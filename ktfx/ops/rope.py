"""Rotary position embedding: ``ktfx::rope`` over given tables (the model makes them: plain, yarn, …).

Pair j of a head is (a, c), turned to (a·cos_j − c·sin_j, c·cos_j + a·sin_j). Styles say where a and c lie in the R
rotated dimensions; those behind R pass through.
``half``: j and j + R/2, in and out (Llama, Qwen, gpt-oss).
``interleaved``: 2j and 2j + 1, in and out (GPT-J, GLM).
``split``: in 2j and 2j + 1, out j and j + R/2 (DeepSeek in transformers).
"""

from __future__ import annotations

import torch

from ktfx.errors import KtfxError
from ktfx.ops.norms import rms_norm_reference
from ktfx.ops.triton_loader import kernels, runs_kernels

STYLES = ("half", "interleaved", "split")


def rope_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str) -> torch.Tensor:
    """The definition, in ATen; products in float32 (or wider)."""
    pairs = cos.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    turned, rest = x[..., : 2 * pairs].to(wide), x[..., 2 * pairs :]
    if style == "half":
        a, c = turned.chunk(2, -1)
    else:
        a, c = turned[..., 0::2], turned[..., 1::2]
    cos, sin = cos[:, None].to(wide), sin[:, None].to(wide)
    first, second = a * cos - c * sin, c * cos + a * sin
    joined = torch.stack((first, second), -1).flatten(-2) if style == "interleaved" else torch.cat((first, second), -1)
    return torch.cat((joined.to(x.dtype), rest), -1)


@torch.library.custom_op("ktfx::rope", mutates_args=())
def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str) -> torch.Tensor:
    """x (B, heads, S, D); cos, sin (B or 1, S, R/2), R ≤ D, one entry a pair (of a table with both halves, the first).

    Returns x's shape and dtype, contiguous.
    """
    if style not in STYLES:
        raise KtfxError(f"no rope style named {style!r}", expected=", ".join(STYLES), mend="name one of these")
    expected = f"(B or 1, {x.shape[2]}, R/2) with R ≤ {x.shape[3]}"
    if cos.shape != sin.shape or cos.dim() != 3 or cos.shape[1] != x.shape[2] or 2 * cos.shape[2] > x.shape[3]:
        raise KtfxError(
            f"rope of {tuple(x.shape)} got tables {tuple(cos.shape)} and {tuple(sin.shape)}",
            expected=expected,
            mend="pass one entry a pair: the first half of a table that repeats itself",
        )
    if runs_kernels(x):
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        result: torch.Tensor = kernels("rope").rope(x, cos, sin, style, out)
        return result
    return rope_reference(x, cos, sin, style).contiguous()


@rope.register_fake
def _(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("ktfx::norm_rope", mutates_args=())
def norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    style: str,
    weights: list[torch.Tensor],
    eps: float,
    kind: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k (B, their heads, S, D) → the same through ``rms_norm`` by a weight (D,) each, then ``rope``, contiguous.

    weights: two, or none for no norm (then eps and kind mean nothing). Rounds where the two ops would.
    """
    if len(weights) not in (0, 2) or q.shape[-1] != k.shape[-1] or q.dtype != k.dtype:
        raise KtfxError(
            f"norm_rope got q {q.dtype} {tuple(q.shape)}, k {k.dtype} {tuple(k.shape)} and {len(weights)} weights",
            expected="one dtype and head size, and two weights or none",
            mend="turn them one by one, by ktfx::rope",
        )
    if runs_kernels(q):
        made: tuple[torch.Tensor, torch.Tensor] = kernels("rope").norm_rope(q, k, cos, sin, style, weights, eps, kind)
        return made
    if weights:
        q, k = (rms_norm_reference(x, w, eps, kind) for x, w in zip((q, k), weights, strict=True))
    return rope_reference(q, cos, sin, style).contiguous(), rope_reference(k, cos, sin, style).contiguous()


@norm_rope.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    style: str,
    weights: list[torch.Tensor],
    eps: float,
    kind: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)

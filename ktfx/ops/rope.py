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

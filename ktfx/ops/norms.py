"""RMS norms: ``ktfx::rms_norm`` and ``ktfx::add_rms_norm``.

Kinds, which differ in where bfloat16 rounds (u = x·rsqrt(mean(x²) + eps) in float32, w the weight):
``llama``: u rounded to x's dtype, times w. ``late``: u·w in float32, then rounded. ``gemma``: u·(1 + w), then rounded.
"""

from __future__ import annotations

import torch

from ktfx.errors import KtfxError
from ktfx.ops.triton_loader import kernels, runs_kernels

KINDS = ("llama", "late", "gemma")


def _check(x: torch.Tensor, weight: torch.Tensor, kind: str) -> None:
    if kind not in KINDS:
        raise KtfxError(f"no kind of RMS norm named {kind!r}", expected=", ".join(KINDS), mend="name one of these")
    if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise KtfxError(
            f"an RMS norm of rows of {x.shape[-1]} got a weight of shape {tuple(weight.shape)}",
            expected=f"({x.shape[-1]},)",
            mend="pass the norm's own weight",
        )


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float, kind: str) -> torch.Tensor:
    """The definition, in ATen."""
    wide = x if x.dtype == torch.float64 else x.float()
    u = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if kind == "llama":
        return (u.to(x.dtype).to(wide.dtype) * weight.to(wide.dtype)).to(x.dtype)
    w = weight.to(wide.dtype)
    return (u * (1 + w if kind == "gemma" else w)).to(x.dtype)


@torch.library.custom_op("ktfx::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, kind: str) -> torch.Tensor:
    """Over the last dimension of x (any leading shape), weight (D,); returns x's shape and dtype, contiguous."""
    _check(x, weight, kind)
    if runs_kernels(x):
        out: torch.Tensor = kernels("norms").rms_norm(x, weight, eps, kind)[0]
        return out
    return rms_norm_reference(x, weight, eps, kind).contiguous()


@rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float, kind: str) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("ktfx::add_rms_norm", mutates_args=())
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """s = x + residual rounded to their dtype; returns (rms_norm(s), s), both contiguous. x and residual: one shape."""
    _check(x, weight, kind)
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise KtfxError(
            f"add_rms_norm got {x.dtype} {tuple(x.shape)} and {residual.dtype} {tuple(residual.shape)}",
            expected="one shape and dtype",
            mend="add first where the two differ",
        )
    if runs_kernels(x):
        y, total = kernels("norms").rms_norm(x, weight, eps, kind, residual)
        return y, total
    total = (x + residual).contiguous()
    return rms_norm_reference(total, weight, eps, kind), total


@add_rms_norm.register_fake
def _(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)

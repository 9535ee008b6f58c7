"""Gated activations: ``ktfx::gated_mul(gate, up)``, and ``ktfx::silu_and_mul`` for the commonest."""

from __future__ import annotations

import torch

from ktfx.errors import KtfxError
from ktfx.ops.experts import ACTIVATIONS
from ktfx.ops.triton_loader import kernels, runs_kernels


def gated_mul_reference(
    gate: torch.Tensor, up: torch.Tensor, act: str = "silu", kind: str = "mul", alpha: float = 1.702, limit: float = 7.0
) -> torch.Tensor:
    """The definition, in ATen; formed in float32 (or wider), rounded once."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    g, u = gate.to(wide), up.to(wide)
    if kind == "clamped":
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
        return ((u + 1) * g * torch.sigmoid(g * alpha)).to(gate.dtype)
    return (ACTIVATIONS[act](g) * u).to(gate.dtype)


@torch.library.custom_op("ktfx::gated_mul", mutates_args=())
def gated_mul(
    gate: torch.Tensor, up: torch.Tensor, act: str = "silu", kind: str = "mul", alpha: float = 1.702, limit: float = 7.0
) -> torch.Tensor:
    """act(gate)·up (kind ``mul``) or gpt-oss's (up+1)·gate·sigmoid(alpha·gate) with both clamped (kind ``clamped``).

    gate, up: (…, D), one shape and dtype, any strides (the halves of a merged projection are read in place). Returns
    that shape, contiguous. act: a key of ``ktfx.ops.experts.ACTIVATIONS``.
    """
    if act not in ACTIVATIONS or kind not in ("mul", "clamped"):
        raise KtfxError(
            f"no gated activation {act!r} of kind {kind!r}",
            expected=f"{', '.join(ACTIVATIONS)}; mul, clamped",
            mend="name one of these",
        )
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise KtfxError(
            f"gated_mul got {gate.dtype} {tuple(gate.shape)} and {up.dtype} {tuple(up.shape)}",
            expected="one shape and dtype",
            mend="pass the two halves of one projection, or two projections of one width",
        )
    if runs_kernels(gate):
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        result: torch.Tensor = kernels("activations").gated_mul(gate, up, act, kind, alpha, limit, out)
        return result
    return gated_mul_reference(gate, up, act, kind, alpha, limit).contiguous()


@gated_mul.register_fake
def _(
    gate: torch.Tensor, up: torch.Tensor, act: str = "silu", kind: str = "mul", alpha: float = 1.702, limit: float = 7.0
) -> torch.Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("ktfx::silu_and_mul", mutates_args=())
def silu_and_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate)·up; see ``gated_mul``."""
    out: torch.Tensor = torch.ops.ktfx.gated_mul(gate, up)
    return out


@silu_and_mul.register_fake
def _(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate.new_empty(gate.shape)

"""Attention of one new token over MLA's compressed cache (``ktfx::mla_decode``), defined in ATen.

Shape suffixes: B sequences, H heads, L cache length, R rank of the latent (512), P rotary width (64).
"""

from __future__ import annotations

import torch

from ktfx.errors import KtfxError
from ktfx.ops.attention import check_mask, mask_bounds, probabilities, with_mask
from ktfx.ops.triton_loader import kernels, runs_kernels


def mla_decode_reference(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """The definition, in ATen; float32 or wider. A row of which the mask keeps nothing gives 0, as SDPA does."""
    wide = torch.promote_types(q_latent.dtype, torch.float32)
    c_B1LR = latent.to(wide)
    scores = q_latent.to(wide) @ c_B1LR.transpose(2, 3) + q_rope.to(wide) @ k_rope.to(wide).transpose(2, 3)
    scores = scores * scale
    return (probabilities(with_mask(scores, mask)) @ c_B1LR).to(q_latent.dtype)


def _check(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
) -> None:
    B, H, _, R = q_latent.shape
    L, P = latent.shape[2], q_rope.shape[3]
    mend = "check the cache's layout"
    wanted = {
        "q_latent": (q_latent, (B, H, 1, R)),
        "q_rope": (q_rope, (B, H, 1, P)),
        "latent": (latent, (B, 1, L, R)),
        "k_rope": (k_rope, (B, 1, L, P)),
    }
    for name, (given, shape) in wanted.items():
        if tuple(given.shape) != shape or given.dtype != q_latent.dtype:
            raise KtfxError(
                f"mla_decode got {name} {given.dtype} {tuple(given.shape)}",
                expected=f"{q_latent.dtype} {shape}",
                mend=mend,
            )
    check_mask("mla_decode", mask, bounds, (B, H, L))


@torch.library.custom_op("ktfx::mla_decode", mutates_args=())
def mla_decode(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    bounds: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax((q_latent·latentᵀ + q_rope·k_ropeᵀ)·scale + mask)·latent: (B, H, 1, R) in q_latent's dtype, contiguous.

    q_latent (B, H, 1, R): the query's part without positions, times the key half of kv_b_proj; q_rope (B, H, 1, P).
    latent (B, 1, L, R), k_rope (B, 1, L, P): the whole cache, shared by all heads. mask: None, or (1 or B, 1 or H, 1,
    L), booleans (True: attended to) or floats that are added. bounds: ``ktfx::mask_bounds`` of the mask, made here if
    not given; the cache is read between them only. The algebra is that of DeepSeek-V2 (arXiv 2405.04434, 2.1.2).
    """
    _check(q_latent, q_rope, latent, k_rope, mask, bounds)
    if runs_kernels(q_latent):
        out = torch.empty(q_latent.shape, dtype=q_latent.dtype, device=q_latent.device)
        if mask is not None and bounds is None:
            bounds = mask_bounds(mask)
        family = kernels("mla_decode")
        result: torch.Tensor = family.mla_decode(q_latent, q_rope, latent, k_rope, mask, bounds, scale, out)
        return result
    return mla_decode_reference(q_latent, q_rope, latent, k_rope, mask, scale).contiguous()


@mla_decode.register_fake
def _(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    bounds: torch.Tensor | None = None,
) -> torch.Tensor:
    return q_latent.new_empty(list(q_latent.shape))

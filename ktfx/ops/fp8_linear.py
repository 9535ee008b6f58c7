"""``ktfx::fp8_linear``: a linear layer over an fp8 block weight as its checkpoint stores it, by dequantising it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ktfx.formats import dequantize, from_fp8_blocks


@torch.library.custom_op("ktfx::fp8_linear", mutates_args=())
def fp8_linear(
    x: torch.Tensor, weight_NK: torch.Tensor, scale_inv: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """(…, K) → (…, N) in x's dtype. weight: float8_e4m3fn; scale_inv: float, one per 128 × 128 block. x is not rounded.

    A weight of another float dtype is taken as dequantised already (``verify`` puts other numbers in its place).
    Raises WeightError if weight and scales do not fit together.
    """
    stored = weight_NK.dtype == torch.float8_e4m3fn
    weight = dequantize(from_fp8_blocks(weight_NK, scale_inv), x.dtype) if stored else weight_NK.to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype)).contiguous()


@fp8_linear.register_fake
def _(x: torch.Tensor, weight_NK: torch.Tensor, scale_inv: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty([*x.shape[:-1], weight_NK.shape[0]])

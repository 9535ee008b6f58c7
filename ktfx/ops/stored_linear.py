"""``ktfx::stored_linear``: a linear layer over a weight as its checkpoint stores it, dequantised at each call."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ktfx.formats import dequantize
from ktfx.stored_weights import dequantize_blocks, stored_weight


@torch.library.custom_op("ktfx::stored_linear", mutates_args=())
def stored_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    block: list[int],
) -> torch.Tensor:
    """(…, K) → (…, N) in x's dtype; x itself is not rounded.

    weight, scales, zeros: as ``ktfx.formats`` keeps ``format``. Where format is empty: float8_e4m3fn (N, K) with scales
    per ``block``, of a size that kernels have not. A weight of a float dtype of more than 8 bits is taken as
    dequantised already (``verify`` puts other numbers in its place).
    """
    if weight.is_floating_point() and weight.element_size() > 1:
        plain = weight.to(x.dtype)
    elif format:
        tensors = [weight, scales, *([] if zeros is None else [zeros])]
        plain = dequantize(stored_weight(format, (weight.shape[0], x.shape[-1]), tensors), x.dtype)
    else:
        plain = dequantize_blocks(weight, scales, block, x.dtype)
    return F.linear(x, plain, None if bias is None else bias.to(x.dtype)).contiguous()


@stored_linear.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    block: list[int],
) -> torch.Tensor:
    return x.new_empty([*x.shape[:-1], weight.shape[0]])

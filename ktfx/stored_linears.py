"""Linear layers that a checkpoint keeps quantised: transformers' ``FP8Linear`` (DeepSeek's blocks of 128 × 128).

Its own forward picks a GPU kernel at run time, which cannot be traced. ``ktfx.compile`` lets such layers call
``ktfx::fp8_linear`` instead, an op that any device runs and that ``rewrite_linears`` replaces by a kernel over the same
bits. Unlike transformers' kernel neither rounds the layer's input to fp8.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from ktfx.formats import FP8_BLOCK

_FORWARD = "_ktfx_stored_forward"


def stored_format(module: nn.Module) -> str | None:
    """``fp8`` for a layer whose weight lies in fp8 blocks that ktfx reads as they are, else None."""
    weight, scale = getattr(module, "weight", None), getattr(module, "weight_scale_inv", None)
    if not isinstance(weight, torch.Tensor) or not isinstance(scale, torch.Tensor):
        return None
    if weight.dtype != torch.float8_e4m3fn or weight.dim() != 2 or not scale.dtype.is_floating_point:
        return None
    blocks = tuple(-(-size // FP8_BLOCK) for size in weight.shape)
    return "fp8" if tuple(scale.shape) == blocks else None


def adopt(model: nn.Module) -> int:
    """Let every such layer run ``ktfx::fp8_linear``; returns how many. ``give_up`` undoes it."""
    from ktfx.ops.fp8_linear import fp8_linear  # noqa: F401

    count = 0
    for module in model.modules():
        if stored_format(module) is None or not isinstance(module, nn.Linear) or _FORWARD in module.__dict__:
            continue
        object.__setattr__(module, _FORWARD, module.__dict__.get("forward"))
        module.__dict__["forward"] = MethodType(_forward, module)
        count += 1
    return count


def give_up(model: nn.Module) -> None:
    """The layers' own forwards come back."""
    for module in model.modules():
        if _FORWARD not in module.__dict__:
            continue
        before = module.__dict__.pop(_FORWARD)
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


def _forward(self: Any, input: torch.Tensor) -> torch.Tensor:
    return torch.ops.ktfx.fp8_linear(input, self.weight, self.weight_scale_inv, self.bias)

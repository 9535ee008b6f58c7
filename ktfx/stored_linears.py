"""Linear layers over a weight that a checkpoint keeps quantised, run on its own bits.

Two kinds: transformers' ``FP8Linear`` (fp8 with scales per block), which ``ktfx.adopt`` lets run
``ktfx::stored_linear``; and ``StoredLinear``, ktfx's own, which ``ktfx.from_pretrained`` puts where a checkpoint holds
a layer in fp8 or 4-bit integers. ``rewrite_linears`` replaces the op by a kernel over the same bits. Unlike
transformers' kernel neither rounds the layer's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ktfx.ops import stored_linear as stored_linear  # registers the op
from ktfx.stored_weights import SCALES, ZEROS, stored_format_of

# The names that a module may keep the scales of its weight under: DeepSeek's and transformers', ktfx's own.
SCALE_NAMES = ("weight_scale_inv", "weight_scale")
ZERO_NAME = "weight_zeros"


@dataclass(frozen=True)
class StoredWeightOf:
    """How a linear layer keeps its weight.

    parts: ``weight``, ``scales`` and, with zero points, ``zeros`` → the parameter's name. format: as ``ktfx.formats``
    names it; empty where kernels have no such format. block: the fp8 block where format is empty.
    """

    parts: dict[str, str]
    format: str
    block: tuple[int, ...] = ()


def stored_weight_of(module: nn.Module) -> StoredWeightOf | None:
    """What a linear layer stores, or None for a plain weight."""
    if not isinstance(module, nn.Linear):
        return None
    weight = getattr(module, "weight", None)
    name = next((n for n in SCALE_NAMES if isinstance(getattr(module, n, None), torch.Tensor)), None)
    if not isinstance(weight, torch.Tensor) or name is None or weight.dim() != 2 or weight.dtype.itemsize > 1:
        return None
    scales, zeros = getattr(module, name), getattr(module, ZERO_NAME, None)
    parts = {"weight": "weight", SCALES: name} | ({} if zeros is None else {ZEROS: ZERO_NAME})
    format = stored_format_of((module.out_features, module.in_features), weight, scales, zeros)
    if format is not None:
        return StoredWeightOf(parts, format)
    if weight.dtype != torch.float8_e4m3fn:
        return None
    return StoredWeightOf(parts, "", tuple(getattr(module, "block_size", None) or ()))


def stored_format(module: nn.Module) -> str | None:
    """The format of a layer's stored weight, where it is one that kernels read as it is."""
    found = stored_weight_of(module)
    return found.format or None if found is not None else None


class StoredLinear(nn.Linear):
    """A layer whose weight lies in a format of ``ktfx.formats``. Built empty; ``fill`` gives it its tensors.

    Parameters: ``weight`` (values), ``weight_scale`` (``weight_scale_inv`` for fp8), ``weight_zeros`` (int4zp),
    ``bias``; buffer ``input_order``, int64 (K,), for act-order: column j belongs to input ``input_order[j]``.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        for name in ("weight", *SCALE_NAMES, ZERO_NAME, "bias"):
            self.register_parameter(name, None)
        self.register_buffer("input_order", None)
        self.stored_call: StoredWeightOf | None = None

    def fill(
        self, tensors: Sequence[torch.Tensor], bias: torch.Tensor | None = None, order: torch.Tensor | None = None
    ) -> None:
        """tensors: ``QuantizedWeight.tensors()``."""
        scale = SCALE_NAMES[0] if tensors[0].dtype == torch.float8_e4m3fn else SCALE_NAMES[1]
        for name, tensor in zip(("weight", scale, ZERO_NAME), tensors, strict=False):
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.input_order = order
        self.stored_call = stored_weight_of(self)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.input_order is not None:
            input = input.index_select(-1, self.input_order)
        return run_stored_linear(self, input)


def run_stored_linear(module: Any, input: torch.Tensor) -> torch.Tensor:
    """A layer's forward over its stored tensors; ``module.stored_call``, found before tracing, says which."""
    stored: StoredWeightOf = module.stored_call
    found = [getattr(module, name) for name in stored.parts.values()]
    weight, scales, zeros = [*found, None][:3]
    return torch.ops.ktfx.stored_linear(input, weight, scales, zeros, module.bias, stored.format, list(stored.block))

"""``ktfx::stored_experts``: routed experts over weights as their checkpoint stores them, dequantised at each call.

What runs where no rule names a kernel: right on any device, one chosen expert after another, fast on none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ktfx.formats import dequantize
from ktfx.ops.experts import ExpertsSpec, reference_experts
from ktfx.stored_weights import dequantize_blocks, stored_weight


@dataclass(frozen=True)
class StoredMatrices:
    """One part of all experts, dequantised an expert at a time: ``[e]`` is (N, K) in float32.

    tensors: values, scales and zero points, stacked over experts; one float tensor is taken as dequantised already.
    format: as ``ktfx.formats`` names it; empty for fp8 with scales per ``block``.
    halves: whether they are a gate and an up projection, one above the other.
    order: (E, parts, K) or None; the columns of each of ``parts`` equal stacks of rows, as they were sorted: the stored
        column j belongs to input ``order[e, part, j]``.
    """

    tensors: Sequence[torch.Tensor]
    format: str
    inputs: int
    block: Sequence[int] = ()
    halves: bool = False
    order: torch.Tensor | None = None

    def __getitem__(self, e: int) -> torch.Tensor:
        values = self.tensors[0][e]
        if values.is_floating_point() and values.element_size() > 1:
            return values
        if self.format:
            weight = stored_weight(self.format, (values.shape[0], self.inputs), [t[e] for t in self.tensors])
            plain = dequantize(weight)
        else:
            plain = dequantize_blocks(values, self.tensors[1][e], self.block, torch.float32, self.halves)
        if self.order is None:
            return plain
        order = self.order[e].long()
        halves = plain.unflatten(0, (order.shape[0], -1))
        back = torch.argsort(order, dim=-1)[:, None, :].expand_as(halves)
        return halves.gather(2, back).flatten(0, 1)


@torch.library.custom_op("ktfx::stored_experts", mutates_args=())
def stored_experts(
    x_TH: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    biases: list[torch.Tensor],
    order: torch.Tensor | None,
    spec: str,
    block: list[int],
) -> torch.Tensor:
    """Every token through its K chosen experts, weighted and summed: (T, H) → (T, H) in x's dtype.

    gate_up (E, 2I or I, H), down (E, H, I): values, scales and zero points in the spec's format and the plain layout
    (gate rows first); with the format ``model``, fp8 with scales per ``block``. biases: of gate_up and down, or none.
    order: gate_up's sorted inputs, see ``StoredMatrices``.
    """
    decoded = ExpertsSpec.decode(spec)
    format = "" if decoded.weights == "model" else decoded.weights
    parts: dict[str, Any] = {
        "gate_up": StoredMatrices(gate_up, format, decoded.hidden, block, decoded.gate != "none", order),
        "down": StoredMatrices(down, format, decoded.intermediate, block),
    }
    plain: Mapping[str, Any] = parts | dict(zip(("gate_up_bias", "down_bias"), biases, strict=False))
    return reference_experts(decoded, x_TH, ids_TK, weights_TK, plain)


@stored_experts.register_fake
def _(
    x_TH: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    biases: list[torch.Tensor],
    order: torch.Tensor | None,
    spec: str,
    block: list[int],
) -> torch.Tensor:
    return x_TH.new_empty(x_TH.shape)

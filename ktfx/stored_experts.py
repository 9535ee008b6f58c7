"""Routed experts whose weights a checkpoint keeps quantised, run on its own bits.

``StoredExperts`` is what ``ktfx.from_pretrained`` puts in the place of a model's experts; transformers' ``FP8Experts``
are run the same way (``ktfx.adopt``). Both call ``ktfx::stored_experts``, which ``rewrite_experts`` replaces by a
kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ktfx.ops import stored_experts as stored_experts  # registers the op
from ktfx.ops.experts import ExpertsSpec
from ktfx.ops.experts_layout import SCALE_SUFFIXES, ZERO_SUFFIX, stored_layout


class StoredExperts(nn.Module):
    """All routed experts of a layer, in a format of ``ktfx.formats`` and the plain layout: gate rows, then up rows.

    Built empty, from the spec of the module whose place it takes; ``fill`` gives it its tensors. Parameters:
    ``gate_up_proj`` (E, 2I, …) or ``up_proj``, ``down_proj`` (E, H, …), each with ``_scale`` (``_scale_inv`` for fp8)
    and, with zero points, ``_zeros``; biases as ``…_bias``. Buffer ``input_order``: see ``ktfx.ops.stored_experts``.
    ``stands_for``: the class of the module whose place it takes; rules that name that class mean this one.
    ``origin``: where its tensors can be read again (``ktfx.stored_checkpoint.StoredOrigin``), or None.
    """

    def __init__(self, spec: ExpertsSpec, stands_for: type | None = None) -> None:
        super().__init__()
        self.stands_for = stands_for
        self.spec = replace(spec.canonical(), weights="model")
        self.num_experts = spec.num_experts
        self.has_gate, self.has_bias = spec.gate != "none", spec.has_bias
        self.is_transposed, self.is_concatenated = False, True
        self.register_buffer("input_order", None)
        self.stored_call: StoredExpertsCall | None = None
        self.origin: Any = None

    @property
    def up_name(self) -> str:
        return "gate_up_proj" if self.has_gate else "up_proj"

    def parameter_names(self, gate_up: Sequence[torch.Tensor], down: Sequence[torch.Tensor]) -> list[str]:
        """The names of what ``QuantizedWeight.tensors()`` of both holds, gate_up's first."""
        found = []
        for name, tensors in ((self.up_name, gate_up), ("down_proj", down)):
            scale = SCALE_SUFFIXES[0] if tensors[0].dtype == torch.float8_e4m3fn else SCALE_SUFFIXES[1]
            found += [name + suffix for suffix, _ in zip(("", scale, ZERO_SUFFIX), tensors, strict=False)]
        return found

    def fill(
        self,
        gate_up: Sequence[torch.Tensor],
        down: Sequence[torch.Tensor],
        biases: Mapping[str, torch.Tensor] | None = None,
        order: torch.Tensor | None = None,
    ) -> None:
        """gate_up, down: ``QuantizedWeight.tensors()``, stacked. biases: ``gate_up_bias``, ``down_bias``."""
        named = dict(zip(self.parameter_names(gate_up, down), [*gate_up, *down], strict=True))
        own = {"gate_up_bias": f"{self.up_name}_bias", "down_bias": "down_proj_bias"}
        named |= {own[part]: bias for part, bias in (biases or {}).items()}
        self.fill_by_name(named if order is None else named | {"input_order": order})

    def fill_by_name(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """tensors: by the names of parameters, and ``input_order``."""
        for name, tensor in tensors.items():
            if name == "input_order":
                self.input_order = tensor
            else:
                setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        self.stored_call = StoredExpertsCall.of(self)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(…, H), (T, K) expert ids and (T, K) weights to (…, H)."""
        return run_stored_experts(self, hidden_states, top_k_index, top_k_weights)


@dataclass(frozen=True)
class StoredExpertsCall:
    """What a module hands ``ktfx::stored_experts``: its parameters by name, constants. Found before tracing."""

    gate_up: tuple[str, ...]
    down: tuple[str, ...]
    biases: tuple[str, ...]
    order: str | None
    hidden: int
    spec: str
    block: tuple[int, ...]

    @staticmethod
    def of(module: nn.Module) -> StoredExpertsCall | None:
        """None for a module that the op cannot run."""
        stored = stored_layout(module)
        if stored is None:
            return None
        layout = stored.layout
        biases = tuple(layout.parameters[p] for p in ("gate_up_bias", "down_bias") if layout.spec.has_bias)
        gate_up, down = tuple(layout.names("gate_up")), tuple(layout.names("down"))
        return StoredExpertsCall(
            gate_up, down, biases, stored.order, layout.spec.hidden, layout.spec.encode(), stored.block
        )


def run_stored_experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """An experts module's forward over its stored tensors; ``module.stored_call`` says which these are."""
    call: StoredExpertsCall = module.stored_call
    x_TH = hidden_states if hidden_states.dim() == 2 else hidden_states.reshape(-1, call.hidden)
    out_TH = torch.ops.ktfx.stored_experts(
        x_TH,
        top_k_index,
        top_k_weights,
        [getattr(module, name) for name in call.gate_up],
        [getattr(module, name) for name in call.down],
        [getattr(module, name) for name in call.biases],
        None if call.order is None else getattr(module, call.order),
        call.spec,
        list(call.block),
    )
    return out_TH if hidden_states.dim() == 2 else out_TH.reshape(hidden_states.shape)

"""What a rule means for one linear layer: which kernel of ``ktfx::linear_quant``, over which format, or why not.

The pass, the budget, ``lint`` and the error report ask here, so that they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ktfx.devices import is_host
from ktfx.op_names import family
from ktfx.ops.linear import LinearSpec, linear_kernel, linear_kernel_names
from ktfx.resolve import PHASES, ModulePlacement
from ktfx.stored_linears import stored_weight_of
from ktfx.stored_weights import SCALES, kept_format, scales_dtype


@dataclass(frozen=True)
class LinearChoice:
    """kernel: a registered name (``linear.<kernel>`` in a rule file; ``linear.aten`` is ``reference``).

    op: as a reader knows it. dtype: that of the layer's input and output, and of scales where a format keeps them so.
    """

    kernel: str
    spec: LinearSpec
    op: str
    dtype: torch.dtype


def linear_choice(module: nn.Module, placement: ModulePlacement, phase: str) -> LinearChoice | None:
    """The kernel that a rule asks for, or None where the layer keeps the model's own operation.

    ``aten`` and ``linear.aten`` with a quantised format run on the dequantised weight; without one they change nothing.
    """
    at = placement.at(phase)
    if not isinstance(module, nn.Linear) or placement.rule is None or at.op is None:
        return None
    weights = at.weights or "model"
    stored = stored_weight_of(module)
    if at.op in ("aten", "linear.aten"):
        if weights == "model":
            return None
        kernel, op = "reference", "linear.aten"
    elif family(at.op) == "linear":
        kernel, op = at.op.removeprefix("linear."), at.op
    else:
        return None
    dtype = module.weight.dtype
    if stored is not None and stored.format:
        weights = kept_format(stored.format, weights)
        # What scales are rounded to, should a rule ask for another format than the checkpoint's.
        dtype = scales_dtype(stored.format, module.get_parameter(stored.parts[SCALES]))
    activations = str(placement.rule.replace.options.get("activations", "model"))
    spec = LinearSpec(module.in_features, module.out_features, weights, activations)
    return LinearChoice(kernel, spec, op, dtype)


def why_not(choice: LinearChoice, device_name: str, real: torch.device, devices: Mapping[str, str]) -> str | None:
    """None if the kernel can run there, else the reason in words. devices: those that the rule file declares."""
    if choice.kernel not in linear_kernel_names():
        return f"no kernel {choice.op} is registered in this installation"
    if choice.kernel == "triton" and is_host(device_name, devices):
        return f"it runs on GPUs, and {device_name} is the host in this phase; linear.cpu runs there"
    return linear_kernel(choice.kernel).unsupported(choice.spec, choice.dtype, real)


def packed_bytes(choice: LinearChoice) -> int:
    """Bytes of the layer's weight as the kernel keeps it."""
    metas = linear_kernel(choice.kernel).packed_meta(choice.spec, choice.dtype)
    return sum(torch.Size(m.shape).numel() * m.dtype.itemsize for m in metas)


def read_as_they_are(choice: LinearChoice, module: nn.Module) -> tuple[str, ...] | None:
    """The layer's own parameters, by name, if the kernel reads just these, so that no other copy need exist."""
    stored = stored_weight_of(module)
    kept = stored.format if stored is not None else "model"
    if choice.spec.weights != kept:
        return None
    names = tuple(stored.parts.values()) if stored is not None else ("weight",)
    own = [(tuple(p.shape), p.dtype) for p in map(module.get_parameter, names)]
    metas = linear_kernel(choice.kernel).packed_meta(choice.spec, choice.dtype)
    return names if [(m.shape, m.dtype) for m in metas] == own else None


def only_packed(module: nn.Module, placement: ModulePlacement) -> bool:
    """Whether both phases read the layer's weight in a kernel's own layout: the parameter itself then needs no place
    on their devices."""
    for phase in PHASES:
        choice = linear_choice(module, placement, phase)
        if choice is None or choice.kernel not in linear_kernel_names() or read_as_they_are(choice, module) is not None:
            return False
        if linear_kernel(choice.kernel).unsupported(choice.spec, choice.dtype, torch.device("cpu")) is not None:
            return False
    return True

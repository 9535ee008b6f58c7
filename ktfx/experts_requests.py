"""What a placement asks of the ``WeightStore`` for an experts module; the same before a graph exists as from one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from ktfx.devices import DeviceMap
from ktfx.ops.experts import ExpertsSpec, experts_kernel
from ktfx.ops.experts_layout import ExpertsLayout, experts_layout
from ktfx.resolve import ModulePlacement, Resolution
from ktfx.stored_weights import kept_format
from ktfx.weight_requests import PackedRequest

PHASES = ("generate", "prefill")


def kernel_of(placement: ModulePlacement, phase: str) -> str | None:
    """``cpu`` for ``experts.cpu``; None where the model's own operations stay."""
    op = placement.at(phase).op
    if op is None or not op.startswith("experts.") or op == "experts.aten":
        return None
    return op.removeprefix("experts.")


def requested_spec(layout: ExpertsLayout, placement: ModulePlacement, phase: str) -> ExpertsSpec:
    """The module's spec with the format and activations that its rule asks for."""
    at = placement.at(phase)
    options = dict(placement.rule.replace.options) if placement.rule is not None else {}
    asked = at.weights or "model"
    spec = replace(layout.spec, weights=kept_format(layout.spec.weights, asked) if layout.stored else asked)
    if "activations" in options:
        spec = replace(spec, activations=str(options["activations"]))
    return spec


def request_for(path: str, layout: ExpertsLayout, kernel: str, spec: ExpertsSpec) -> PackedRequest:
    return PackedRequest(kernel, spec, tuple((part, f"{path}.{name}") for part, name in layout.parameters.items()))


def read_parameters(module: nn.Module, layout: ExpertsLayout, kernel: str, spec: ExpertsSpec) -> list[str] | None:
    """The parameters that the kernel reads as they are, in the order of its packed tensors; None if it packs them."""
    if spec.weights != layout.spec.weights or not experts_kernel(kernel).takes_parameters(spec):
        return None
    names = [*layout.names("gate_up"), *layout.names("down")]
    names += [layout.parameters[part] for part in ("gate_up_bias", "down_bias") if spec.has_bias]
    own = [getattr(module, name) for name in names]
    if layout.stored:
        metas = experts_kernel(kernel).packed_meta(spec, layout.dtype)
        if [(tuple(t.shape), t.dtype) for t in own] != [(m.shape, m.dtype) for m in metas]:
            return None
    return names if all(t.is_contiguous() for t in own) else None


@dataclass(frozen=True)
class PlacedExperts:
    """An experts module that only packed weights are read of: (request, device name) for each phase, generate first."""

    path: str
    layout: ExpertsLayout
    requests: tuple[tuple[PackedRequest, str], ...]


def placed_experts(model: nn.Module, resolution: Resolution, devices: DeviceMap) -> Iterator[PlacedExperts]:
    """The modules whose every phase runs on a kernel that takes them."""
    for path, placement in resolution.placements.items():
        if placement.role != "experts" or None in [kernel_of(placement, phase) for phase in PHASES]:
            continue
        module = model.get_submodule(path)
        layout = experts_layout(module)
        if isinstance(layout, str):
            continue
        requests: dict[tuple[PackedRequest, str], None] = {}
        for phase in PHASES:
            name, at = kernel_of(placement, phase), placement.at(phase)
            assert name is not None
            spec = requested_spec(layout, placement, phase)
            if experts_kernel(name).unsupported(spec, layout.dtype, devices[at.device]) is not None:
                break
            if read_parameters(module, layout, name, spec) is not None:
                break
            requests[(request_for(path, layout, name, spec), at.device)] = None
        else:
            yield PlacedExperts(path, layout, tuple(requests))

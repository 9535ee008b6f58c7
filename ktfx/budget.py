"""Does everything fit? Asked from the module tree before a single byte is moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ktfx.devices import DeviceMap
from ktfx.errors import PlacementError
from ktfx.experts_requests import requested_spec
from ktfx.fusion import OnDevice, is_meant
from ktfx.linear_rules import linear_choice, packed_bytes, read_as_they_are
from ktfx.ops.experts import experts_kernel, experts_kernel_names
from ktfx.ops.experts_layout import experts_layout
from ktfx.ops.linear import LinearSpec, linear_kernel, linear_kernel_names
from ktfx.pass_manager import build_pipeline
from ktfx.resolve import ModulePlacement, Resolution
from ktfx.stored_linears import stored_format
from ktfx.text import human_bytes
from ktfx.weight_requests import LINEAR, DequantisedRequest


@dataclass(frozen=True)
class WeightPlan:
    """One weight as it will lie: dotted name, device name, format, bytes."""

    name: str
    module: str
    device: str
    format: str
    nbytes: int


def plan_weights(model: nn.Module, resolution: Resolution) -> list[WeightPlan]:
    """Where each weight will lie and how large, for both phases; a weight used in two places is listed twice.

    Works on the meta device. Tied parameters count once a device. Decode's own copy of a quantised projection that
    ``absorb_mla`` takes apart is listed too.
    """
    plans: dict[tuple[object, str, str], WeightPlan] = {}
    for path, module in model.named_modules():
        placement = resolution.of(path)
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if not own:
            continue
        for phase in ("prefill", "generate"):
            packed = _packed_bytes(module, placement, phase)
            device = resolution.glue_device(path, phase)
            for leaf, tensor in own:
                name = f"{path}.{leaf}" if path else leaf
                if packed is not None and leaf in packed[1]:
                    plan = WeightPlan(name, path, device, packed[0], packed[1][leaf])
                else:
                    plan = WeightPlan(name, path, device, "model", tensor.numel() * tensor.element_size())
                plans.setdefault((_identity(tensor), device, plan.format), plan)
    return [*plans.values(), *_absorbed_copies(model, resolution)]


def _absorbed_copies(model: nn.Module, resolution: Resolution) -> list[WeightPlan]:
    """Dequantised copies of layers that expand latents to heads, where ``absorb_mla`` finds what fuse_attention made.

    Told by the name that transformers gives the layer; the pass itself looks at the graph.
    """
    passes = {p.name: p.options for p in build_pipeline(resolution.ruleset.passes)}
    options, found = passes.get("fuse_attention"), []
    if "absorb_mla" not in passes or not isinstance(options, OnDevice):
        return []
    for path, module in model.named_modules():
        if path.rpartition(".")[2] != "kv_b_proj" or not isinstance(module, nn.Linear):
            continue
        device = resolution.glue_device(path, "generate")
        asked = is_meant(options.device, device, resolution.ruleset)
        choice = linear_choice(module, resolution.of(path), "generate")
        format = choice.spec.weights if choice is not None else stored_format(module) or "model"
        sorted_inputs = getattr(module, "input_order", None) is not None
        if not asked or sorted_inputs or format == "model" or (choice and choice.spec.activations != "model"):
            continue
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
        request = DequantisedRequest(LinearSpec(module.in_features, module.out_features, format), dtype, ())
        nbytes = module.out_features * module.in_features * dtype.itemsize
        found.append(WeightPlan(f"{path}.weight", path, device, request.format, nbytes))
    return found


def _identity(tensor: torch.Tensor) -> object:
    return id(tensor)


def _packed_bytes(module: nn.Module, placement: ModulePlacement, phase: str) -> tuple[str, dict[str, int]] | None:
    """(format, bytes of each parameter) where a kernel packs the module's weights, else None."""
    choice = linear_choice(module, placement, phase)
    if choice is not None:
        if choice.kernel not in linear_kernel_names() or read_as_they_are(choice, module):
            return None
        if linear_kernel(choice.kernel).unsupported(choice.spec, choice.dtype, torch.device("cpu")) is not None:
            return None
        return f"{LINEAR}{choice.kernel}:{choice.spec.weights}", {"weight": packed_bytes(choice)}
    at = placement.at(phase)
    kernel_name = (at.op or "").removeprefix("experts.")
    if placement.role != "experts" or not (at.op or "").startswith("experts.") or kernel_name == "aten":
        return None
    layout = experts_layout(module)
    if isinstance(layout, str) or kernel_name not in experts_kernel_names():
        return None
    spec = requested_spec(layout, placement, phase)
    kernel = experts_kernel(kernel_name)
    if kernel.unsupported(spec, layout.dtype, torch.device("cpu")) is not None:
        return None
    total = sum(_count(m.shape) * m.dtype.itemsize for m in kernel.packed_meta(spec, layout.dtype))
    names = list(layout.parameters.values())
    share = {name: getattr(module, name).numel() for name in names}
    whole = sum(share.values())
    return f"{kernel_name}:{spec.weights}", {name: total * share[name] // whole for name in names}


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def bytes_by_device(plans: list[WeightPlan]) -> dict[str, int]:
    total: dict[str, int] = {}
    for plan in plans:
        total[plan.device] = total.get(plan.device, 0) + plan.nbytes
    return total


def check_budget(
    model: nn.Module,
    resolution: Resolution,
    devices: DeviceMap,
    memory: Mapping[str, int] | None,
    logical_name: str,
) -> None:
    """PlacementError if a device cannot hold its weights: the given ``memory``, else what a real GPU has free."""
    plans = plan_weights(model, resolution)
    for device, needed in bytes_by_device(plans).items():
        limit = _limit(device, devices, memory, logical_name)
        if limit is None or needed <= limit:
            continue
        heavy: dict[str, int] = {}
        for plan in plans:
            if plan.device == device:
                heavy[resolution.of(plan.module).role or "other"] = (
                    heavy.get(resolution.of(plan.module).role or "other", 0) + plan.nbytes
                )
        parts = ", ".join(f"{role} {human_bytes(n)}" for role, n in sorted(heavy.items(), key=lambda i: -i[1])[:4])
        raise PlacementError(
            f"{device} would hold {human_bytes(needed)} of weights ({parts}) and has room for {human_bytes(limit)}",
            origin=resolution.ruleset.origin,
            expected=f"at most {human_bytes(limit)} on {device}",
            mend="give it fewer layers in `layers:`, put more layers' experts on the host (op: experts.cpu), or choose "
            "a smaller weight format (weights: int4)",
        )


def _limit(device: str, devices: DeviceMap, memory: Mapping[str, int] | None, logical_name: str) -> int | None:
    if memory is not None and device in memory:
        return memory[device]
    real = devices[device]
    if real.type != "cuda" or device == logical_name:
        return None
    free, _ = torch.cuda.mem_get_info(real)
    return free

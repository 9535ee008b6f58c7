"""How far the weights that kernels compute with are from the model's own: one figure a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ktfx.experts_requests import kernel_of, request_for, requested_spec
from ktfx.formats import dequantize, format_name, from_tensors, parse_format
from ktfx.linear_rules import linear_choice, read_as_they_are
from ktfx.ops.experts import experts_kernel, experts_kernel_names
from ktfx.ops.experts_layout import experts_layout
from ktfx.ops.linear import linear_kernel, linear_kernel_names
from ktfx.placed_tensor import physical_of
from ktfx.released_tensor import ReleasedTensor
from ktfx.resolve import PHASES, Resolution
from ktfx.stored_linears import stored_weight_of
from ktfx.stored_weights import SCALES, ZEROS
from ktfx.weight_requests import LINEAR, LinearRequest, PackedRequest, WeightRequest
from ktfx.weights import WeightStore

CPU = torch.device("cpu")


@dataclass(frozen=True)
class QuantisationError:
    """One weight as one kernel keeps it.

    name: the dotted parameter name. format: ``linear.triton:int4``. error: ‖w − ŵ‖ / ‖w‖ over the whole weight, sums in
    float64; 0 for bits that a checkpoint stored so; None where the model's own numbers were released. device: the
    device name, "" before anything is placed.
    """

    module: str
    name: str
    format: str
    error: float | None
    device: str = ""


def errors_in(store: WeightStore) -> list[QuantisationError]:
    """The rounded weights that a model's graphs have packed so far, in the order of packing."""
    found = []
    for entry in store.entries():
        request = entry.request
        if request is None or _keeps_all(request):
            continue
        own = {part: store.tensor(name) for part, name in request.parts}
        gone = any(isinstance(t, ReleasedTensor) for t in own.values())
        tensors = {} if gone else {part: physical_of(t).detach() for part, t in own.items()}
        found += list(_errors(request, entry.tensors, tensors, entry.device))
    return found


def planned_errors(model: nn.Module, resolution: Resolution) -> Iterator[QuantisationError]:
    """What the rules would do to a model's weights: each layer is packed on the host, measured, and dropped again.

    Layers that no kernel takes, and formats that keep every bit, give nothing. A weight of two formats comes twice.
    """
    for path in resolution.placements:
        for request in _planned(model, resolution, path):
            tensors = {part: physical_of(model.get_parameter(name)).detach() for part, name in request.parts}
            yield from _errors(request, request.pack(tensors, CPU), tensors, "")


def _planned(model: nn.Module, resolution: Resolution, path: str) -> list[WeightRequest]:
    """The requests for a module's weights that round, each once."""
    placement, module = resolution.placements[path], model.get_submodule(path)
    found: dict[WeightRequest, None] = {}
    for phase in PHASES:
        choice = linear_choice(module, placement, phase)
        kernel = kernel_of(placement, phase) if placement.role == "experts" else None
        request: WeightRequest | None = None
        if choice is not None:
            if choice.kernel in linear_kernel_names() and read_as_they_are(choice, module) is None:
                stored = stored_weight_of(module)
                names = {"weight": "weight"} if stored is None else stored.parts
                parts = tuple((part, f"{path}.{name}") for part, name in names.items())
                if linear_kernel(choice.kernel).unsupported(choice.spec, choice.dtype, CPU) is None:
                    request = LinearRequest(f"{LINEAR}{choice.kernel}", choice.spec, parts)
        elif kernel in experts_kernel_names():
            layout = experts_layout(module)
            if not isinstance(layout, str) and kernel is not None:
                spec = requested_spec(layout, placement, phase)
                if experts_kernel(kernel).unsupported(spec, layout.dtype, CPU) is None:
                    request = request_for(path, layout, kernel, spec)
        if request is not None and not _keeps_all(request):
            found[request] = None
    return list(found)


def _keeps_all(request: WeightRequest) -> bool:
    """True for what rounds nothing: the model's own format, and weights one above the other."""
    return not isinstance(request, PackedRequest | LinearRequest) or request.spec.weights == "model"


def _errors(
    request: WeightRequest, packed: Sequence[torch.Tensor], own: Mapping[str, torch.Tensor], device: str
) -> Iterator[QuantisationError]:
    for part, name in request.parts:
        if part.endswith(("_bias", SCALES, ZEROS)):
            continue
        error = None
        if own and isinstance(request, PackedRequest):
            error = _of_experts(request, packed, part, own)
        elif own and isinstance(request, LinearRequest):
            error = _of_linear(request, packed, own)
        yield QuantisationError(name.rpartition(".")[0], name, request.format, error, device)


def _of_linear(request: LinearRequest, packed: Sequence[torch.Tensor], own: Mapping[str, torch.Tensor]) -> float:
    stored = request.stored(own)
    weight = own["weight"] if stored is None else dequantize(stored)
    kept = linear_kernel(request.kernel.removeprefix(LINEAR)).dequantised(request.spec, packed)
    wrong, total = _squares(weight, kept)
    return (wrong / total) ** 0.5 if total else 0.0


def _of_experts(
    request: PackedRequest, packed: Sequence[torch.Tensor], part: str, own: Mapping[str, torch.Tensor]
) -> float:
    """One expert after another: a layer's experts in float32 may be more than the host holds."""
    wrong = total = 0.0
    name, stored = "", request.stored(part, own)
    if stored is not None:
        name = format_name(parse_format(stored.format)[0], stored.group)
    for e in range(request.spec.num_experts):
        kept = request.unpacked(packed, part, range(e, e + 1))[0]
        exact = own[part][e]
        if stored is not None:
            exact = dequantize(from_tensors(name, stored.shape[1:], [t[e] for t in stored.tensors()]))
        one, all_ = _squares(exact, kept)
        wrong, total = wrong + one, total + all_
    return (wrong / total) ** 0.5 if total else 0.0


def _squares(own: torch.Tensor, kept: torch.Tensor) -> tuple[float, float]:
    """Σ(w − ŵ)² and Σw² in float64."""
    exact = own.to(kept.device).double()
    return float((exact - kept.double()).square().sum()), float(exact.square().sum())

"""Give back the host memory of weights that moved: parameters become PlacedTensors over the physical copies."""

from __future__ import annotations

from typing import Any

from torch import nn

from ktfx.placed_tensor import PlacedTensor
from ktfx.state import ModelState


def release_host_copies(model: nn.Module, state: ModelState) -> int:
    """Move every parameter that the rules place elsewhere; returns the bytes released from the logical device.

    A weight that two devices want keeps one home (its generate device) and is copied from there. ``state_dict()``
    fetches, so saving works as before.
    """
    released = 0
    moved: dict[int, nn.Parameter] = {}
    logical = state.logical_name
    for path, module in model.named_modules():
        device = state.resolution.glue_device(path, "generate")
        if device == logical:
            continue
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None or isinstance(parameter, PlacedTensor):
                continue
            if id(parameter) not in moved:
                physical = parameter.detach().to(state.devices[device], copy=True)
                placed = PlacedTensor(physical, device, parameter.device)
                moved[id(parameter)] = nn.Parameter(placed, requires_grad=False)
                released += parameter.numel() * parameter.element_size()
            module._parameters[leaf] = moved[id(parameter)]
    # The hooks fetch on save: a PlacedTensor means nothing to a checkpoint.
    handle = model.register_state_dict_post_hook(_fetch_state_dict)
    object.__setattr__(model, "_ktfx_state_dict_hook", handle)
    state.store.reindex()
    return released


def _fetch_state_dict(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    fetched: dict[int, Any] = {}
    for key, value in state_dict.items():
        if isinstance(value, PlacedTensor):
            if id(value.physical) not in fetched:
                fetched[id(value.physical)] = value.fetch()
            state_dict[key] = fetched[id(value.physical)]


def fetch_released(model: nn.Module) -> None:
    """Bring released parameters back to the logical device as plain ones."""
    handle = model.__dict__.pop("_ktfx_state_dict_hook", None)
    if handle is not None:
        handle.remove()
    seen: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for leaf, parameter in list(module._parameters.items()):
            if isinstance(parameter, PlacedTensor):
                if id(parameter) not in seen:
                    seen[id(parameter)] = nn.Parameter(parameter.fetch(), requires_grad=parameter.requires_grad)
                module._parameters[leaf] = seen[id(parameter)]

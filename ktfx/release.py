"""Give back the host memory of weights that moved: parameters become PlacedTensors over the physical copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ktfx.devices import DeviceMap
from ktfx.placed_tensor import PlacedTensor
from ktfx.resolve import Resolution
from ktfx.state import ModelState


def release_host_copies(model: nn.Module, state: ModelState) -> int:
    """Move every parameter that the rules place elsewhere; returns the bytes released from the logical device.

    A weight that two devices want keeps one home (its generate device) and is copied from there. ``state_dict()``
    fetches, so saving works as before.
    """
    logical = next(model.parameters()).device
    released = place_module_tensors(model, state.resolution, state.devices, state.logical_name, logical)
    state.store.reindex()
    return released


def place_module_tensors(
    model: nn.Module, resolution: Resolution, devices: DeviceMap, logical_name: str, logical: torch.device
) -> int:
    """Parameters that belong elsewhere become PlacedTensors that say they lie on ``logical``; returns the bytes moved.

    A tensor already on its real device (a loader put it there) is wrapped, not copied.
    """
    moved: dict[int, nn.Parameter] = {}
    total = 0
    for path, module in model.named_modules():
        device = resolution.glue_device(path, "generate")
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None or isinstance(parameter, PlacedTensor):
                continue
            if device == logical_name and parameter.device == logical:
                continue
            if id(parameter) not in moved:
                real = devices[device]
                physical = parameter.detach()
                if physical.device != real or physical.device == logical:
                    physical = physical.to(real, copy=True)
                moved[id(parameter)] = nn.Parameter(PlacedTensor(physical, device, logical), requires_grad=False)
                total += parameter.numel() * parameter.element_size()
            module._parameters[leaf] = moved[id(parameter)]
        for leaf, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.device != logical:
                module._buffers[leaf] = buffer.to(logical)  # buffers are small: constants of rotary embeddings
    if "_ktfx_state_dict_hook" not in model.__dict__:
        # A PlacedTensor means nothing to a checkpoint: saving fetches.
        handle = model.register_state_dict_post_hook(_fetch_state_dict)
        object.__setattr__(model, "_ktfx_state_dict_hook", handle)
    return total


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

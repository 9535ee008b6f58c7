"""Give back the memory of weights that moved or were packed: one physical copy, and ``state_dict()`` as before.

A parameter that lives on another device becomes a PlacedTensor over its copy there. Experts that a kernel packed become
ReleasedTensors: their numbers are unpacked again, or read from the checkpoint, when somebody asks for them.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ktfx.checkpoint import Checkpoint, ExpertsReader, experts_reader, open_checkpoint
from ktfx.devices import DeviceMap
from ktfx.errors import KtfxWarning, WeightError
from ktfx.experts_requests import PlacedExperts, placed_experts
from ktfx.linear_rules import only_packed
from ktfx.placed_tensor import PlacedTensor
from ktfx.progress import report as report_progress
from ktfx.released_tensor import ReleasedTensor, TensorSource
from ktfx.resolve import Resolution
from ktfx.state import ModelState
from ktfx.stored_checkpoint import StoredOrigin, StoredReader
from ktfx.text import human_bytes
from ktfx.weight_requests import PackedRequest
from ktfx.weights import WeightStore


def release_host_copies(model: nn.Module, state: ModelState, mode: bool | str = True) -> int:
    """Release every parameter that the rules place elsewhere or pack; returns the bytes given back.

    mode: True releases all, and raises WeightError, before anything is changed, where a weight could not be given back
    bit for bit. ``exact`` keeps those weights, with a warning. ``lossy`` releases them too: ``state_dict()`` then holds
    what the kernels compute with.

    A weight that two devices want keeps one home (its generate device) and is copied from there. ``state_dict()``
    fetches, so saving works as before. Packing goes layer by layer, each layer's own memory given back before the next
    is packed, so that there is never a second copy of more than one layer.
    """
    logical = next(model.parameters()).device
    released = _release_packed(model, state, mode, logical)
    released += place_module_tensors(model, state.resolution, state.devices, state.logical_name, logical)
    state.store.reindex()
    return released


Readers = Mapping[str, ExpertsReader | StoredReader]


# --- packed experts --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PackedSource(TensorSource):
    """A part of a packed layer, unpacked. packed: the store's own list, renewed in place."""

    request: PackedRequest
    packed: Sequence[torch.Tensor]
    part: str
    dtype: torch.dtype

    def read(self) -> torch.Tensor:
        return self._read(range(self.request.spec.num_experts))

    def read_first(self, index: int) -> torch.Tensor:
        return self._read(range(index, index + 1))[0]

    def _read(self, experts: range) -> torch.Tensor:
        return self.request.unpacked(self.packed, self.part, experts).to(self.dtype)


@dataclass(frozen=True, eq=False)
class CheckpointSource(TensorSource):
    """A parameter read again from the files it came from."""

    reader: ExpertsReader | StoredReader

    def read(self) -> torch.Tensor:
        return self.reader.read(range(self.reader.shape[0]))

    def read_first(self, index: int) -> torch.Tensor:
        return self.reader.read(range(index, index + 1))[0]


def _release_packed(model: nn.Module, state: ModelState, mode: bool | str, logical: torch.device) -> int:
    """Pack the experts that only packed weights are read of, and give their own memory back, layer by layer."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    checkpoint = open_checkpoint(getattr(model, "name_or_path", None))
    chosen = []
    kept: dict[str, int] = {}
    for experts in placed_experts(model, state.resolution, state.devices):
        own = _own_parameters(model, experts)
        if any(isinstance(p, ReleasedTensor) or owners[id(p)] > 1 for p in own.values()):
            continue  # done already, or tied to another module
        exact = next((r for r in experts.requests if r[0].spec.weights == "model"), None)
        readers = None if exact else _readers(model, checkpoint, experts, own)
        if exact is None and readers is None and (mode != "lossy" or experts.layout.stored):
            if mode is True:
                raise _cannot_give_back(experts)
            kept[experts.path] = sum(_bytes(p) for p in own.values())
            continue
        chosen.append((experts, exact or experts.requests[0], readers))
    released = 0
    for done, (experts, (request, device), readers) in enumerate(chosen):
        report_progress("pack", done, len(chosen))
        for each, name in experts.requests:
            state.store.packed(each, name)
        own = _own_parameters(model, experts)
        sources = _sources(state.store, request, device, readers, own, mode)
        if sources is None:
            kept[experts.path] = sum(_bytes(p) for p in own.values())
            continue
        released += _replace(model, experts, sources, device, logical)
        del own, sources
        state.store.source_replaced([name for _, name in request.parts])
    if kept:
        warnings.warn(
            f"{human_bytes(sum(kept.values()))} of the model's own weights stay beside their packed copies "
            f"({len(kept)} modules, {next(iter(kept))} first): their format rounds and no checkpoint gives them back; "
            "release_host='lossy' would release them",
            KtfxWarning,
            stacklevel=3,
        )
    return released


def _own_parameters(model: nn.Module, experts: PlacedExperts) -> dict[str, torch.Tensor]:
    """part → the module's parameter."""
    module = model.get_submodule(experts.path)
    return {part: getattr(module, leaf) for part, leaf in experts.layout.parameters.items()}


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _readers(
    model: nn.Module, checkpoint: Checkpoint | None, experts: PlacedExperts, own: dict[str, torch.Tensor]
) -> Readers | None:
    """Where each parameter's numbers can be read again; None unless that holds for all of them."""
    spec, found = experts.layout.spec, {}
    origin = getattr(model.get_submodule(experts.path), "origin", None)
    if isinstance(origin, StoredOrigin):
        leaves = experts.layout.parameters
        return {part: StoredReader(origin, leaves[part], tuple(tensor.shape)) for part, tensor in own.items()}
    if experts.layout.stored:
        return None
    for part, tensor in own.items():
        name = f"{experts.path}.{experts.layout.parameters[part]}"
        plain = not spec.transposed and not spec.interleaved and spec.gate != "none"
        reader = experts_reader(checkpoint, name, part, tuple(tensor.shape), tensor.dtype, plain)
        if reader is None:
            return None
        found[part] = reader
    return found


def _sources(
    store: WeightStore,
    request: PackedRequest,
    device: str,
    readers: Readers | None,
    own: dict[str, torch.Tensor],
    mode: bool | str,
) -> dict[str, TensorSource] | None:
    """Where each part's numbers come from once its memory is gone; None to keep it."""
    packed = store.packed(request, device)
    unpacking: dict[str, TensorSource] = {part: PackedSource(request, packed, part, t.dtype) for part, t in own.items()}
    if readers is not None:
        if all(readers[part].matches(tensor) for part, tensor in own.items()):
            return {part: CheckpointSource(reader) for part, reader in readers.items()}
        exact = False
    else:
        exact = request.spec.weights == "model" and (
            request.unpacks_exactly or all(torch.equal(unpacking[p].read(), t.cpu()) for p, t in own.items())
        )
    if exact or mode == "lossy":
        return unpacking
    if mode is True:
        raise WeightError(
            "the weights in memory are neither in the packed copy bit for bit nor in the checkpoint they came from",
            module=request.parts[0][1],
            mend="use release_host='exact' to keep such weights, or 'lossy' to let state_dict() return packed numbers",
        )
    return None


def _replace(
    model: nn.Module, experts: PlacedExperts, sources: dict[str, TensorSource], device: str, logical: torch.device
) -> int:
    module, total = model.get_submodule(experts.path), 0
    for part, leaf in experts.layout.parameters.items():
        old = getattr(module, leaf)
        shell = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device="meta")
        released = ReleasedTensor(shell, sources[part], device, logical)
        total += _bytes(old)
        module._parameters[leaf] = nn.Parameter(released, requires_grad=False)
    return total


def _cannot_give_back(experts: PlacedExperts) -> WeightError:
    request = experts.requests[0][0]
    if experts.layout.stored:
        return WeightError(
            f"its weights are stored quantised ({experts.layout.spec.weights}), and where they came from is not known",
            module=experts.path,
            expected="a model that ktfx.from_pretrained loaded, whose experts can be read from their files again",
            mend="load it with ktfx.from_pretrained; or release_host='exact' to keep such weights",
        )
    return WeightError(
        f"its weights are packed as {request.spec.weights}, which rounds, so state_dict() could not return them",
        module=experts.path,
        expected="a format that keeps every bit, or a model loaded from a local directory of safetensors that hold it",
        mend="load it with from_pretrained from a local directory; or release_host='exact' to keep such weights, or "
        "'lossy' to let state_dict() return what the kernels compute with",
    )


# --- weights on other devices ----------------------------------------------------------------------------------------


def place_module_tensors(
    model: nn.Module, resolution: Resolution, devices: DeviceMap, logical_name: str, logical: torch.device
) -> int:
    """Parameters that belong elsewhere become PlacedTensors that say they lie on ``logical``; returns the bytes moved.

    A tensor already on its real device (a loader put it there) is wrapped, not copied. The weight of a linear layer
    that a kernel packs stays on ``logical``: its device holds the packed copy alone.
    """
    moved: dict[int, nn.Parameter] = {}
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    total = 0
    for path, module in model.named_modules():
        device = resolution.glue_device(path, "generate")
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None or isinstance(parameter, PlacedTensor):
                continue
            if device == logical_name and parameter.device == logical:
                continue
            if leaf == "weight" and owners[id(parameter)] == 1 and only_packed(module, resolution.of(path)):
                if parameter.device != logical:
                    module._parameters[leaf] = nn.Parameter(parameter.detach().to(logical), requires_grad=False)
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
            if value.identity() not in fetched:
                fetched[value.identity()] = value.fetch()
            state_dict[key] = fetched[value.identity()]


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

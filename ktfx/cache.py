"""KV caches that live where their layers do.

A static cache is built before the first compiled call, layer by layer, on the device of the layer's attention. Its
tensors are PlacedTensors: the compiled program updates them in place where they are, and they never move.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ktfx.devices import DeviceMap
from ktfx.placed_tensor import PlacedTensor
from ktfx.resolve import Resolution

# On a cache whose layers were all placed: looking at each again would cost every decode step a millisecond.
_MARK = "_ktfx_placed"


def place_cache(
    cache: Any,
    model: nn.Module,
    forward: Callable[..., Any],
    call_args: tuple[Any, ...],
    call_kwargs: dict[str, Any],
    resolution: Resolution,
    devices: DeviceMap,
    logical: torch.device,
    known: dict[Any, Any],
) -> bool:
    """Build a cache's tensors on their layers' devices; True if something was built.

    cache: a transformers ``StaticCache`` (anything whose ``layers`` have ``is_compileable`` and ``is_initialized``).
    forward, call_args, call_kwargs: the model's own forward and the call about to be made; the shapes of the states are
    found by running it once on fake tensors with a copy of the cache, so that every kind of cache layer is covered.
    known: what earlier calls found, by the form of the call; the caller keeps it.
    """
    layers = getattr(cache, "layers", None)
    if not layers or (getattr(cache, _MARK, False) and _is_placed(layers[-1])):
        return False
    if not getattr(cache, "is_compileable", False):
        return False
    object.__setattr__(cache, _MARK, True)
    if all(_is_placed(layer) for layer in layers):
        return False
    if any(not _initialized(layer) for layer in layers):
        key = _form_of_call(cache, call_args, call_kwargs)
        if key not in known:
            known[key] = _shapes(cache, model, forward, call_args, call_kwargs).layers
        for layer, reference in zip(layers, known[key], strict=True):
            if not _initialized(layer):
                _initialize(layer, reference, logical)
    for index, layer in enumerate(layers):
        device = _cache_device(resolution, index)
        for name, value in list(vars(layer).items()):
            if isinstance(value, torch.Tensor) and not isinstance(value, PlacedTensor):
                setattr(layer, name, PlacedTensor(value.to(devices[device], copy=True), device, logical))
            elif isinstance(value, list) and any(isinstance(v, torch.Tensor) for v in value):
                setattr(layer, name, [_placed(v, devices[device], device, logical) for v in value])
    return True


def _form_of_call(cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the states' shapes depend on: batch size, dtypes and the layers' own capacities."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
    batch = tuple((t.shape[0] if t.dim() else 0, t.dtype) for t in tensors)
    return batch, tuple((type(layer), getattr(layer, "max_cache_len", None)) for layer in cache.layers)


def _placed(value: Any, real: torch.device, device: str, logical: torch.device) -> Any:
    if isinstance(value, torch.Tensor) and not isinstance(value, PlacedTensor):
        return PlacedTensor(value.to(real, copy=True), device, logical)
    return value


def _is_placed(layer: Any) -> bool:
    return _initialized(layer) and all(
        isinstance(v, PlacedTensor) for v in vars(layer).values() if isinstance(v, torch.Tensor)
    )


def _initialized(layer: Any) -> bool:
    flag = getattr(layer, "is_initialized", True)
    states = [
        getattr(layer, n)
        for n in ("is_conv_states_initialized", "is_recurrent_states_initialized")
        if hasattr(layer, n)
    ]
    flags = [all(s) if isinstance(s, (list, tuple)) else bool(s) for s in states]
    return bool(flag) and all(flags)


def _shapes(
    cache: Any, model: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A copy of the cache after the same call on fake tensors: it has every state's shape and dtype."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    probe = copy.deepcopy(cache)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        fake_kwargs: dict[str, Any] = {}
        for key, value in kwargs.items():
            if value is cache:
                fake_kwargs[key] = probe
            elif isinstance(value, torch.Tensor):
                fake_kwargs[key] = mode.from_tensor(value)
            else:
                fake_kwargs[key] = value
        fake = [probe if a is cache else a for a in fake]
        with _batched_experts(model):
            forward(*fake, **fake_kwargs)
    return probe


@contextlib.contextmanager
def _batched_experts(model: nn.Module) -> Iterator[None]:
    """Fake tensors refuse ``grouped_mm`` in float32 (torch 2.13); the batched form has no such check."""
    get, put = getattr(model, "get_experts_implementation", None), getattr(model, "set_experts_implementation", None)
    before = get() if get is not None and put is not None else None
    if not before or put is None:
        yield
        return
    try:
        put({name: "batched_mm" for name in before} if isinstance(before, dict) else "batched_mm")
        yield
    finally:
        put(before)


def _initialize(layer: Any, reference: Any, logical: torch.device) -> None:
    """Let the layer allocate its own tensors, as its first update would."""
    keys, values = getattr(reference, "keys", None), getattr(reference, "values", None)
    if (
        isinstance(keys, torch.Tensor)
        and isinstance(values, torch.Tensor)
        and not getattr(layer, "is_initialized", True)
    ):
        batch, heads = int(keys.shape[0]), int(keys.shape[1])
        empty_keys = torch.zeros((batch, heads, 0, int(keys.shape[-1])), dtype=keys.dtype, device=logical)
        empty_values = torch.zeros((batch, heads, 0, int(values.shape[-1])), dtype=values.dtype, device=logical)
        layer.lazy_initialization(empty_keys, empty_values)
    for name, value in vars(reference).items():
        if name in ("keys", "values", "cumulative_length"):
            continue
        own = getattr(layer, name, None)
        if isinstance(value, torch.Tensor) and own is None:
            setattr(layer, name, _zeros(value, logical))
        elif isinstance(value, list) and any(isinstance(v, torch.Tensor) for v in value):
            setattr(layer, name, [_zeros(v, logical) if isinstance(v, torch.Tensor) else v for v in value])
        elif name.startswith("is_") and name.endswith("_initialized"):
            setattr(layer, name, copy.copy(value))


def _zeros(value: torch.Tensor, logical: torch.device) -> torch.Tensor:
    return torch.zeros([int(s) for s in value.shape], dtype=value.dtype, device=logical)


def _cache_device(resolution: Resolution, layer: int) -> str:
    """Where the layer's cache is read and written: where its attention runs when generating."""
    prefix = resolution.layer_path(layer)
    for path, placement in resolution.placements.items():
        if placement.role == "attention" and path.startswith(prefix + "."):
            return resolution.glue_device(path, "generate")
    return resolution.stream_device(layer)

"""Calling the program directly: the way below Dynamo's guards, while nothing that matters has changed.

Dynamo's own call path (gathering hundreds of inputs, guards on placed tensors) costs a decode step of 48 layers a
millisecond and more. The first call of a form goes through Dynamo; what reached the program and what came back is
noted. The next call of the same form fills the program's slots itself. Anything unusual goes the long way again.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import nn

from ktfx.cache_argument import cache_given
from ktfx.placed_tensor import PlacedTensor
from ktfx.program.cuda_graphs import CudaRecorder, Recording, cuda_device_of, groups_of
from ktfx.program.program import Call, Program, WeightSlot

MAX_FORMS = 64
# The first runs of a form load kernels and fill workspaces, which must not happen while a graph is captured.
RUNS_BEFORE_RECORDING = 2
# Their rotary embeddings change themselves once a sequence grows long: never called directly.
_CHANGING_ROPES = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True)
class FromKeyword:
    name: str


@dataclass(frozen=True)
class Same:
    """A value that is the same at every call of the form."""

    value: Any


@dataclass(frozen=True)
class FromOutput:
    index: int


@dataclass
class DirectCall:
    """How to run the program for one form of call. ``fields``: name and origin of each field of the output.

    cached: (slot, attributes of the cache layer, name of the tensor, the tensor seen at the noted call, its data).
    keywords: slot, the keyword, and the key where that is a mapping (masks by kind of layer). sizes: slot and value.
    """

    program: Program
    cache: weakref.ref[Any] | None
    cache_name: str
    cached: list[tuple[int, dict[str, Any], str, Any, torch.Tensor]]
    keywords: list[tuple[int, str, Any]]
    sizes: list[tuple[int, int]]
    output_type: Callable[..., Any]
    fields: list[tuple[str, Any]]
    weights: list[WeightSlot]
    inference_mode: bool

    def __post_init__(self) -> None:
        self._holders = [w.holder for w in self.weights]
        self._leaves = [w.leaf for w in self.weights]
        self._tensors = [w.tensor for w in self.weights]
        self._states = [attributes for _, attributes, _, _, _ in self.cached]
        self._names = [name for _, _, name, _, _ in self.cached]
        self._seen = [seen for _, _, _, seen, _ in self.cached]
        self._data = [(slot, data) for slot, _, _, _, data in self.cached]
        self._runs = 0
        self._recording: Recording | None = None

    def run(self, kwargs: dict[str, Any]) -> Any:
        """The output, or None if this call must go the long way."""
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled() != self.inference_mode:
            return None
        if self.cache is not None and self.cache() is not kwargs[self.cache_name]:
            return None
        # Hundreds of each, every step: these loops run in C.
        if not all(map(is_, map(dict.get, self._holders, self._leaves), self._tensors)):
            return None
        states = list(map(dict.get, self._states, self._names))
        data = self._data if all(map(is_, states, self._seen)) else self._other_data(states)
        if data is None:
            return None
        keywords = [(slot, kwargs[name] if key is None else kwargs[name][key]) for slot, name, key in self.keywords]
        outputs = self._replayed(keywords) if data is self._data else None
        if outputs is None:
            outputs = self.program.run([*data, *keywords, *self.sizes])
        if outputs is None:
            return None
        made = {
            name: outputs[o.index] if type(o) is FromOutput else kwargs[o.name] if type(o) is FromKeyword else o.value
            for name, o in self.fields
        }
        return self.output_type(**made)

    def _replayed(self, keywords: list[tuple[int, Any]]) -> list[Any] | None:
        """The outputs from CUDA graphs; None if there are none for this form, or weights changed."""
        program = self.program
        if not program.recordable or program.timeline is not None or program.stale():
            return None
        if self._recording is not None and self._recording.generation == program.generation:
            return self._recording.run([value for _, value in keywords])
        self._recording = None
        self._runs += 1
        if self._runs < RUNS_BEFORE_RECORDING:
            return None
        self._runs = 0
        groups = groups_of(program.steps, cuda_device_of(program))
        if all(group.device is None for group in groups):
            program.recordable = False
            return None
        self._recording = Recording(program, [*self._data, *self.sizes], keywords, groups, CudaRecorder())
        return self._recording.first_outputs()

    def _other_data(self, states: list[Any]) -> list[tuple[int, torch.Tensor]] | None:
        """The cache's tensors were replaced (beam search reorders them): those of the same form will do."""
        if not all(map(_alike, states, self._seen)):
            return None
        return [(slot, state.physical) for (slot, *_), state in zip(self.cached, states, strict=True)]


def _alike(value: Any, seen: Any) -> bool:
    return (
        type(value) is PlacedTensor
        and value.shape == seen.shape
        and value.dtype == seen.dtype
        and value.stride() == seen.stride()
        and value.device_name == seen.device_name
    )


def form_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What two calls must have in common to run the same program on the same sizes; None if it cannot be told."""
    if args:
        return None
    parts: list[Any] = []
    for name, value in kwargs.items():
        if type(value) is torch.Tensor:
            if value.requires_grad:
                return None
            parts.append((name, value.shape, value.stride(), value.dtype, value.device))
        elif value is None or isinstance(value, (bool, int, float, str)):
            parts.append((name, type(value), value))
        elif hasattr(value, "layers"):
            parts.append((name, id(value)))
        elif type(value) is dict and (inside := form_of((), value)) is not None:
            parts.append((name, inside))
        else:
            return None
    return tuple(parts)


def can_be_called_directly(model: nn.Module) -> bool:
    """False for models whose modules keep notes between calls that a direct call would not update."""
    return not any(_CHANGING_ROPES.intersection(_rope_types(m)) for m in model.modules())


def _rope_types(module: nn.Module) -> list[str]:
    """The kind of a rotary embedding, or its kinds by kind of layer (Gemma 3); empty for other modules."""
    kind = getattr(module, "rope_type", ())
    return [k for k in (kind.values() if isinstance(kind, dict) else [kind]) if isinstance(k, str)]


def notes_of(kwargs: dict[str, Any]) -> Any:
    """The Python state that a call may change on its cache (the counter of a layer that holds a window alone)."""
    cache = cache_given(kwargs)
    return [
        {k: v for k, v in vars(layer).items() if not isinstance(v, (torch.Tensor, list))}
        for layer in getattr(cache, "layers", ())
    ]


def note_call(
    kwargs: dict[str, Any], call: Call, output: Any, forget: Callable[[], None] = lambda: None
) -> DirectCall | None:
    """A DirectCall for calls like the one just made, or None where some value's origin cannot be told.

    forget: called when the cache of that call dies, so that its tensors are not kept alive here.
    """
    keyword_of: dict[int, tuple[str, Any]] = {}
    for name, value in kwargs.items():
        entries = value.items() if type(value) is dict else [(None, value)]
        keyword_of |= {id(v): (name, key) for key, v in entries if isinstance(v, torch.Tensor)}
    cache_name = next((k for k, v in kwargs.items() if hasattr(v, "layers")), "")
    cache = kwargs.get(cache_name)
    cache_of: dict[int, tuple[dict[str, Any], str]] = {}
    for layer in getattr(cache, "layers", ()):
        for name, value in vars(layer).items():
            if type(value) is PlacedTensor:
                cache_of[id(value)] = (vars(layer), name)
    cached, keywords, sizes = [], [], []
    for position, slot in call.program.arguments:
        value = call.args[position]
        if id(value) in keyword_of:
            keywords.append((slot, *keyword_of[id(value)]))
        elif id(value) in cache_of:
            cached.append((slot, *cache_of[id(value)], value, value.physical))
        elif isinstance(value, int):
            sizes.append((slot, value))
        else:
            return None
    fields = _output_fields(output, call, kwargs)
    if fields is None or any(o < 0 for o in call.program.outputs):
        return None
    return DirectCall(
        program=call.program,
        cache=weakref.ref(cache, lambda _: forget()) if cache is not None else None,
        cache_name=cache_name,
        cached=cached,
        keywords=keywords,
        sizes=sizes,
        output_type=type(output),
        fields=fields,
        weights=call.program.weight_slots(),
        inference_mode=torch.is_inference_mode_enabled(),
    )


def _output_fields(output: Any, call: Call, kwargs: dict[str, Any]) -> list[tuple[str, Any]] | None:
    if not dataclasses.is_dataclass(output):
        return None
    by_id = {id(v): i for i, v in enumerate(call.outputs) if isinstance(v, torch.Tensor)}
    fields: list[tuple[str, Any]] = []
    for field in dataclasses.fields(output):
        value = getattr(output, field.name)
        if id(value) in by_id:
            fields.append((field.name, FromOutput(by_id[id(value)])))
        elif value is None:
            fields.append((field.name, Same(None)))
        else:
            keyword = next((k for k, v in kwargs.items() if v is value), None)
            if keyword is None:
                return None
            fields.append((field.name, FromKeyword(keyword)))
    return fields

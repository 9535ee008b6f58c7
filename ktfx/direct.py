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
from typing import Any

import torch
from torch import nn

from ktfx.placed_tensor import PlacedTensor
from ktfx.program.program import Call, Program, WeightSlot

MAX_FORMS = 64
# Their rotary embeddings change themselves once a sequence grows long: never called directly.
_CHANGING_ROPES = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True)
class FromKeyword:
    name: str


@dataclass(frozen=True)
class FromCache:
    """Attribute ``name`` of cache layer ``layer``; ``seen`` is the tensor of the noted call."""

    layer: int
    name: str
    seen: Any


@dataclass(frozen=True)
class Same:
    """A size: it follows from the form of the call."""

    value: Any


@dataclass(frozen=True)
class FromOutput:
    index: int


@dataclass
class DirectCall:
    """How to run the program for one form of call. ``fields``: name and origin of each field of the output."""

    program: Program
    cache: weakref.ref[Any] | None
    cache_name: str
    arguments: list[tuple[int, FromKeyword | FromCache | Same]]
    output_type: Callable[..., Any]
    fields: list[tuple[str, Any]]
    weights: list[WeightSlot]
    inference_mode: bool

    def run(self, kwargs: dict[str, Any]) -> Any:
        """The output, or None if this call must go the long way."""
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled() != self.inference_mode:
            return None
        cache = self.cache() if self.cache is not None else None
        if self.cache is not None and cache is not kwargs[self.cache_name]:
            return None
        for weight in self.weights:
            if weight.holder.get(weight.leaf) is not weight.tensor:
                return None
        values: list[tuple[int, Any]] = []
        layers = cache.layers if cache is not None else ()
        for slot, origin in self.arguments:
            if type(origin) is FromCache:
                value = getattr(layers[origin.layer], origin.name)
                if value is not origin.seen and not _alike(value, origin.seen):
                    return None
                values.append((slot, value.physical))
            elif type(origin) is FromKeyword:
                values.append((slot, kwargs[origin.name]))
            else:
                values.append((slot, origin.value))  # type: ignore[union-attr]
        outputs = self.program.run(values)
        if outputs is None:
            return None
        made = {
            name: outputs[o.index] if type(o) is FromOutput else kwargs[o.name] if type(o) is FromKeyword else o.value
            for name, o in self.fields
        }
        return self.output_type(**made)


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
        else:
            return None
    return tuple(parts)


def can_be_called_directly(model: nn.Module) -> bool:
    """False for models whose modules keep notes between calls that a direct call would not update."""
    return not any(getattr(m, "rope_type", None) in _CHANGING_ROPES for m in model.modules())


def notes_of(kwargs: dict[str, Any]) -> Any:
    """The Python state that a call may change on its cache (a sliding layer's counter)."""
    cache = kwargs.get("past_key_values")
    return [
        {k: v for k, v in vars(layer).items() if not isinstance(v, (torch.Tensor, list))}
        for layer in getattr(cache, "layers", ())
    ]


def note_call(kwargs: dict[str, Any], call: Call, output: Any) -> DirectCall | None:
    """A DirectCall for calls like the one just made, or None where some value's origin cannot be told."""
    keyword_of = {id(v): k for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
    cache_name = next((k for k, v in kwargs.items() if hasattr(v, "layers")), "")
    cache = kwargs.get(cache_name)
    cache_of: dict[int, tuple[int, str]] = {}
    for index, layer in enumerate(getattr(cache, "layers", ())):
        for name, value in vars(layer).items():
            if isinstance(value, torch.Tensor):
                cache_of[id(value)] = (index, name)
    arguments: list[tuple[int, FromKeyword | FromCache | Same]] = []
    for position, slot in call.program.arguments:
        value = call.args[position]
        if id(value) in keyword_of:
            arguments.append((slot, FromKeyword(keyword_of[id(value)])))
        elif id(value) in cache_of and type(value) is PlacedTensor:
            arguments.append((slot, FromCache(*cache_of[id(value)], value)))
        elif isinstance(value, int):
            arguments.append((slot, Same(value)))
        else:
            return None
    fields = _output_fields(output, call, kwargs)
    if fields is None or any(o < 0 for o in call.program.outputs):
        return None
    return DirectCall(
        program=call.program,
        cache=weakref.ref(cache) if cache is not None else None,
        cache_name=cache_name,
        arguments=arguments,
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

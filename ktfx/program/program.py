"""Program: a flat list of steps over numbered slots. What a compiled graph is once it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch

from ktfx.placed_tensor import PlacedTensor
from ktfx.weights import WeightStore, version_of


@dataclass
class Compute:
    """Call a compiled unit."""

    function: Callable[..., Sequence[Any]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    frees: tuple[int, ...] = ()
    unit: int = 0
    device: str = ""
    layer: int | None = None

    def run(self, slots: list[Any]) -> None:
        values = self.function(*[slots[i] for i in self.inputs])
        for slot, value in zip(self.outputs, values, strict=True):
            slots[slot] = value


@dataclass
class Transfer:
    """Copy a value to another device name; always fresh, so that names that share a real device never alias.

    wait: block the host until the copy is there (a host reader follows).
    """

    source: int
    target: int
    device: torch.device
    wait: bool
    source_name: str = ""
    target_name: str = ""
    nbytes: int = 0
    frees: tuple[int, ...] = ()

    def run(self, slots: list[Any]) -> None:
        slots[self.target] = slots[self.source].to(self.device, copy=True, non_blocking=not self.wait)


@dataclass
class Size:
    """Compute an integer that leaves the graph."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: int
    frees: tuple[int, ...] = ()

    def run(self, slots: list[Any]) -> None:
        slots[self.target] = self.function(*_filled(self.args, slots), **self.kwargs)


@dataclass
class WriteBack:
    """Copy the new value of a mutated input over it (where no unit could do so in place)."""

    value: int
    target: int
    name: str = ""
    frees: tuple[int, ...] = ()

    def run(self, slots: list[Any]) -> None:
        slots[self.target].copy_(slots[self.value])


Step = Compute | Transfer | Size | WriteBack


@dataclass(frozen=True)
class SlotRef:
    slot: int


def _filled(args: Any, slots: list[Any]) -> Any:
    if isinstance(args, SlotRef):
        return slots[args.slot]
    if isinstance(args, (list, tuple)):
        return type(args)(_filled(a, slots) for a in args)
    return args


@dataclass
class BoundWeight:
    """A parameter as it was when the program bound it: Dynamo passes it with every call, so a change can be seen."""

    index: int
    name: str
    tensor: torch.Tensor
    version: int


@dataclass
class Program:
    """Runs a compiled graph.

    constants: slots that hold weights, filled once. arguments: (position among Dynamo's arguments, slot) of the rest.
    outputs: slots of the user's outputs, in order; an int -1-i stands for argument i itself.
    """

    steps: list[Step]
    slots: int
    constants: list[tuple[int, torch.Tensor]]
    arguments: list[tuple[int, int]]
    outputs: list[int]
    bound: list[BoundWeight]
    store: WeightStore
    _template: list[Any] = field(default_factory=list)
    _bound_indexes: list[int] = field(default_factory=list)
    _bound_tensors: list[torch.Tensor] = field(default_factory=list)
    _bound_versions: list[int] = field(default_factory=list)
    timeline: list[tuple[str, float, float]] | None = None

    def __post_init__(self) -> None:
        self._template = [None] * self.slots
        for slot, tensor in self.constants:
            self._template[slot] = tensor
        self._stamp()

    def _stamp(self) -> None:
        self._bound_indexes = [b.index for b in self.bound]
        self._bound_tensors = [b.tensor for b in self.bound]
        self._bound_versions = [version_of(t) for t in self._bound_tensors]

    def __call__(self, *args: Any) -> list[Any]:
        self._notice_changes(args)
        slots = self._template.copy()
        for index, slot in self.arguments:
            value = args[index]
            slots[slot] = value.physical if type(value) is PlacedTensor else value
        if self.timeline is None:
            for step in self.steps:
                step.run(slots)
                for slot in step.frees:
                    slots[slot] = None
        else:
            self._run_timed(slots)
        return [slots[o] if o >= 0 else args[-1 - o] for o in self.outputs]

    def _notice_changes(self, args: Sequence[Any]) -> None:
        """Renew the copies of parameters that were replaced or written to since they were bound."""
        same = all(map(is_, [args[i] for i in self._bound_indexes], self._bound_tensors))
        if same and [version_of(t) for t in self._bound_tensors] == self._bound_versions:
            return
        names = []
        for bound, version in zip(self.bound, self._bound_versions, strict=True):
            tensor = args[bound.index]
            if tensor is not bound.tensor or version_of(tensor) != version:
                names.append(bound.name)
                bound.tensor = tensor
        self.store.refresh(names)
        self._stamp()

    def _run_timed(self, slots: list[Any]) -> None:
        assert self.timeline is not None
        for step in self.steps:
            start = time.perf_counter()
            step.run(slots)
            self.timeline.append((describe(step), start, time.perf_counter()))
            for slot in step.frees:
                slots[slot] = None


def describe(step: Step) -> str:
    """One line for a step, as dumps and timelines show it."""
    if isinstance(step, Compute):
        where = f"layer {step.layer}" if step.layer is not None else "outside the layers"
        return f"compute unit {step.unit} on {step.device} ({where})"
    if isinstance(step, Transfer):
        return f"transfer {step.source_name} → {step.target_name} ({step.nbytes} B)"
    if isinstance(step, WriteBack):
        return f"write back {step.name}"
    return "size"

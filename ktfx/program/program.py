"""Program: a flat list of steps over numbered slots. What a compiled graph is once it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, is_
from typing import Any

import torch

from ktfx.placed_tensor import PlacedTensor
from ktfx.weights import PackedWeight, WeightStore, address_of, version_of


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


_VERSION = attrgetter("_version")
SAMPLES = 8

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


@dataclass(frozen=True)
class PlainWeight:
    """A slot filled with a parameter or buffer in the model's own format, on a device name."""

    name: str
    device: str

    def tensor(self, store: WeightStore, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self.name in given:
            return store.copy_of(given[self.name], self.name, self.device)
        return store.plain(self.name, self.device)


@dataclass(frozen=True)
class PackedPart:
    """A slot filled with one tensor of a kernel's packed weights, on a device name."""

    weight: PackedWeight
    device: str

    def tensor(self, store: WeightStore, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        request = self.weight.request
        if any(name in given for _, name in request.parts):
            return store.pack_of(request, given, self.device)[self.weight.index]
        return store.packed(request, self.device)[self.weight.index]


@dataclass(frozen=True)
class Literal:
    """A slot filled with a value that belongs to no parameter."""

    value: Any

    def tensor(self, store: WeightStore, given: Mapping[str, torch.Tensor]) -> Any:
        return self.value


Constant = PlainWeight | PackedPart | Literal


@dataclass(frozen=True)
class Call:
    """One call of a program: what went in and what came out."""

    program: Program
    args: tuple[Any, ...]
    outputs: list[Any]


@dataclass
class CallLog:
    """Where programs of a model note their calls while ``calls`` is a list."""

    calls: list[Call] | None = None


@dataclass(frozen=True)
class WeightSlot:
    """A bound parameter and the dictionary of the module that holds it."""

    holder: dict[str, Any]
    leaf: str
    tensor: torch.Tensor


@dataclass
class Program:
    """Runs a compiled graph.

    constants: slots that are filled once. arguments: (position among Dynamo's arguments, slot) of the rest.
    outputs: slots of the user's outputs, in order; an int -1-i stands for argument i itself.
    devices: the real device of each name that computes.
    """

    steps: list[Step]
    slots: int
    constants: list[tuple[int, Constant]]
    arguments: list[tuple[int, int]]
    outputs: list[int]
    bound: list[BoundWeight]
    store: WeightStore
    log: CallLog = field(default_factory=CallLog)
    devices: Mapping[str, torch.device] = field(default_factory=dict)
    # Whether repeated calls of one form may be recorded as CUDA graphs.
    recordable: bool = False
    # Counts the times that constant slots were filled anew: what was recorded before is stale.
    generation: int = 0
    _template: list[Any] = field(default_factory=list)
    # The tensors are kept beside the template: an id means nothing once its tensor is gone.
    _foreign: dict[tuple[Any, ...], tuple[tuple[torch.Tensor, ...], list[Any]]] = field(default_factory=dict)
    _bound_indexes: list[int] = field(default_factory=list)
    _bound_tensors: list[torch.Tensor] = field(default_factory=list)
    _bound_versions: list[int] = field(default_factory=list)
    _bound_addresses: list[int] = field(default_factory=list)
    _counted: list[torch.Tensor] = field(default_factory=list)
    _counted_versions: list[int] = field(default_factory=list)
    # A model that was converted (``.to``, ``.half``) has all its weights elsewhere: a few tell.
    _samples: list[torch.Tensor] = field(default_factory=list)
    _sample_addresses: list[int] = field(default_factory=list)
    timeline: list[tuple[str, float, float]] | None = None

    def __post_init__(self) -> None:
        self._template = self._filled_template({})
        self._stamp()

    def _filled_template(self, given: Mapping[str, torch.Tensor]) -> list[Any]:
        """The constant slots, from the store, or for the names in ``given`` from those tensors."""
        template: list[Any] = [None] * self.slots
        for slot, constant in self.constants:
            template[slot] = constant.tensor(self.store, given)
        return template

    @property
    def template(self) -> list[Any]:
        """The slots as each call finds them: weights filled in, the rest None."""
        return self._template

    def _stamp(self) -> None:
        self.generation += 1
        self._bound_indexes = [b.index for b in self.bound]
        self._bound_tensors = [b.tensor for b in self.bound]
        self._bound_versions = [version_of(t) for t in self._bound_tensors]
        self._bound_addresses = list(map(address_of, self._bound_tensors))
        self._counted = [t for t in self._bound_tensors if not t.is_inference()]
        self._counted_versions = [t._version for t in self._counted]
        self._samples = self._bound_tensors[:: max(1, len(self._bound_tensors) // SAMPLES)]
        self._sample_addresses = list(map(address_of, self._samples))

    def __call__(self, *args: Any) -> list[Any]:
        slots = self._current_template(args).copy()
        for index, slot in self.arguments:
            value = args[index]
            slots[slot] = value.physical if type(value) is PlacedTensor else value
        self._run_steps(slots)
        outputs = [slots[o] if o >= 0 else args[-1 - o] for o in self.outputs]
        if self.log.calls is not None:
            self.log.calls.append(Call(self, args, outputs))
        return outputs

    def run(self, values: list[tuple[int, Any]]) -> list[Any] | None:
        """Run on values already unwrapped, by slot; None if a bound weight was written to since (renew it first)."""
        if self.stale():
            return None
        slots = self._template.copy()
        for slot, value in values:
            slots[slot] = value
        self._run_steps(slots)
        return [slots[o] for o in self.outputs]

    def stale(self) -> bool:
        """Whether a bound weight was written to in place since its copies were made, or the model was converted."""
        return (
            list(map(_VERSION, self._counted)) != self._counted_versions
            or list(map(address_of, self._samples)) != self._sample_addresses
        )

    def weight_slots(self) -> list[WeightSlot]:
        """Where each bound parameter hangs in the model."""
        found = []
        for bound in self.bound:
            path, _, leaf = bound.name.rpartition(".")
            module = self.store.model.get_submodule(path)
            holder = module._parameters if leaf in module._parameters else module._buffers
            found.append(WeightSlot(holder, leaf, bound.tensor))
        return found

    def _run_steps(self, slots: list[Any]) -> None:
        if self.timeline is not None:
            self._run_timed(slots)
            return
        for step in self.steps:
            step.run(slots)
            for slot in step.frees:
                slots[slot] = None

    def _current_template(self, args: Sequence[Any]) -> list[Any]:
        """The filled slots, after bringing copies of changed parameters up to date."""
        given = [args[i] for i in self._bound_indexes]
        if all(map(is_, given, self._bound_tensors)):
            unwritten = [version_of(t) for t in self._bound_tensors] == self._bound_versions
            if unwritten and list(map(address_of, self._bound_tensors)) == self._bound_addresses:
                return self._template
        elif any(t is not self.store.tensor(b.name) for t, b in zip(given, self.bound, strict=True)):
            return self._foreign_template(given)
        names = []
        stamps = zip(self._bound_versions, self._bound_addresses, strict=True)
        for bound, tensor, stamp in zip(self.bound, given, stamps, strict=True):
            if tensor is not bound.tensor or (version_of(tensor), address_of(tensor)) != stamp:
                names.append(bound.name)
                bound.tensor = tensor
        self.store.refresh(names)
        self._stamp()
        return self._template

    def _foreign_template(self, given: Sequence[torch.Tensor]) -> list[Any]:
        """After a graph break Dynamo reuses one layer's graph for others that look alike: bind the weights it gives."""
        key = tuple((id(t), version_of(t)) for t in given)
        if key not in self._foreign:
            named = {b.name: t for b, t in zip(self.bound, given, strict=True)}
            self._foreign[key] = (tuple(given), self._filled_template(named))
        return self._foreign[key][1]

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

"""Partitioned graph → Program: which unit reads and writes what, where a mutation is folded in, when a slot is free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ktfx.graph import info, is_size_node, is_tensor_node, output_node, placeholders, tensor_bytes
from ktfx.ops.transfer import is_transfer, transfer_ends
from ktfx.pass_manager import PassContext, value_device
from ktfx.passes.partition_by_device import Partitioning, Unit
from ktfx.program.compile_units import CompiledUnit, compile_units
from ktfx.program.program import (
    BoundWeight,
    CallLog,
    Compute,
    Constant,
    Literal,
    PackedPart,
    PlainWeight,
    Program,
    Size,
    SlotRef,
    Step,
    Transfer,
    WriteBack,
)
from ktfx.program.units import UnitGraph, base_symbols, extract_unit
from ktfx.weights import WeightStore


@dataclass
class BuiltProgram:
    """A program and the units it was made of (``explain`` and the tests read them)."""

    program: Program
    units: list[Unit]
    graphs: list[UnitGraph]
    compiled: list[CompiledUnit]
    folded: int
    written_back: int

    @property
    def distinct(self) -> list[CompiledUnit]:
        return list({id(c): c for c in self.compiled}.values())


def build_program(
    gm: fx.GraphModule,
    context: PassContext,
    store: WeightStore,
    backend: str,
    progress: Callable[[int, int], None] | None = None,
    log: CallLog | None = None,
    cuda_graphs: bool = True,
) -> BuiltProgram:
    """Compile the units and lay the steps out.

    Weights are bound here: each placeholder of a weight becomes one constant slot per device that reads it.
    """
    part: Partitioning = context.partitioning
    unit_of = {n: u.index for u in part.units for n in u.nodes}
    output_values = [v for v in output_node(gm.graph).args[0]]  # type: ignore[union-attr]
    writes: dict[fx.Node, str] = {}
    for position, name in context.captured.writes:
        value = output_values[position]
        if isinstance(value, fx.Node):
            writes[value] = name
    by_name = {n.name: n for n in placeholders(gm.graph)}
    folds = _foldable(part, unit_of, context, writes, by_name)
    user_outputs = output_values[len(context.captured.writes) :]
    unfolded = {v: name for v, name in writes.items() if v not in folds}
    escaping = _escaping(part, unit_of, [*user_outputs, *unfolded])
    symbols = base_symbols(placeholders(gm.graph))
    graphs = [
        extract_unit(
            unit.nodes,
            escaping[unit.index],
            {v: t for v, t in folds.items() if unit_of[v] == unit.index},
            context.devices[unit.device],
            symbols,
        )
        for unit in part.units
    ]
    compiled = compile_units(graphs, backend, progress)
    layout = _Layout(context, store)
    steps = _steps(gm, part, graphs, compiled, layout, user_outputs, unfolded, by_name, context)
    outputs = [layout.output(v) for v in user_outputs]
    _free_slots(steps, keep=set(outputs) | layout.fixed)
    store.pack_all([(c.weight.request, c.device) for _, c in layout.constants if isinstance(c, PackedPart)])
    program = Program(
        steps=steps,
        slots=layout.count,
        constants=layout.constants,
        arguments=layout.arguments,
        outputs=outputs,
        bound=_bound_weights(gm, context, store),
        store=store,
        log=log or CallLog(),
        devices={unit.device: context.devices[unit.device] for unit in part.units},
        recordable=cuda_graphs and context.captured.phase == "generate",
    )
    return BuiltProgram(program, part.units, graphs, compiled, len(folds), len(unfolded))


def _foldable(
    part: Partitioning,
    unit_of: dict[fx.Node, int],
    context: PassContext,
    writes: dict[fx.Node, str],
    by_name: dict[str, fx.Node],
) -> dict[fx.Node, fx.Node]:
    """Mutations that the unit computing the new value can make itself: value → the input it overwrites.

    The unit must run on the input's own device, and every other reader of the old value must come no later.
    Transfers of the old value run at the start of the program.
    """
    folds: dict[fx.Node, fx.Node] = {}
    taken: set[fx.Node] = set()
    for value, name in writes.items():
        target = by_name[name]
        unit = unit_of.get(value)
        if unit is None or target in taken or value_device(target, context) != info(value).device:
            continue
        readers = [unit_of.get(u) for u in target.users if u.op == "call_function" and not is_transfer(u)]
        if all(r is not None and r <= unit for r in readers):
            folds[value] = target
            taken.add(target)
    return folds


def _escaping(part: Partitioning, unit_of: dict[fx.Node, int], wanted: list[Any]) -> dict[int, list[fx.Node]]:
    """For each unit, the values that are read outside it, in the unit's order."""
    keep = {v for v in wanted if isinstance(v, fx.Node)}
    result: dict[int, list[fx.Node]] = {}
    for unit in part.units:
        result[unit.index] = [
            node
            for node in unit.nodes
            if isinstance(node.meta.get("val"), torch.Tensor)
            and (
                node in keep
                or any(u.op != "output" and unit_of.get(u) != unit.index and not is_size_node(u) for u in node.users)
            )
        ]
    return result


class _Layout:
    """Gives slots to values while the steps are laid out."""

    def __init__(self, context: PassContext, store: WeightStore) -> None:
        self.context = context
        self.store = store
        self.count = 0
        self.slot_of: dict[tuple[fx.Node, str], int] = {}
        self.constants: list[tuple[int, Constant]] = []
        self.arguments: list[tuple[int, int]] = []
        self.fixed: set[int] = set()

    def new(self, node: fx.Node, device: str = "") -> int:
        slot = self.slot_of[(node, device)] = self.count
        self.count += 1
        return slot

    def read(self, node: fx.Node, device: str) -> int:
        """The slot of a value as seen by a reader on ``device``."""
        if node.op != "placeholder":
            return self.slot_of[(node, "")]
        entry = self.context.captured.inputs[node.name]
        if entry.kind in ("parameter", "buffer") and not entry.mutated:
            return self._constant(node, device, PlainWeight(entry.name, device))
        if entry.kind == "packed":
            return self._constant(node, device, PackedPart(self.context.packed[node.name], device))
        if entry.kind == "constant":
            value = self.context.captured.constants[node.name]
            return self._constant(node, device, Literal(value.to(self.context.devices[device])))
        key = (node, "")
        if key not in self.slot_of:
            slot = self.new(node)
            self.fixed.add(slot)
            self.arguments.append((entry.index, slot))
        return self.slot_of[key]

    def _constant(self, node: fx.Node, device: str, constant: Constant) -> int:
        key = (node, device)
        if key not in self.slot_of:
            slot = self.new(node, device)
            self.fixed.add(slot)
            self.constants.append((slot, constant))
        return self.slot_of[key]

    def output(self, value: Any) -> int:
        if isinstance(value, fx.Node):
            if value.op == "placeholder":
                return -1 - self.context.captured.inputs[value.name].index
            return self.slot_of[(value, "")]
        slot = self.count
        self.count += 1
        self.fixed.add(slot)
        self.constants.append((slot, Literal(value)))
        return slot


def _steps(
    gm: fx.GraphModule,
    part: Partitioning,
    graphs: list[UnitGraph],
    compiled: list[CompiledUnit],
    layout: _Layout,
    user_outputs: list[Any],
    unfolded: dict[fx.Node, str],
    by_name: dict[str, fx.Node],
    context: PassContext,
) -> list[Step]:
    """Units in their order; each transfer right after its source exists; sizes and write-backs last."""
    steps: list[Step] = []
    waiting: dict[fx.Node, list[fx.Node]] = {}
    for node in part.transfers:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        waiting.setdefault(source, []).append(node)

    def send(value: fx.Node) -> None:
        for node in waiting.pop(value, []):
            source_name, target_name = transfer_ends(node)
            target = context.devices[target_name]
            steps.append(
                Transfer(
                    layout.read(value, source_name),
                    layout.new(node),
                    target,
                    wait=target.type == "cpu",
                    source_name=source_name,
                    target_name=target_name,
                    nbytes=tensor_bytes(value.meta["val"]),
                )
            )
            send(node)

    for node in placeholders(gm.graph):
        send(node)
    for unit, graph, done in zip(part.units, graphs, compiled, strict=True):
        inputs = tuple(layout.read(n, unit.device) for n in graph.inputs)
        outputs = tuple(layout.new(n) for n in graph.outputs)
        steps.append(Compute(done.function, inputs, outputs, unit=unit.index, device=unit.device, layer=unit.layer))
        for node in graph.outputs:
            send(node)
    for value in user_outputs:
        if isinstance(value, fx.Node) and value.op == "call_function" and not is_tensor_node(value):
            _size_step(value, layout, steps)
    for value, name in unfolded.items():
        target = by_name[name]
        steps.append(WriteBack(layout.read(value, ""), layout.read(target, ""), name=name))
    return steps


def _size_step(node: fx.Node, layout: _Layout, steps: list[Step]) -> None:
    """A size that the model returns: computed on the host from the sizes it reads."""
    if (node, "") in layout.slot_of:
        return
    for argument in node.all_input_nodes:
        if argument.op == "call_function" and is_size_node(argument):
            _size_step(argument, layout, steps)
    refs: Callable[[fx.Node], Any] = lambda n: SlotRef(layout.read(n, str(info(n).device or "")))  # noqa: E731
    args: Any = fx.node.map_arg(node.args, refs)
    steps.append(Size(node.target, args, dict(node.kwargs), layout.new(node)))  # type: ignore[arg-type]


def _free_slots(steps: list[Step], keep: set[int]) -> None:
    """Drop each value right after its last reader."""
    last: dict[int, Step] = {}
    for step in steps:
        for slot in _reads(step):
            last[slot] = step
        for slot in _defines(step):
            last.setdefault(slot, step)
    frees: dict[int, list[int]] = {}
    for slot, step in last.items():
        if slot not in keep:
            frees.setdefault(id(step), []).append(slot)
    for step in steps:
        step.frees = tuple(frees.get(id(step), ()))


def _reads(step: Step) -> list[int]:
    if isinstance(step, Compute):
        return list(step.inputs)
    if isinstance(step, Transfer):
        return [step.source]
    if isinstance(step, WriteBack):
        return [step.value, step.target]
    return [a.slot for a in step.args if isinstance(a, SlotRef)]


def _defines(step: Step) -> list[int]:
    if isinstance(step, Compute):
        return list(step.outputs)
    if isinstance(step, (Transfer, Size)):
        return [step.target]
    return []


def _bound_weights(gm: fx.GraphModule, context: PassContext, store: WeightStore) -> list[BoundWeight]:
    """The parameters that some constant was made from, so that a later change is noticed."""
    by_parameter = {i.name: i for i in context.captured.inputs.values() if i.kind in ("parameter", "buffer")}
    names: dict[str, int] = {}
    for node in placeholders(gm.graph):
        entry = context.captured.inputs[node.name]
        if entry.kind in ("parameter", "buffer") and not entry.mutated and node.users:
            names[entry.name] = entry.index
        elif entry.kind == "packed" and node.users:
            for _, source in context.packed[node.name].request.parts:
                if source in by_parameter:
                    names[source] = by_parameter[source].index
    result = []
    for name, index in names.items():
        tensor = store.tensor(name)
        result.append(BoundWeight(index, name, tensor))
    return result

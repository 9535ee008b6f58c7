"""partition_by_device: the fewest runs on one device, each cut into compile units at layer boundaries."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

from torch import fx

from ktfx.graph import info, is_size_node, is_tensor_node, placeholders
from ktfx.ops.transfer import is_transfer
from ktfx.pass_manager import Pass, PassContext, Rewrite, register_pass
from ktfx.program.schedule import schedule_runs


@dataclass
class Unit:
    """Nodes that are compiled and called as one: one device, one run, one layer (or none)."""

    index: int
    device: str
    run: int
    layer: int | None
    nodes: list[fx.Node]


@dataclass
class Partitioning:
    """units in the order of execution. runs: the device name of each run. exact: the number of runs is the minimum."""

    units: list[Unit]
    runs: tuple[str, ...]
    exact: bool
    transfers: list[fx.Node] = field(default_factory=list)


@register_pass
class PartitionByDevice(Pass):
    """Integers and transfers belong to no unit: the program computes and moves them between units."""

    name = "partition_by_device"
    requires = ("insert_transfers",)

    @dataclass(frozen=True)
    class Options:
        """layers_per_unit: how many layers of a run are compiled as one unit (1: equal layers are compiled once)."""

        layers_per_unit: int = 1

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        compute = [n for n in gm.graph.nodes if n.op == "call_function" and is_tensor_node(n) and not is_transfer(n)]
        index = {n: i for i, n in enumerate(compute)}
        owner = {n: self._pinned(n) for n in compute}
        inputs = [[index[p] for p in _compute_inputs(n, index)] for n in compute]
        devices = [str(info(n).device) for n in compute]
        schedule = schedule_runs(devices, inputs)
        units = self._cut(compute, owner, schedule.run_of)
        transfers = [n for n in gm.graph.nodes if is_transfer(n)]
        context.partitioning = Partitioning(units, schedule.devices, schedule.exact, transfers)
        context.record(
            Rewrite(
                what=f"{len(compute)} nodes in {len(schedule.devices)} runs, {len(units)} compile units, "
                f"{len(transfers)} transfers" + ("" if schedule.exact else " (search cut short)")
            )
        )

    @staticmethod
    def _pinned(node: fx.Node) -> fx.Node:
        """``getitem`` stays in the unit of the op it reads: tuples do not cross units."""
        while node.target is operator.getitem:
            producer = node.args[0]
            assert isinstance(producer, fx.Node)
            node = producer
        return node

    def _cut(self, compute: list[fx.Node], owner: dict[fx.Node, fx.Node], run_of: tuple[int, ...]) -> list[Unit]:
        """Within a run, nodes keep their order; a new unit begins where the layer changes."""
        options = self.options
        per_unit = max(1, options.layers_per_unit if isinstance(options, PartitionByDevice.Options) else 1)
        run_by_node = dict(zip(compute, run_of, strict=True))
        by_run: dict[int, list[fx.Node]] = {}
        for node in compute:
            by_run.setdefault(run_by_node[owner[node]], []).append(node)
        units: list[Unit] = []
        for run in sorted(by_run):
            current: Unit | None = None
            for node in by_run[run]:
                layer = info(owner[node]).layer
                block = None if layer is None else layer // per_unit
                if current is None or current.layer != block:
                    current = Unit(len(units), str(info(node).device), run, block, [])
                    units.append(current)
                current.nodes.append(node)
        return units


def _compute_inputs(node: fx.Node, index: dict[fx.Node, int]) -> list[fx.Node]:
    """The compute nodes a node depends on, seen through transfers and sizes."""
    found: list[fx.Node] = []
    stack = list(node.all_input_nodes)
    seen: set[fx.Node] = set()
    while stack:
        argument = stack.pop()
        if argument in seen:
            continue
        seen.add(argument)
        if argument in index:
            found.append(argument)
        elif is_transfer(argument) or (argument.op == "call_function" and is_size_node(argument)):
            stack.extend(argument.all_input_nodes)
    return found


def weight_placeholders(gm: fx.GraphModule, context: PassContext) -> list[fx.Node]:
    """The placeholders of weights that some node reads."""
    kinds = ("parameter", "buffer", "packed")
    return [n for n in placeholders(gm.graph) if n.users and context.captured.inputs[n.name].kind in kinds]

"""insert_transfers: a transfer node where a value crosses devices; each value crosses once per target."""

from __future__ import annotations

import torch
from torch import fx

from ktfx.graph import info, insert_call, is_tensor_node, output_node
from ktfx.pass_manager import Pass, PassContext, Rewrite, register_pass, value_device

transfer = torch.ops.ktfx.transfer.default


@register_pass
class InsertTransfers(Pass):
    """After this pass every node reads values on its own device, and every output is where it must be returned.

    A value with an ``out_device`` goes there first, and on to others from there. Outputs go to the logical device; the
    new value of a mutated input goes to that input's home. Weights do not cross: they are bound where they are read.
    """

    name = "insert_transfers"
    requires = ("assign_devices",)

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        graph = gm.graph
        copies: dict[tuple[fx.Node, str], fx.Node] = {}
        position = {n: i for i, n in enumerate(graph.nodes)}
        wanted: dict[fx.Node, dict[str, list[fx.Node]]] = {}
        for node in graph.nodes:
            here = info(node).device
            if node.op != "call_function" or here is None:
                continue
            for argument in node.all_input_nodes:
                there = value_device(argument, context)
                if there is not None and there != here:
                    wanted.setdefault(argument, {}).setdefault(here, []).append(node)
        output_targets = self._output_targets(graph, context)
        for index, value in enumerate(output_node(graph).args[0]):  # type: ignore[arg-type]
            if isinstance(value, fx.Node):
                there = value_device(value, context)
                if there is not None and there != output_targets[index]:
                    wanted.setdefault(value, {}).setdefault(output_targets[index], [])

        for value in sorted(wanted, key=lambda n: position[n]):
            for target, users in wanted[value].items():
                copy = self._copy(graph, value, target, copies, context)
                for user in users:
                    user.replace_input_with(value, copy)
        output = output_node(graph)
        output.args = (
            tuple(
                copies.get((v, output_targets[i]), v) if isinstance(v, fx.Node) else v
                for i, v in enumerate(output.args[0])  # type: ignore[arg-type]
            ),
        )

    def _copy(
        self,
        graph: fx.Graph,
        value: fx.Node,
        target: str,
        copies: dict[tuple[fx.Node, str], fx.Node],
        context: PassContext,
    ) -> fx.Node:
        found = copies.get((value, target))
        if found is not None:
            return found
        source_node = value
        out = info(value).out_device
        if out is not None and out != target:
            source_node = self._copy(graph, value, out, copies, context)
        source = value_device(source_node, context)
        assert source is not None
        after = source_node
        while after.next.op == "placeholder":
            after = after.next
        with graph.inserting_after(after):
            copy = insert_call(
                graph, transfer, (source_node, source, target), like=value, device=target, out_device=None
            )
        copies[(value, target)] = copy
        context.record(
            Rewrite(
                what=f"{value.name}: {source} → {target}",
                module=info(value).module,
                after=("ktfx.transfer.default",),
                nodes_after=(copy.name,),
            )
        )
        return copy

    @staticmethod
    def _output_targets(graph: fx.Graph, context: PassContext) -> list[str]:
        homes = {position: context.captured.inputs[name].home for position, name in context.captured.writes}
        outputs = output_node(graph).args[0]
        return [
            homes.get(i) or context.logical_name
            if isinstance(v, fx.Node) and is_tensor_node(v)
            else context.logical_name
            for i, v in enumerate(outputs)  # type: ignore[arg-type]
        ]

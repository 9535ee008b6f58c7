"""merge_linears: linear layers of one block that read one input (q/k/v, gate/up) → one, over their weights in one."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ktfx.canonical import strip, tensor_of
from ktfx.fusion import is_asked, role_module
from ktfx.graph import GraphInput, fake_mode_of, info, insert_call, insert_placeholder, op_name, refresh_values
from ktfx.pass_manager import Pass, PassContext, Rewrite, register_pass
from ktfx.weight_requests import MergedRequest
from ktfx.weights import PackedWeight

linear = torch.ops.aten.linear.default


@dataclass(frozen=True)
class Layer:
    """One ``aten.linear`` node over a parameter (N, K): its input, the names of weight and bias, and N."""

    node: fx.Node
    x: fx.Node
    weight: str
    bias: str | None
    width: int
    dtype: torch.dtype


@register_pass
class MergeLinears(Pass):
    """Every output entry is the dot product that it was, so the numbers are the same but for the order of a sum.

    The merged weight is one more copy where the model's own parameters lie already on the device (logical cuda);
    elsewhere only it is made, and the single ones are not.
    """

    name = "merge_linears"
    numerics_preserving = True

    @dataclass(frozen=True)
    class Options:
        """device: where to merge: a kind (``cuda``, ``cpu``), a device name, or ``any``. attention: q, k, v and the
        like. mlp: gate and up, also of shared experts."""

        device: str = "cuda"
        attention: bool = True
        mlp: bool = True

    options: Options

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        rewritten = 0
        for block, layers in self._groups(gm.graph, context).items():
            why = _why_not(layers)
            if why is not None:
                context.miss(block[0], f"merge_linears: {why}")
            elif context.allows("merge_linears", block[0]):
                self._merge(gm.graph, context, block[0], layers)
                rewritten += 1
        if rewritten:
            gm.graph.eliminate_dead_code()
            gm.recompile()

    def _groups(self, graph: fx.Graph, context: PassContext) -> dict[tuple[str, fx.Node], list[Layer]]:
        """(block, input) → its linear layers, where there are two or more."""
        roles = (("attention",) if self.options.attention else ()) + (
            ("mlp", "shared_experts") if self.options.mlp else ()
        )
        groups: dict[tuple[str, fx.Node], list[Layer]] = {}
        for node in graph.find_nodes(op="call_function", target=linear):
            module = info(node).module
            parent = module.rpartition(".")[0]
            placement = context.resolution.of(module)
            if role_module(parent, roles, context) != parent or not is_asked(self.options.device, node, context):
                continue
            if placement.at(context.phase).op not in (None, "aten"):
                continue  # another pass turns it into its own kernel
            layer = _layer(node, context)
            if layer is not None:
                groups.setdefault((parent, layer.x), []).append(layer)
        return {key: layers for key, layers in groups.items() if len(layers) > 1}

    @staticmethod
    def _merge(graph: fx.Graph, context: PassContext, block: str, layers: Sequence[Layer]) -> None:
        first = layers[0].node
        total = sum(layer.width for layer in layers)
        weight = _merged_input(graph, context, block, "weight", [x.weight for x in layers], first.args[1], total)
        arguments: list[fx.Node] = [layers[0].x, weight]
        biases = [x.bias for x in layers if x.bias is not None]
        if biases:
            arguments.append(_merged_input(graph, context, block, "bias", biases, first.args[2], total))
        with graph.inserting_before(first):
            call = insert_call(graph, linear, arguments, like=first, module=block)
            sizes = [layer.width for layer in layers]
            split = insert_call(graph, torch.ops.aten.split_with_sizes.default, (call, sizes, -1), like=call)
            parts = [insert_call(graph, operator.getitem, (split, i), like=call) for i in range(len(layers))]
        for layer, part in zip(layers, parts, strict=True):
            layer.node.replace_all_uses_with(part)
        refresh_values(parts)
        names = tuple(layer.node.name for layer in layers)
        for layer in layers:
            graph.erase_node(layer.node)
        context.record(
            Rewrite(
                what=f"{len(layers)} linear layers of one input → one of {total} outputs",
                module=block,
                before=tuple(op_name(call) for _ in layers),
                after=tuple(op_name(n) for n in (call, split, *parts)),
                nodes_before=names,
                nodes_after=tuple(n.name for n in (call, split, *parts)),
            )
        )


def _layer(node: fx.Node, context: PassContext) -> Layer | None:
    """The node as a layer over parameters, or None if its weight or bias is something else."""
    x, weight = node.args[0], node.args[1]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    names: list[str | None] = []
    for parameter in (weight, bias):
        if parameter is None:
            names.append(None)
            continue
        entry = context.captured.inputs.get(parameter.name) if isinstance(parameter, fx.Node) else None
        if entry is None or entry.kind != "parameter" or entry.mutated:
            return None
        names.append(entry.name)
    val, source = tensor_of(weight), strip(x)
    if names[0] is None or val is None or val.dim() != 2 or not isinstance(source, fx.Node):
        return None
    return Layer(node, source, names[0], names[1], int(val.shape[0]), val.dtype)


def _why_not(layers: Sequence[Layer]) -> str | None:
    names = ", ".join(layer.weight.rpartition(".")[0].rpartition(".")[2] for layer in layers)
    if len({layer.dtype for layer in layers}) > 1:
        return f"{names} read one input and have weights of different dtypes"
    if len({layer.bias is None for layer in layers}) > 1:
        return f"{names} read one input, some with a bias and some without"
    if len({layer.weight for layer in layers}) < len(layers):
        return f"{names} read one input, two of them with one weight"
    return None


def _merged_input(
    graph: fx.Graph, context: PassContext, block: str, what: str, names: Sequence[str], like: object, total: int
) -> fx.Node:
    """A new graph input: parameters one above the other."""
    val, mode = tensor_of(like), fake_mode_of(graph)
    assert val is not None and mode is not None
    with mode:
        fake = val.new_empty((total, *val.shape[1:]))
    node = insert_placeholder(graph, f"{block.replace('.', '_')}_merged_{what}", fake)
    request = MergedRequest(tuple((str(i), name) for i, name in enumerate(names)))
    context.packed[node.name] = PackedWeight(request, 0)
    leaves = "+".join(name.rpartition(".")[0].rpartition(".")[2] for name in names)
    context.captured.inputs[node.name] = GraphInput("packed", f"{block}.({leaves}).{what}", -1)
    return node

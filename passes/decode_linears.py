"""decode_linears: linear layers over the rows of a decode step → ``ktfx::linear_rows``, one call an input."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ktfx.canonical import strip, tensor_of
from ktfx.fusion import OnDevice, device_name, is_asked
from ktfx.graph import info, insert_call, op_name
from ktfx.ops.linear_rows import MOST_ROWS, MOST_WEIGHTS
from ktfx.pass_manager import Pass, PassContext, Rewrite, register_pass

linear = torch.ops.aten.linear.default
linear_rows = torch.ops.ktfx.linear_rows.default
_DTYPES = frozenset({torch.bfloat16, torch.float16})


@register_pass
class DecodeLinears(Pass):
    """A step of one or two rows has to read each weight once and next to nothing else: a kernel that does only that
    needs less time than a general product, and begins to read while the kernel before it ends. Layers of one module
    that read one input (q, k and v; gate and up) share a call. The weights stay where they are and as they are. Sums
    are in float32, in another order.
    """

    name = "decode_linears"
    numerics_preserving = True

    Options = OnDevice
    options: OnDevice

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        if context.phase != "generate":
            return
        before = len(context.rewrites)
        for nodes in self._groups(gm.graph, context):
            module = _block(nodes)
            if context.allows("decode_linears", module):
                _replace(gm.graph, context, nodes, module)
        if len(context.rewrites) > before:
            gm.graph.eliminate_dead_code()
            gm.recompile()

    def _groups(self, graph: fx.Graph, context: PassContext) -> list[list[fx.Node]]:
        """Layers that one call can do, in the order of their first."""
        groups: dict[tuple[Any, ...], list[fx.Node]] = {}
        full: list[list[fx.Node]] = []
        for node in graph.find_nodes(op="call_function", target=linear):
            if not is_asked(self.options.device, node, context):
                continue
            module = info(node).module
            why = _why_not(node)
            if why is not None:
                context.miss(module, f"decode_linears: {why}")
                continue
            key = (strip(node.args[0]), module.rpartition(".")[0], device_name(node, context), _bias(node) is None)
            group = groups.setdefault(key, [])
            group.append(node)
            if len(group) == MOST_WEIGHTS:
                full.append(groups.pop(key))
        return full + list(groups.values())


def _why_not(node: fx.Node) -> str | None:
    x, weight = tensor_of(node.args[0]), tensor_of(node.args[1])
    bias = tensor_of(_bias(node))
    if x is None or weight is None or weight.dim() != 2:
        return "its weight is no matrix"
    if weight.dtype not in _DTYPES or x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        return f"it multiplies {x.dtype} by {weight.dtype}, not two of bfloat16 or float16"
    if any(isinstance(p, fx.Node) and p.op != "placeholder" for p in (node.args[1], _bias(node))):
        return "its weight is computed, not a parameter"
    if not weight.is_contiguous():
        return "its weight is stored transposed"
    rows = x.numel() // x.shape[-1]
    if not isinstance(rows, int) or not 1 <= rows <= MOST_ROWS:
        return f"it has {rows} rows, and the kernel is for at most {MOST_ROWS}"
    return None


def _bias(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


def _block(nodes: Sequence[fx.Node]) -> str:
    """The module of one layer, or the one around several."""
    module = info(nodes[0]).module
    return module if len(nodes) == 1 else module.rpartition(".")[0]


def _replace(graph: fx.Graph, context: PassContext, nodes: Sequence[fx.Node], module: str) -> None:
    first = nodes[0]
    weights, biases = [n.args[1] for n in nodes], [b for n in nodes if (b := _bias(n)) is not None]
    with graph.inserting_before(first):
        call = insert_call(graph, linear_rows, (strip(first.args[0]), weights, biases), like=first, module=module)
        parts = [insert_call(graph, operator.getitem, (call, i), like=n) for i, n in enumerate(nodes)]
    names, before = tuple(n.name for n in nodes), tuple(op_name(n) for n in nodes)
    for node, part in zip(nodes, parts, strict=True):
        node.replace_all_uses_with(part)
        graph.erase_node(node)
    context.record(
        Rewrite(
            what=f"{len(nodes)} linear layer{'s' * (len(nodes) > 1)} of a decode step → ktfx::linear_rows",
            module=module,
            before=before,
            after=tuple(op_name(n) for n in (call, *parts)),
            nodes_before=names,
            nodes_after=tuple(n.name for n in (call, *parts)),
        )
    )

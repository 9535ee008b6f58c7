"""decode_linears: linear layers over the rows of a decode step → ``ktfx::linear_rows``, one call an input."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ktfx.canonical import CAST, op_family, strip, tensor_of
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
    that read one input (q, k and v; gate and up) share a call. The weights stay where they are and as they are, also
    those that the model casts to float32 for the product (routers). Sums are in float32, in another order.
    """

    name = "decode_linears"
    numerics_preserving = True

    Options = OnDevice
    options: OnDevice

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        if context.phase != "generate":
            return
        before = len(context.rewrites)
        for layers in self._groups(gm.graph, context):
            module = _block(layers)
            if context.allows("decode_linears", module):
                _replace(gm.graph, context, layers, module)
        if len(context.rewrites) > before:
            gm.graph.eliminate_dead_code()
            gm.recompile()

    def _groups(self, graph: fx.Graph, context: PassContext) -> list[list[Layer]]:
        """Layers that one call can do, in the order of their first."""
        groups: dict[tuple[Any, ...], list[Layer]] = {}
        full: list[list[Layer]] = []
        for node in graph.find_nodes(op="call_function", target=linear):
            if not is_asked(self.options.device, node, context):
                continue
            module = info(node).module
            layer = _layer(node)
            why = _why_not(layer)
            if why is not None:
                context.miss(module, f"decode_linears: {why}")
                continue
            biased = layer.bias is not None
            key = (strip(layer.x), module.rpartition(".")[0], device_name(node, context), biased, layer.wide)
            group = groups.setdefault(key, [])
            group.append(layer)
            if len(group) == MOST_WEIGHTS:
                full.append(groups.pop(key))
        return full + list(groups.values())


@dataclass(frozen=True)
class Layer:
    """One ``aten.linear`` and what it multiplies; if all of it is cast to float32 first (``wide``), before the cast."""

    node: fx.Node
    x: Any
    weight: Any
    bias: Any
    wide: bool


def _layer(node: fx.Node) -> Layer:
    x, weight, bias = node.args[0], node.args[1], _bias(node)
    narrow_x, narrow_weight = _before_cast(x), _before_cast(weight)
    narrow_bias = None if bias is None else _before_cast(bias)
    if narrow_x is None or narrow_weight is None or (bias is not None and narrow_bias is None):
        return Layer(node, x, weight, bias, False)
    return Layer(node, narrow_x, narrow_weight, narrow_bias, True)


def _before_cast(value: Any) -> Any:
    """What a cast from 16 bits to float32 reads; None for anything else."""
    value = strip(value)
    if not isinstance(value, fx.Node) or op_family(value.target) != CAST:
        return None
    mine, theirs = tensor_of(value), tensor_of(value.args[0])
    if mine is None or theirs is None or mine.device != theirs.device:
        return None
    return value.args[0] if mine.dtype == torch.float32 and theirs.dtype in _DTYPES else None


def _why_not(layer: Layer) -> str | None:
    x, weight, bias = tensor_of(layer.x), tensor_of(layer.weight), tensor_of(layer.bias)
    if x is None or weight is None or weight.dim() != 2:
        return "its weight is no matrix"
    if weight.dtype not in _DTYPES or x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        return f"it multiplies {x.dtype} by {weight.dtype}, not two of bfloat16 or float16"
    if any(isinstance(p, fx.Node) and p.op != "placeholder" for p in (layer.weight, layer.bias)):
        return "its weight is computed, not a parameter"
    if not weight.is_contiguous():
        return "its weight is stored transposed"
    rows = x.numel() // x.shape[-1]
    if not isinstance(rows, int) or not 1 <= rows <= MOST_ROWS:
        return f"it has {rows} rows, and the kernel is for at most {MOST_ROWS}"
    return None


def _bias(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


def _block(layers: Sequence[Layer]) -> str:
    """The module of one layer, or the one around several."""
    module = info(layers[0].node).module
    return module if len(layers) == 1 else module.rpartition(".")[0]


def _replace(graph: fx.Graph, context: PassContext, layers: Sequence[Layer], module: str) -> None:
    nodes, first = [layer.node for layer in layers], layers[0]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers if layer.bias is not None]
    args = (strip(first.x), weights, biases, *([True] if first.wide else []))
    with graph.inserting_before(first.node):
        call = insert_call(graph, linear_rows, args, like=first.node, module=module)
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

"""group_ropes: in decode steps, the ropes of q and k, and the norms right before them → one ``ktfx::norm_rope``."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ktfx.canonical import strip, tensor_of
from ktfx.fusion import device_name, spans_devices
from ktfx.graph import info, insert_call, op_name
from ktfx.pass_manager import Pass, PassContext, Rewrite, register_pass

rope = torch.ops.ktfx.rope.default
rms_norm = torch.ops.ktfx.rms_norm.default
norm_rope = torch.ops.ktfx.norm_rope.default
aten = torch.ops.aten


@dataclass(frozen=True)
class Turn:
    """One ``ktfx.rope`` call: what it turns before any norm, (B, heads, S, D), and the norm, if one is right before it.

    swap: (B, S, heads, D), to be transposed, where the norm came before the transpose.
    """

    node: fx.Node
    x: fx.Node
    norm: fx.Node | None
    swap: bool

    @property
    def weight(self) -> fx.Node | None:
        found = self.norm.args[1] if self.norm is not None else None
        return found if isinstance(found, fx.Node) else None


@register_pass
class GroupRopes(Pass):
    """A launch costs a decode step more than the arithmetic of a norm or a rope: q and k go together, with their norms.
    Works on what ``fuse_rope`` and ``fuse_norms`` made, wherever they made it. Bit for bit the same.
    """

    name = "group_ropes"
    numerics_preserving = True

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        if context.phase != "generate":
            return
        before = len(context.rewrites)
        groups: dict[tuple[Any, ...], list[fx.Node]] = {}
        for node in gm.graph.find_nodes(op="call_function", target=rope):
            module, device = info(node).module, device_name(node, context)
            groups.setdefault((module, device, *node.args[1:]), []).append(node)
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        for (module, *_), nodes in groups.items():
            turns = [_turn(n, context) for n in nodes]
            why = _why_not(turns, order)
            if why is not None:
                context.miss(module, f"group_ropes: {why}")
            elif context.allows("group_ropes", module):
                _replace(gm.graph, context, turns, max(nodes, key=order.__getitem__), module)
        if len(context.rewrites) > before:
            gm.graph.eliminate_dead_code()
            gm.recompile()


def _turn(node: fx.Node, context: PassContext) -> Turn:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    inner, swap = strip(x), False
    if isinstance(inner, fx.Node) and inner.target is aten.transpose.int and inner.args[1:] in ((1, 2), (2, 1)):
        inner, swap = strip(inner.args[0]), True
    if not isinstance(inner, fx.Node) or inner.target is not rms_norm or len(inner.users) > 1:
        return Turn(node, x, None, False)
    val, source = tensor_of(inner), inner.args[0]
    if val is None or val.dim() != 4 or not isinstance(source, fx.Node) or spans_devices((inner,), node, context):
        return Turn(node, x, None, False)
    return Turn(node, source, inner, swap)


def _why_not(turns: list[Turn], order: dict[fx.Node, int]) -> str | None:
    if len(turns) != 2:
        return f"{len(turns)} ropes share its tables, not those of q and k alone"
    a, b = (tensor_of(t.node) for t in turns)
    if a is None or b is None or a.dtype != b.dtype or a.shape[-1] != b.shape[-1] or a.shape[0] != b.shape[0]:
        return "the two that share its tables differ in dtype, head size or batch"
    first, last = sorted((t.node for t in turns), key=order.__getitem__)
    if any(order[user] < order[last] for user in first.users):
        return "one of the two is used before the other is made"
    return None


def _replace(graph: fx.Graph, context: PassContext, turns: list[Turn], last: fx.Node, module: str) -> None:
    norms = [t.norm for t in turns if t.norm is not None]
    together = len(norms) == 2 and norms[0].args[2:] == norms[1].args[2:]
    weights = [t.weight for t in turns] if together else []
    eps, kind = norms[0].args[2:] if together else (0.0, "llama")
    first = turns[0].node
    replaced = [*(norms if together else []), *(t.node for t in turns)]
    names, before = tuple(n.name for n in replaced), tuple(op_name(n) for n in replaced)
    with graph.inserting_before(last):
        xs = []
        for t in turns:
            x: Any = t.x if together else t.node.args[0]
            if together and t.swap:
                x = insert_call(graph, aten.transpose.int, (x, 1, 2), like=t.node)
            xs.append(x)
        call = insert_call(graph, norm_rope, (*xs, *first.args[1:4], weights, eps, kind), like=first)
        parts = [insert_call(graph, operator.getitem, (call, i), like=t.node) for i, t in enumerate(turns)]
    for t, part in zip(turns, parts, strict=True):
        t.node.replace_all_uses_with(part)
    context.record(
        Rewrite(
            what="rope of q and k" + (" and the norms before it" if together else "") + " → ktfx.norm_rope",
            module=module,
            before=before,
            after=tuple(op_name(n) for n in (call, *parts)),
            nodes_before=names,
            nodes_after=tuple(n.name for n in (call, *parts)),
        )
    )
    for t in turns:
        graph.erase_node(t.node)

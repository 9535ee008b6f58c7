"""gate_linears: act(gate)·up of two linear layers of a decode step → one ``ktfx::linear_rows`` that writes it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ktfx.canonical import skipped, strip
from ktfx.fusion import spans_devices
from ktfx.graph import info, insert_call, op_name
from ktfx.matcher import Match, Matcher
from ktfx.pass_manager import Pass, PassContext, Rewrite, register_pass
from ktfx.patterns import parse_pattern

linear_rows = torch.ops.ktfx.linear_rows.default
_GATES = {
    "silu": "aten.mul(aten.silu(gate), up)",
    "gelu": "aten.mul(aten.gelu(gate), up)",
    "gelu_tanh": "aten.mul(aten.gelu(gate, approximate='tanh'), up)",
    "relu": "aten.mul(aten.relu(gate), up)",
}


@register_pass
class GateLinears(Pass):
    """A program that has the same row of gate and up also has what their product needs: no kernel stands between them
    and the layer that reads it. Works on what ``decode_linears`` made. Gate and up are rounded as before; act(gate)·up
    is formed in float32 and rounded once, as a compiler's fusion does.
    """

    name = "gate_linears"
    numerics_preserving = True

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        if not gm.graph.find_nodes(op="call_function", target=linear_rows):
            return
        before = len(context.rewrites)
        for act, pattern in _GATES.items():
            matcher = Matcher(parse_pattern(pattern))
            for root in matcher.candidates(list(gm.graph.nodes)):
                match = matcher.match(root)
                if not isinstance(match, Match):
                    continue
                calls = _calls(match)
                if calls is None:
                    continue
                module = info(calls[0]).module
                why = _why_not(match, calls, context)
                if why is not None:
                    context.miss(module, f"gate_linears: {why}")
                elif context.allows("gate_linears", module):
                    _replace(gm.graph, context, match, calls[0], act, module)
        if len(context.rewrites) > before:
            gm.graph.eliminate_dead_code()
            gm.recompile()


def _calls(match: Match) -> tuple[fx.Node, fx.Node] | None:
    """The calls whose results gate and up are, if both are such results."""
    parts = [strip(match.captures[name]) for name in ("gate", "up")]
    if not all(isinstance(p, fx.Node) and p.target is operator.getitem for p in parts):
        return None
    gate, up = (p.args[0] for p in parts)
    return (gate, up) if gate.target is linear_rows and up.target is linear_rows else None


def _why_not(match: Match, calls: tuple[fx.Node, fx.Node], context: PassContext) -> str | None:
    call: fx.Node = calls[0]
    if calls[1] is not call:
        return "gate and up are two calls"
    weights: Any = call.args[1]
    if len(weights) != 2 or weights[0].meta["val"].shape != weights[1].meta["val"].shape:
        return f"its call has {len(weights)} weights, not a gate's and up's of one shape"
    if call.args[3:]:
        return "gate and up are not in their weights' dtype"
    other = next((r for part in call.users for r in _readers(part) if r not in match.nodes), None)
    if other is not None:
        return f"{other.name} reads gate or up as well"
    return spans_devices(match.nodes, call, context)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads the value, also where it is only passed on."""
    for user in node.users:
        if skipped(user) is not None:
            yield from _readers(user)
        else:
            yield user


def _replace(graph: fx.Graph, context: PassContext, match: Match, call: fx.Node, act: str, module: str) -> None:
    x, weights, biases = call.args[:3]
    gate, up = (strip(match.captures[name]).args[1] for name in ("gate", "up"))

    def in_order(values: Any) -> list[Any]:
        return [values[gate], values[up]] if values else []

    gone = (call, *match.nodes)
    names, before = tuple(n.name for n in gone), tuple(op_name(n) for n in gone)
    with graph.inserting_before(call):
        made = insert_call(graph, linear_rows, (x, in_order(weights), in_order(biases), False, act), like=call)
        part = insert_call(graph, operator.getitem, (made, 0), like=match.root)
    match.root.replace_all_uses_with(part)
    context.record(
        Rewrite(
            what=f"{act}(gate)·up and their linear layers → ktfx::linear_rows",
            module=module,
            before=before,
            after=(op_name(made), op_name(part)),
            nodes_before=names,
            nodes_after=(made.name, part.name),
        )
    )

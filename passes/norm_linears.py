"""norm_linears: in decode steps, an RMS norm and the linear layers that read it → ``ktfx::norm_linear_rows``."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ktfx.canonical import tensor_of
from ktfx.fusion import spans_devices
from ktfx.graph import info, insert_call, op_name
from ktfx.pass_manager import Pass, PassContext, Rewrite, register_pass

aten = torch.ops.aten
linear_rows = torch.ops.ktfx.linear_rows.default
norm_linear_rows = torch.ops.ktfx.norm_linear_rows.default
rms_norm = torch.ops.ktfx.rms_norm.default
add_rms_norm = torch.ops.ktfx.add_rms_norm.default
# Each program works the norm out again: with more outputs (a head) or longer rows than these that may cost more than a
# launch. Measured at 2048 inputs and 5120 outputs, where it saves 7 µs of 72 a layer (one H100).
MOST_OUTPUTS = 16384
MOST_INPUTS = 4096
_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim})


@register_pass
class NormLinears(Pass):
    """A norm of one row is too little work for a kernel, and its launch stands between the layer before and weights
    that could be read meanwhile. Works on what ``fuse_norms`` and ``decode_linears`` made. The mean is summed in
    another order, nothing else changes.
    """

    name = "norm_linears"
    numerics_preserving = True

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        before = len(context.rewrites)
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        taken: set[fx.Node] = set()
        for node in gm.graph.find_nodes(op="call_function", target=linear_rows):
            norm = _norm_of(node.args[0])
            if norm is None or norm in taken:
                continue
            module = info(norm).module
            early = _early(norm, node, order)
            why = _why_not(norm, node, context) or (early if isinstance(early, str) else None)
            if why is not None:
                context.miss(module, f"norm_linears: {why}")
            elif context.allows("norm_linears", module):
                assert not isinstance(early, str)
                _replace(gm.graph, context, norm, node, early, module)
                taken.add(norm)
        if len(context.rewrites) > before:
            gm.graph.eliminate_dead_code()
            gm.recompile()


def _norm_of(value: Any) -> fx.Node | None:
    """The norm whose result this is, seen through changes of the leading dimensions."""
    while isinstance(value, fx.Node) and value.target in _VIEWS:
        source, val = tensor_of(value.args[0]), tensor_of(value)
        if source is None or val is None or source.shape[-1] != val.shape[-1]:
            return None
        value = value.args[0]
    if isinstance(value, fx.Node) and value.target is operator.getitem and value.args[1] == 0:
        value = value.args[0]
        return value if isinstance(value, fx.Node) and value.target is add_rms_norm else None
    return value if isinstance(value, fx.Node) and value.target is rms_norm else None


def _results(norm: fx.Node) -> list[fx.Node]:
    """The norm's results as nodes: of ``rms_norm`` itself, of ``add_rms_norm`` what reads its tuple."""
    return [norm] if norm.target is rms_norm else list(norm.users)


def _early(norm: fx.Node, call: fx.Node, order: dict[fx.Node, int]) -> list[fx.Node] | str:
    """What reads the norm and stands before the call, if all of that are views, which can move behind it."""
    found: list[fx.Node] = []
    waiting = [u for r in _results(norm) for u in r.users]
    while waiting:
        user = waiting.pop()
        if user is call or user in found or order[user] > order[call]:
            continue
        if user.target not in _VIEWS:
            return f"{user.name} reads it before {call.name} is made"
        found.append(user)
        waiting += user.users
    return sorted(found, key=order.__getitem__)


def _why_not(norm: fx.Node, call: fx.Node, context: PassContext) -> str | None:
    weights: Any = call.args[1]
    outputs, inputs = sum(int(w.meta["val"].shape[0]) for w in weights), int(weights[0].meta["val"].shape[1])
    if inputs > MOST_INPUTS:
        return f"its rows of {inputs} values would be read again by each few of the outputs"
    if outputs > MOST_OUTPUTS:
        return f"the layers that read it have {outputs} outputs, and it is worked out again for every few of them"
    if info(norm).layer != info(call).layer:
        return "it lies in another layer than what reads it"
    x, weight = tensor_of(norm.args[0]), tensor_of(norm.args[1 if norm.target is rms_norm else 2])
    if x is None or weight is None or weight.dtype != x.dtype or not weight.is_contiguous():
        return "its weight is in another dtype than its input"
    return spans_devices((norm,), call, context)


def _replace(
    graph: fx.Graph, context: PassContext, norm: fx.Node, call: fx.Node, early: list[fx.Node], module: str
) -> None:
    """The new call where the linear layers are; ``early``, views of the norm's results, move behind it."""
    results = _results(norm)
    gone = (norm, *(r for r in results if r is not norm), call)
    names, before = tuple(n.name for n in gone), tuple(op_name(n) for n in gone)
    if norm.target is rms_norm:
        x, weight, eps, kind = norm.args
        residual: Any = None
    else:
        x, residual, weight, eps, kind = norm.args
    with graph.inserting_before(call):
        made = insert_call(graph, norm_linear_rows, (x, residual, weight, eps, kind, *call.args[1:]), like=call)
        parts: list[fx.Node] = []
        for r in results:
            parts.append(insert_call(graph, operator.getitem, (made, 0 if r is norm else r.args[1]), like=r))
            r.replace_all_uses_with(parts[-1])
        first = 1 if residual is None else 2
        for g in list(call.users):
            assert isinstance(g.args[1], int)
            part = insert_call(graph, operator.getitem, (made, first + g.args[1]), like=g)
            parts.append(part)
            shape = g.meta["val"].shape
            if part.meta["val"].shape != shape:
                part = insert_call(graph, aten.view.default, (part, list(shape)), like=g)
            g.replace_all_uses_with(part)
    for view in reversed(early):
        parts[len(results) - 1].append(view)
    context.record(
        Rewrite(
            what="RMS norm and the linear layers that read it → ktfx.norm_linear_rows",
            module=module,
            before=before,
            after=tuple(op_name(n) for n in (made, *parts)),
            nodes_before=names,
            nodes_after=tuple(n.name for n in (made, *parts)),
        )
    )

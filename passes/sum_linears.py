"""sum_linears: a linear layer of a decode step and the sum that takes its result in → ``ktfx::linear_rows_add``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ktfx.canonical import op_family, same_shape, skipped, strip, tensor_of
from ktfx.fusion import device_name, spans_devices
from ktfx.graph import info, insert_call, is_tensor_node, op_name
from ktfx.pass_manager import Pass, PassContext, Rewrite, register_pass

aten = torch.ops.aten
linear_rows = torch.ops.ktfx.linear_rows.default
linear_rows_add = torch.ops.ktfx.linear_rows_add.default
_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim})


@register_pass
class SumLinears(Pass):
    """The shared experts' down projection writes the sum with the routed experts (DeepSeek, GLM), times the sigmoid of
    its gate (Qwen-MoE), where a kernel of their own would begin only when it has ended. Works on what
    ``decode_linears`` made, for sums that ``fuse_norms`` left. The product is rounded as before; sigmoid, product and
    sum are formed in float32 and rounded once, as a compiler's fusion does.
    """

    name = "sum_linears"
    numerics_preserving = True

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        before = len(context.rewrites)
        for call in gm.graph.find_nodes(op="call_function", target=linear_rows):
            found = _sum_of(call)
            if found is None:
                continue
            module = info(call).module
            why = spans_devices(found.nodes, call, context) or _waits(found, call, context)
            if why is not None:
                context.miss(module, f"sum_linears: {why}")
            elif context.allows("sum_linears", module):
                _replace(gm.graph, context, call, found, module)
        if len(context.rewrites) > before:
            gm.graph.eliminate_dead_code()
            gm.recompile()


@dataclass(frozen=True)
class Sum:
    """What becomes of a call's one result: nodes from its getitem to the sum, the last. share: of the sigmoid."""

    nodes: tuple[fx.Node, ...]
    addend: fx.Node
    share: fx.Node | None

    @property
    def root(self) -> fx.Node:
        return self.nodes[-1]


def _sum_of(call: fx.Node) -> Sum | None:
    """The sum that alone reads the result, through changes of leading dimensions and a share; the result is not wide,
    and of one layer."""
    if len(call.args[1]) != 1 or call.args[3:] or len(call.users) != 1:  # type: ignore[arg-type]
        return None
    (node,) = call.users
    share: fx.Node | None = None
    nodes: list[fx.Node] = []
    while True:
        nodes.append(node)
        if len(node.users) != 1:
            return None
        (user,) = node.users
        if not _keeps_rows(user, node):
            return None
        family = op_family(user.target)
        other = _other(user, node) if family in ("aten.add", "aten.mul") else None
        if family == "aten.add" and other is not None and user.kwargs.get("alpha", 1) == 1:
            if not _keeps_rows(other, node) or not same_shape(other.meta["val"].shape, user.meta["val"].shape):
                return None
            return Sum((*nodes, user), other, share)
        if family == "aten.mul" and other is not None and share is None:
            share = _logit(other, node)
            if share is None:
                return None
        elif user.target not in _VIEWS and skipped(user) is not node:
            return None
        node = user


def _other(user: fx.Node, node: fx.Node) -> fx.Node | None:
    """The other operand of a product or sum of two tensors."""
    a, b = user.args[:2]
    other = b if a is node else a
    return other if isinstance(other, fx.Node) and other is not node and tensor_of(other) is not None else None


def _keeps_rows(after: fx.Node, before: fx.Node) -> bool:
    """Whether these have as many rows of one length and dtype."""
    a, b = tensor_of(after), tensor_of(before)
    if a is None or b is None or a.dtype != b.dtype or a.dim() == 0:
        return False
    return bool(a.shape[-1] == b.shape[-1] and a.numel() == b.numel())


def _logit(factor: fx.Node, of: fx.Node) -> fx.Node | None:
    """What a factor of one number a row is the sigmoid of."""
    sigmoid = strip(factor)
    if not isinstance(sigmoid, fx.Node) or op_family(sigmoid.target) != "aten.sigmoid":
        return None
    logit, val, result = sigmoid.args[0], tensor_of(sigmoid.args[0]), tensor_of(of)
    if not isinstance(logit, fx.Node) or val is None or result is None:
        return None
    fits = val.dtype == result.dtype and val.dim() > 0 and val.shape[-1] == 1
    return logit if fits and val.numel() * result.shape[-1] == result.numel() else None


def _waits(found: Sum, call: fx.Node, context: PassContext) -> str | None:
    """Why the product should not wait for the sum's other operand: another device works it out meanwhile."""
    device, layer = device_name(call, context), info(call).layer
    seen = {call}
    waiting: list[Any] = [*call.all_input_nodes]
    while waiting:
        node = waiting.pop()
        if node not in seen and info(node).layer == layer:
            seen.add(node)
            waiting += node.all_input_nodes
    waiting = [n for n in (found.addend, found.share) if n is not None]
    while waiting:
        node = waiting.pop()
        if node in seen or node.op != "call_function" or info(node).layer != layer or not is_tensor_node(node):
            continue
        seen.add(node)
        if device_name(node, context) != device:
            return f"{node.name}, which it is added to, runs on {device_name(node, context)}, it on {device} meanwhile"
        waiting += node.all_input_nodes
    return None


def _replace(graph: fx.Graph, context: PassContext, call: fx.Node, found: Sum, module: str) -> None:
    x, weights, biases = call.args[:3]
    gone = (call, *found.nodes)
    names, before = tuple(n.name for n in gone), tuple(op_name(n) for n in gone)
    weight, bias = weights[0], biases[0] if biases else None  # type: ignore[index]
    args = (x, weight, bias, found.addend, *([] if found.share is None else [found.share]))
    with graph.inserting_before(found.root):
        made = insert_call(graph, linear_rows_add, args, like=call)
    found.root.replace_all_uses_with(made)
    context.record(
        Rewrite(
            what="linear layer and the sum that it goes into → ktfx::linear_rows_add",
            module=module,
            before=before,
            after=(op_name(made),),
            nodes_before=names,
            nodes_after=(made.name,),
        )
    )

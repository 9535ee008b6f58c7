"""write_caches: in decode steps, a layer's new keys and values into its static cache → one ``ktfx::cache_write``, or
with the norm and rope right before it ``ktfx::norm_rope_write``."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ktfx.canonical import strip, tensor_of
from ktfx.fusion import OnDevice, device_name, is_asked, spans_devices
from ktfx.graph import info, insert_call, op_name, output_node
from ktfx.pass_manager import Pass, PassContext, Rewrite, register_pass

aten = torch.ops.aten
norm_rope = torch.ops.ktfx.norm_rope.default
cache_write = torch.ops.ktfx.cache_write.default
norm_rope_write = torch.ops.ktfx.norm_rope_write.default


@dataclass(frozen=True)
class Update:
    """A layer's update: ``index_copy`` of keys and of values at rows behind ``count``, and the count moved on.

    values: the later of the two. moved: count + the new rows, written back to count; None where the graph does not
    move it.
    """

    keys: fx.Node
    values: fx.Node
    count: fx.Node
    moved: fx.Node | None

    @property
    def replaced(self) -> list[fx.Node]:
        return [self.keys, self.values, *([self.moved] if self.moved is not None else [])]


@register_pass
class WriteCaches(Pass):
    """A decode step writes two rows a layer to its cache and adds one to a count. As kernels of the compiler's these
    are three launches, in which nothing is begun ahead; as one op, done in place by the kernel that makes the keys,
    none. Bit for bit the same.
    """

    name = "write_caches"
    numerics_preserving = True

    Options = OnDevice
    options: OnDevice

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        if context.phase != "generate":
            return
        before = len(context.rewrites)
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        written = _written(gm.graph, context)
        pairs: dict[tuple[Any, ...], list[fx.Node]] = {}
        for node in gm.graph.find_nodes(op="call_function", target=aten.index_copy.default):
            if is_asked(self.options.device, node, context):
                pairs.setdefault((info(node).module, device_name(node, context), strip(node.args[2])), []).append(node)
        for (module, *_), nodes in pairs.items():
            update = _update(nodes, written)
            why = update if isinstance(update, str) else _why_not(update, order)
            if why is not None:
                context.miss(module, f"write_caches: {why}")
            elif context.allows("write_caches", module):
                assert isinstance(update, Update)
                _replace(gm.graph, context, update, _turned(update, order, context), module)
        if len(context.rewrites) > before:
            gm.graph.eliminate_dead_code()
            gm.recompile()


def _update(nodes: list[fx.Node], written: dict[Any, str]) -> Update | str:
    """What two ``index_copy`` with one index are, or in words why they are no update of a cache."""
    if len(nodes) != 2:
        return f"{len(nodes)} tensors are written at one index, not keys and values alone"
    for node in nodes:
        cache, new = node.args[0], tensor_of(node.args[3])
        held = tensor_of(cache)
        if not isinstance(cache, fx.Node) or held is None or new is None or held.dim() != 4 or node.args[1] != 2:
            return f"{node.name} does not write rows of a (batch, heads, rows, size) cache"
        if written.get(node) != cache.name:
            return f"{node.name} is not written back to the cache"
        if held.dtype != new.dtype or held.shape[0] != new.shape[0] or held.stride(3) != 1:
            return f"{node.name} writes {new.dtype} {tuple(new.shape)} to {held.dtype} {tuple(held.shape)}"
    keys, values = nodes
    k, v = tensor_of(keys.args[3]), tensor_of(values.args[3])
    assert k is not None and v is not None
    if k.shape[:3] != v.shape[:3]:
        return f"keys are {tuple(k.shape)}, values {tuple(v.shape)}"
    count = _count(keys.args[2], k.shape[2])
    if isinstance(count, str):
        return count
    moved = [
        n
        for n in count.users
        if n.target is aten.add.Tensor and n.args == (count, k.shape[2]) and written.get(n) == count.name
    ]
    return Update(keys, values, count, moved[0] if moved else None)


def _written(graph: fx.Graph, context: PassContext) -> dict[Any, str]:
    """New value → the placeholder that it is written back to."""
    outputs = output_node(graph).args[0]
    assert isinstance(outputs, (list, tuple))
    return {outputs[position]: name for position, name in context.captured.writes}


def _count(index: Any, rows: int) -> fx.Node | str:
    """The count in ``arange(rows) + count``."""
    total = strip(index)
    if isinstance(total, fx.Node) and total.target is aten.add.Tensor and len(total.args) == 2 and not total.kwargs:
        for steps, count in (total.args, total.args[::-1]):
            steps, count, value = strip(steps), strip(count), tensor_of(strip(count))
            if not isinstance(steps, fx.Node) or steps.target is not aten.arange.default or steps.args != (rows,):
                continue
            if not isinstance(count, fx.Node) or count.op != "placeholder" or value is None:
                continue
            if value.dtype == torch.int64 and value.numel() == 1:
                return count
    return "the rows are not those behind a count that the cache keeps"


def _why_not(update: Update, order: dict[fx.Node, int]) -> str | None:
    for node in update.replaced:
        early = next((u for u in node.users if order[u] < order[update.values]), None)
        if early is not None:
            return f"{early.name} reads {node.name} before {update.values.name} is made"
    return None


def _turned(update: Update, order: dict[fx.Node, int], context: PassContext) -> fx.Node | None:
    """The ``ktfx.norm_rope`` that makes the keys, if only the cache takes them and its q is not read earlier."""
    k = strip(update.keys.args[3])
    if not isinstance(k, fx.Node) or k.target is not operator.getitem or k.args[1] != 1 or len(k.users) != 1:
        return None
    call = k.args[0]
    assert isinstance(call, fx.Node)
    if call.target is not norm_rope or spans_devices((call,), update.keys, context):
        return None
    readers = [u for g in call.users if g is not k for u in g.users]
    return call if all(order[u] > order[update.values] for u in readers) else None


def _replace(graph: fx.Graph, context: PassContext, update: Update, turned: fx.Node | None, module: str) -> None:
    """One call before the later of the two that write."""
    results = gone = update.replaced
    new: tuple[Any, ...] = (update.keys.args[3], update.values.args[3], update.moved is not None)
    target: Any = cache_write
    if turned is not None:
        q, k, *rest = turned.args
        target, new = norm_rope_write, (q, k, new[1], new[2], *rest)
        gone = [turned, *gone]
    names, before = tuple(n.name for n in gone), tuple(op_name(n) for n in gone)
    caches = (update.keys.args[0], update.values.args[0], update.count)
    with graph.inserting_before(update.values):
        call = insert_call(graph, target, (*caches, *new), like=update.keys)
        parts = [insert_call(graph, operator.getitem, (call, i), like=n) for i, n in enumerate(results)]
        for node, part in zip(results, parts, strict=True):
            node.replace_all_uses_with(part)
        if turned is not None:
            for g in [g for g in turned.users if g.args[1] == 0]:
                parts.append(insert_call(graph, operator.getitem, (call, 3), like=g))
                g.replace_all_uses_with(parts[-1])
    for node in results:
        graph.erase_node(node)
    context.record(
        Rewrite(
            what="norm, rope and the cache's update → ktfx.norm_rope_write"
            if turned is not None
            else "a cache's update → ktfx.cache_write",
            module=module,
            before=before,
            after=tuple(op_name(n) for n in (call, *parts)),
            nodes_before=names,
            nodes_after=tuple(n.name for n in (call, *parts)),
        )
    )

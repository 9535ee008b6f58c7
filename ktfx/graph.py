"""The normal form's vocabulary: what a node carries, and the one way to add a node.

A graph in normal form is functional pre-dispatch ATen. Every node has ``meta["val"]`` (its fake value) and
``meta["ktfx"]``, a ``NodeInfo``. Passes read and write these through this file alone, so no node ever lacks them.
"""

from __future__ import annotations

import contextlib
import heapq
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

INFO = "ktfx"
TRANSFER = "ktfx.transfer.default"


@dataclass(frozen=True)
class NodeInfo:
    """What ktfx knows of a node.

    module: dotted path of the innermost module that the node came from, relative to the model; ``""`` is the root.
    cls: that module's class name.
    layer: index of the decoder layer it lies in, None outside.
    device: the device *name* it runs on; None until ``assign_devices`` (and for integers, which live on the host).
    rule: the label of the rule that applies to its module (``rule 3``), None where none does.
    out_device: the device name its value is sent to first (a rule's ``out_device``).
    """

    module: str = ""
    cls: str = ""
    layer: int | None = None
    device: str | None = None
    rule: str | None = None
    out_device: str | None = None


@dataclass(frozen=True)
class GraphInput:
    """One placeholder of the normal form.

    kind: ``parameter`` and ``buffer`` belong to the model and are bound once; ``packed`` is made from parameters by a
        pass (see ``PackedWeight``); ``constant`` is a tensor that the model's code makes from literals; ``input`` comes
        with every call; ``symint`` is a size.
    name: dotted parameter name, or the source expression of an input.
    index: position among the arguments that Dynamo passes; -1 for ``packed`` and ``constant``.
    mutated: the call writes to it (a KV cache).
    home: the device name where an input's tensor lies (mutations go back there).
    """

    kind: str
    name: str
    index: int
    mutated: bool = False
    home: str | None = None


def info(node: fx.Node) -> NodeInfo:
    return node.meta.get(INFO) or NodeInfo()


def set_info(node: fx.Node, **changes: Any) -> None:
    node.meta[INFO] = replace(info(node), **changes)


def is_tensor_node(node: fx.Node) -> bool:
    """True if the node's value is a tensor or a sequence of tensors (False: an integer, or nothing)."""
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor):
        return True
    return isinstance(val, (tuple, list)) and any(isinstance(v, torch.Tensor) for v in val)


def is_size_node(node: fx.Node) -> bool:
    """True if the node computes a size (SymInt, int, or a bool or float of them)."""
    return isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def op_name(node: fx.Node) -> str:
    """``aten.mul.Tensor``, ``ktfx.routed_experts.default``, ``getitem``: the name a reader knows."""
    if node.op != "call_function":
        return node.op
    return target_name(node.target)


def target_name(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    name = getattr(target, "__name__", str(target))
    return f"{getattr(target, '__module__', '')}.{name}".lstrip(".")


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    return graph.find_nodes(op="placeholder")


def output_node(graph: fx.Graph) -> fx.Node:
    return next(iter(reversed(graph.nodes)))


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    for node in graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, torch._subclasses.FakeTensor):
            return val.fake_mode
    return None


def node_args(node: fx.Node) -> Iterator[fx.Node]:
    """The distinct nodes among the arguments, in order."""
    yield from node.all_input_nodes


def insert_call(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    like: fx.Node,
    name: str | None = None,
    **changes: Any,
) -> fx.Node:
    """Add a call at the graph's insertion point, run it on fakes, and give it the meta of ``like``.

    like: the node whose module, layer, rule, stack trace and device the new node inherits; ``changes`` override fields
        of its ``NodeInfo``.
    """
    node = graph.create_node("call_function", target, tuple(args), dict(kwargs or {}), name=name)
    node.meta["val"] = _fake_result(node)
    for key in ("stack_trace", "nn_module_stack"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    node.meta[INFO] = replace(info(like), **changes)
    return node


def _fake_result(node: fx.Node) -> Any:
    """What a call gives on the fake values of its arguments."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    # torch 2.11 runs composite operators (linear, reshape) on symbolic sizes only through the Python dispatcher.
    with fake_mode_of(node.graph) or contextlib.nullcontext(), enable_python_dispatcher():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def refresh_values(changed: Iterable[fx.Node]) -> None:
    """Run again, on fakes, what reads these nodes, as far as strides change: a new producer may lay its value out anew.

    A ``view`` that the new strides do not allow becomes a ``reshape``, which copies only where it must.
    """
    heap: list[fx.Node] = []
    waiting: set[fx.Node] = set()

    def wait_for_readers(node: fx.Node) -> None:
        for user in node.users:
            if user.op == "call_function" and user not in waiting:
                waiting.add(user)
                heapq.heappush(heap, user)

    for node in changed:
        wait_for_readers(node)
    while heap:
        node = heapq.heappop(heap)
        waiting.discard(node)
        old = node.meta["val"]
        try:
            new = _fake_result(node)
        except (RuntimeError, ValueError):
            if node.target is not torch.ops.aten.view.default:
                raise
            node.target = torch.ops.aten.reshape.default
            new = _fake_result(node)
        if _layout(new) != _layout(old):
            node.meta["val"] = new
            wait_for_readers(node)


def _layout(val: Any) -> Any:
    if isinstance(val, torch.Tensor):
        return [str(s) for s in (*val.shape, *val.stride())]
    return [_layout(v) for v in val] if isinstance(val, tuple | list) else None


def insert_placeholder(graph: fx.Graph, name: str, val: torch.Tensor) -> fx.Node:
    """Add a graph input after the existing ones (a packed weight). Returns the new placeholder."""
    last = placeholders(graph)[-1] if placeholders(graph) else None
    point = graph.inserting_after(last) if last is not None else graph.inserting_before(next(iter(graph.nodes)))
    with point:
        node = graph.placeholder(name if name.isidentifier() else f"_{name}")
    node.target = node.name  # the generated code spells the target, and a name taken already got a number
    node.meta["val"] = val
    node.meta[INFO] = NodeInfo()
    return node


def replace_devices(node: fx.Node, device: torch.device) -> None:
    """Rewrite every ``device=`` argument to where the node really runs: a trace hard-codes the logical one."""
    if "device" in node.kwargs and node.kwargs["device"] is not None:
        node.kwargs = {**node.kwargs, "device": device}
    if any(isinstance(a, torch.device) for a in node.args):
        node.args = tuple(device if isinstance(a, torch.device) else a for a in node.args)


def tensor_bytes(val: Any) -> int:
    """Bytes of a (fake) tensor; symbolic sizes count with their hints, unknown ones as 0."""
    if not isinstance(val, torch.Tensor):
        return 0
    count = val.element_size()
    for size in val.shape:
        if isinstance(size, torch.SymInt):
            hint = size.node.hint
            count *= int(hint) if hint is not None else 0
        else:
            count *= int(size)
    return count

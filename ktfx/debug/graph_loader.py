"""A snapshot back as a graph: each statement is parsed, never evaluated; running on fakes gives every value's form."""

from __future__ import annotations

import ast
import importlib
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from ktfx.debug.snapshot import InputLine, NodeLine, Snapshot
from ktfx.errors import KtfxError
from ktfx.graph import INFO, NodeInfo
from ktfx.roles import layer_of

_MODULES = ("torch", "math", "operator")
_BUILTINS: dict[str, Any] = {"float": float, "int": int, "bool": bool, "slice": slice, "max": max, "min": min}


def load_graph(
    shot: Snapshot,
    device: torch.device,
    strides: Mapping[str, tuple[int, ...]] | None = None,
    devices: Mapping[str, torch.device] | None = None,
) -> fx.GraphModule:
    """The graph with ``meta["val"]`` (sizes as plain numbers) and ``NodeInfo`` on every node.

    device: where its inputs lie. strides: of inputs that are not contiguous. devices: text of a device in the graph →
    the device to use instead. Raises KtfxError naming the statement that cannot be read or does not run.
    """
    graph = fx.Graph()
    env: dict[str, fx.Node] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for entry in shot.inputs:
        node = env[entry.name] = graph.create_node("placeholder", entry.name, name=entry.name)
        node.meta["val"] = _input_value(entry, device, (strides or {}).get(entry.name), mode)
        node.meta[INFO] = NodeInfo()
    reader = _Reader(env, dict(devices or {}))
    for line in shot.nodes:
        node = env[line.name] = _call(graph, line, reader)
        _describe(node, line)
        infer_value(node, mode)
    graph.output(reader.expression(shot.returns))
    graph.lint()
    return fx.GraphModule(torch.nn.Module(), graph)


def infer_value(node: fx.Node, mode: FakeTensorMode) -> None:
    """Set ``meta["val"]`` of a call by running it on its arguments' fakes. KtfxError if it does not run on them."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])  # type: ignore[misc]
    try:
        with mode, enable_python_dispatcher(), torch.no_grad():
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:
        raise KtfxError(f"{node.format_node()} does not run on its inputs: {type(error).__name__}: {error}") from None


def _input_value(entry: InputLine, device: torch.device, strides: tuple[int, ...] | None, mode: FakeTensorMode) -> Any:
    if entry.dtype == "int":
        return int(entry.shape[0]) if entry.shape else 1
    dtype = getattr(torch, entry.dtype)
    with mode:
        if strides is not None:
            return torch.empty_strided(entry.shape, strides, dtype=dtype, device=device)
        return torch.empty(entry.shape, dtype=dtype, device=device)


def _call(graph: fx.Graph, line: NodeLine, reader: _Reader) -> fx.Node:
    statement = ast.parse(line.text).body[0]
    if not isinstance(statement, ast.Assign):
        raise KtfxError(f"not a statement of a dumped graph: {line.text}")
    value = statement.value
    if isinstance(value, ast.Subscript) and not _is_attributes(value.value):
        args: tuple[Any, ...] = (reader.value(value.value), reader.value(value.slice))
        return graph.create_node("call_function", operator.getitem, args, {}, name=line.name)
    if not isinstance(value, ast.Call):
        raise KtfxError(f"a tensor or subgraph that the graph holds itself cannot be loaded: {line.text}")
    target = reader.target(value.func)
    kwargs = {str(k.arg): reader.value(k.value) for k in value.keywords}
    args = tuple(reader.value(a) for a in value.args)
    return graph.create_node("call_function", target, args, kwargs, name=line.name)


def _is_attributes(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "ATTRIBUTES"


def _describe(node: fx.Node, line: NodeLine) -> None:
    layer = line.layer if line.layer is not None else layer_of(line.module)
    node.meta[INFO] = NodeInfo(line.module, line.cls, layer, line.device, line.rule)
    if line.source:
        file, _, number = line.source.rpartition(":")
        node.meta["stack_trace"] = f'  File "{file}", line {number}, in forward\n    {line.code}\n'


class _Reader:
    """Expressions of dumped programs → arguments of nodes. Only names, literals and a few calls are known."""

    def __init__(self, env: Mapping[str, fx.Node], devices: Mapping[str, torch.device]) -> None:
        self.env, self.devices = env, devices

    def expression(self, text: str) -> Any:
        return self.value(ast.parse(text, mode="eval").body)

    def target(self, node: ast.expr) -> Any:
        """``aten.mul.Tensor``, ``operator.add``, ``torch.sym_max``."""
        names = ast.unparse(node).split(".")
        if len(names) == 1 and names[0] in _BUILTINS:
            return _BUILTINS[names[0]]
        found: Any = importlib.import_module(names[0]) if names[0] in _MODULES else getattr(torch.ops, names[0])
        try:
            for name in names[1:]:
                found = getattr(found, name)
        except AttributeError:
            raise KtfxError(f"there is no operator {ast.unparse(node)} here") from None
        return found

    def value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self._named(node.id)
        if isinstance(node, ast.Tuple):
            return tuple(self.value(e) for e in node.elts)
        if isinstance(node, ast.List):
            return [self.value(e) for e in node.elts]
        if isinstance(node, ast.Dict):
            return {self.value(k): self.value(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self.value(node.operand)
        if isinstance(node, ast.Attribute):
            return self.target(node)
        if isinstance(node, ast.Call):
            return self._made(node)
        raise KtfxError(f"{ast.unparse(node)} is nothing that a dumped graph holds")

    def _named(self, name: str) -> Any:
        if name in self.env:
            return self.env[name]
        if name in _BUILTINS:
            return _BUILTINS[name]
        raise KtfxError(f"the dumped graph reads {name}, which it does not compute")

    def _made(self, node: ast.Call) -> Any:
        """``torch.device('cpu')``, ``float('inf')``, ``slice(0, 1, None)``."""
        function = ast.unparse(node.func)
        args = [self.value(a) for a in node.args]
        if function == "torch.device":
            return self.devices.get(str(args[0]), torch.device(args[0]))
        if function in ("float", "slice"):
            return _BUILTINS[function](*args)
        raise KtfxError(f"{ast.unparse(node)} is nothing that a dumped graph holds")


def fake_mode(gm: fx.GraphModule) -> FakeTensorMode:
    """The mode of a loaded graph's values."""
    for node in gm.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, torch._subclasses.FakeTensor):
            return val.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def refresh_all(gm: fx.GraphModule) -> None:
    """Every call's value again, after inputs or literals changed. KtfxError where one no longer runs."""
    mode = fake_mode(gm)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            infer_value(node, mode)

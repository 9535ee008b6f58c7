"""A graph as plain data: one line a node, with all that dumps, diffs and the viewer show of it."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import fx

from ktfx.graph import TRANSFER, GraphInput, info, op_name, output_node, tensor_bytes

DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
T = TypeVar("T")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*([^\n]*)')


@dataclass(frozen=True)
class NodeLine:
    """One node.

    text: its statement as Python. form: its value, ``f32[1, 7, 64]``. source: ``file:line`` in the model's code, and
    code: the text there. inputs: names of the nodes it reads. nbytes: of its value (sizes by their hints).
    """

    name: str
    op: str
    text: str
    form: str
    module: str = ""
    cls: str = ""
    layer: int | None = None
    device: str | None = None
    rule: str | None = None
    source: str = ""
    code: str = ""
    inputs: tuple[str, ...] = ()
    nbytes: int = 0


@dataclass(frozen=True)
class InputLine:
    """One placeholder. kind, source: as in ``GraphInput``. dtype: torch's name, ``int`` for a size; shape by hints."""

    name: str
    kind: str
    source: str
    dtype: str
    shape: tuple[int, ...]
    form: str
    mutated: bool = False
    home: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """A whole graph. returns: the text of its output.

    constants: attribute name → a tensor the graph holds itself.
    subgraphs: attribute name → the body of a higher-order op.
    """

    inputs: tuple[InputLine, ...]
    nodes: tuple[NodeLine, ...]
    returns: str
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    subgraphs: Mapping[str, Snapshot] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": [flat(i) for i in self.inputs],
            "nodes": [flat(n) for n in self.nodes],
            "returns": self.returns,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Snapshot:
        return Snapshot(
            tuple(InputLine(**{**i, "shape": tuple(i["shape"])}) for i in data["inputs"]),
            tuple(node_from_json(n) for n in data["nodes"]),
            data["returns"],
        )


def flat(line: NodeLine | InputLine) -> dict[str, Any]:
    """A line as a dictionary, in the order of its fields (``asdict`` copies every value, which takes seconds here)."""
    return dict(vars(line))


def node_from_json(data: Mapping[str, Any]) -> NodeLine:
    return NodeLine(**{**data, "inputs": tuple(data["inputs"])})


@dataclass
class Seen:
    """What several snapshots of one trace need not read twice: passes leave most traces, values and infos as they were.

    Keyed by identity, so the graphs must outlive it.
    """

    sources: dict[int, tuple[str, str]] = field(default_factory=dict)
    forms: dict[int, tuple[str, int]] = field(default_factory=dict)
    ops: dict[int, str] = field(default_factory=dict)


def snapshot(gm: fx.GraphModule, inputs: Mapping[str, GraphInput] | None = None, seen: Seen | None = None) -> Snapshot:
    """Read a graph in normal form. inputs: ``Captured.inputs``; without it every placeholder is a plain input."""
    entries = inputs or {}
    seen = seen if seen is not None else Seen()
    lines: list[NodeLine] = []
    ends: list[InputLine] = []
    constants: dict[str, torch.Tensor] = {}
    subgraphs: dict[str, Snapshot] = {}
    for position, node in enumerate(gm.graph.nodes):
        if node.op == "placeholder":
            ends.append(_input(node, entries.get(node.name) or GraphInput("input", str(node.target), position)))
        elif node.op in ("call_function", "get_attr"):
            if node.op == "get_attr":
                value = _attribute(gm, str(node.target))
                if isinstance(value, torch.Tensor):
                    constants[str(node.target)] = value.detach()
                elif isinstance(value, fx.GraphModule):
                    subgraphs[str(node.target)] = snapshot(value)
            lines.append(_line(node, seen))
    return Snapshot(tuple(ends), tuple(lines), literal(output_node(gm.graph).args[0]), constants, subgraphs)


def attributes(gm: fx.GraphModule) -> dict[str, Any]:
    """What the graph holds itself, by name: tensors, and the bodies of higher-order ops."""
    return {str(n.target): _attribute(gm, str(n.target)) for n in gm.graph.find_nodes(op="get_attr")}


def _attribute(gm: fx.GraphModule, target: str) -> Any:
    value: Any = gm
    for name in target.split("."):
        value = getattr(value, name)
    return value


def _input(node: fx.Node, entry: GraphInput) -> InputLine:
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor):
        dtype, shape = str(val.dtype).removeprefix("torch."), tuple(_hint(s) for s in val.shape)
    else:
        dtype, shape = "int", (_hint(val),) if val is not None else ()
    return InputLine(node.name, entry.kind, entry.name, dtype, shape, form_of(val), entry.mutated, entry.home)


def _line(node: fx.Node, seen: Seen) -> NodeLine:
    about, val = info(node), node.meta.get("val")
    trace = node.meta.get("stack_trace")
    source, code = _once(seen.sources, trace, lambda: source_of(node))
    form, nbytes = _once(seen.forms, val, lambda: (form_of(val), value_bytes(val)))
    return NodeLine(
        name=node.name,
        op=_once(seen.ops, node.target, lambda: op_name(node)) if node.op == "call_function" else node.op,
        text=statement(node),
        form=form,
        module=about.module,
        cls=about.cls.rpartition(".")[2],
        layer=about.layer,
        device=about.device,
        rule=about.rule,
        source=source,
        code=code,
        inputs=tuple([a.name for a in node.all_input_nodes]),
        nbytes=nbytes,
    )


def _once(known: dict[int, T], key: Any, read: Callable[[], T]) -> T:
    found = known.get(id(key))
    if found is None:
        found = known[id(key)] = read()
    return found


def value_bytes(val: Any) -> int:
    if isinstance(val, (tuple, list)):
        return sum(value_bytes(v) for v in val)
    return tensor_bytes(val)


def source_of(node: fx.Node) -> tuple[str, str]:
    """(``file:line``, code) of the innermost frame in the model's code, from the trace Dynamo left on the node."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return "", ""
    file, line, _, code = frames[-1]
    return f"{short_path(file)}:{line}", code.strip()


def short_path(file: str) -> str:
    """``…/site-packages/transformers/x.py`` → ``transformers/x.py``; others relative to here if inside."""
    _, found, rest = file.rpartition("site-packages" + os.sep)
    if found:
        return rest.replace(os.sep, "/")
    relative = os.path.relpath(file)
    return file if relative.startswith("..") else relative


def form_of(val: Any) -> str:
    """``f32[1, 7, 64]``; sizes as ``int s27``; a tuple's parts in brackets."""
    if isinstance(val, torch.Tensor):
        dtype = DTYPES.get(val.dtype, str(val.dtype).removeprefix("torch."))
        return f"{dtype}[{', '.join(str(s) for s in val.shape)}]"
    if isinstance(val, (tuple, list)):
        return f"({', '.join(form_of(v) for v in val)})"
    if isinstance(val, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"{type(val).__name__.removeprefix('Sym').lower()} {val}"
    return "" if val is None else type(val).__name__


def _hint(size: Any) -> int:
    if isinstance(size, torch.SymInt):
        hint = size.node.hint
        return int(hint) if hint is not None else 1
    return int(size)


def statement(node: fx.Node) -> str:
    """``linear = aten.linear.default(x, w)``, without shapes or comments."""
    if node.op == "get_attr":
        return f"{node.name} = ATTRIBUTES[{str(node.target)!r}]"
    if node.target is operator.getitem:
        return f"{node.name} = {literal(node.args[0])}[{literal(node.args[1])}]"
    parts = [literal(a) for a in node.args] + [f"{k}={literal(v)}" for k, v in node.kwargs.items()]
    return f"{node.name} = {target_text(node.target)}({', '.join(parts)})"


def target_text(target: Any) -> str:
    """The name under which a dumped program calls a target."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"torch.ops.higher_order.{target.name()}"
    module, name = getattr(target, "__module__", None), getattr(target, "__name__", str(target))
    if module in ("_operator", "operator"):
        return f"operator.{name}"
    if module in (None, "builtins"):
        return name
    return f"{module}.{name}"


def literal(value: Any) -> str:
    """A node's argument as Python text."""
    if isinstance(value, fx.Node):
        return value.name
    if value is None or type(value) in (int, bool, str):
        return repr(value)
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return str(value)
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f"float({str(value)!r})"
    if isinstance(value, slice):
        return f"slice({literal(value.start)}, {literal(value.stop)}, {literal(value.step)})"
    if isinstance(value, torch.Size) or type(value) is tuple:
        return "(" + "".join(f"{literal(v)}, " for v in value).strip() + ")" if value else "()"
    if isinstance(value, (list, tuple)):  # fx keeps argument lists as immutable_list
        return "[" + ", ".join(literal(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {literal(v)}" for k, v in value.items()) + "}"
    return repr(value)


def names_in_order(shot: Snapshot) -> list[str]:
    return [n.name for n in shot.nodes]


def by_name(nodes: Sequence[NodeLine]) -> dict[str, NodeLine]:
    return {n.name: n for n in nodes}


def boundary_nodes(shot: Snapshot) -> Iterator[tuple[str, NodeLine]]:
    """(module path, node) for each node whose value leaves its module (a reader lies outside it)."""
    readers: dict[str, list[NodeLine]] = {}
    for node in shot.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    for node in shot.nodes:
        module = node.module
        while module:
            inside = module + "."
            users = readers.get(node.name, [])
            if not users or any(u.module != module and not u.module.startswith(inside) for u in users):
                yield module, node
                module = module.rpartition(".")[0]
            else:
                break


def is_transfer_line(node: NodeLine) -> bool:
    return node.op == TRANSFER

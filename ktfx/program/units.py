"""A compile unit as a graph of its own, inputs in canonical order: equal layers give equal text and one compile."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ktfx.errors import PassError
from ktfx.graph import fake_mode_of, is_size_node, replace_devices, target_name
from ktfx.ops.cache_write import IN_PLACE, WRITTEN, InPlace

copy_ = torch.ops.aten.copy_.default


@dataclass
class UnitGraph:
    """One unit, cut out.

    gm: the graph; its placeholders stand for ``inputs`` and its outputs for ``outputs`` (nodes of the whole graph).
    writes: whole-graph placeholders that the unit writes to in place.
    key: equal for units that compute the same on the same real device with inputs of equal form.
    """

    gm: fx.GraphModule
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    writes: list[fx.Node]
    key: str
    fakes: list[Any] = field(default_factory=list)


def extract_unit(
    nodes: list[fx.Node],
    outputs: list[fx.Node],
    folded: dict[fx.Node, fx.Node],
    real: torch.device,
    symbols: dict[str, fx.Node],
) -> UnitGraph:
    """Cut ``nodes`` out of the graph.

    outputs: nodes whose values are read outside. folded: value node → the input placeholder to which the unit writes
    it back, so that the compiler can make the update in place. real: the device the unit runs on.
    symbols: name of each base symbol → the placeholder of the whole graph that holds it.
    """
    inside = set(nodes)
    inputs: list[fx.Node] = []
    sizes: list[fx.Node] = []

    def need(argument: fx.Node) -> None:
        if argument in inside:
            return
        if argument.op != "placeholder" and is_size_node(argument):
            for inner in argument.all_input_nodes:
                if not _is_tensor_size(argument):
                    need(inner)
            if argument not in sizes:
                sizes.append(argument)
        elif argument not in inputs:
            inputs.append(argument)

    for node in nodes:
        for argument in node.all_input_nodes:
            need(argument)
        if node in folded:
            need(folded[node])
    base = _symbols_of([*inputs, *nodes, *sizes], symbols)
    inputs = [*base, *(i for i in inputs if i not in base)]

    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    fakes: list[Any] = []
    mode = fake_mode_of(nodes[0].graph)
    for position, node in enumerate(inputs):
        inner = graph.placeholder(f"i{position}")
        inner.meta["val"] = on_device(node.meta["val"], real, mode)
        fakes.append(inner.meta["val"])
        env[node] = inner
    for node in sizes:
        env[node] = _copy_size(graph, node, env, symbols)
    for node in nodes:
        if node in env:
            continue
        twin = _in_place(node, nodes, folded, outputs)
        if twin is not None:
            env.update(_call_in_place(graph, node, twin, env))
            continue
        inner = graph.node_copy(node, lambda n: env[n])
        inner._rename(f"n{len(env)}")
        inner.meta = {k: v for k, v in node.meta.items() if k in ("val", "stack_trace", "nn_module_stack")}
        replace_devices(inner, real)
        env[node] = inner
    for value, target in folded.items():
        if env[value] is env[target]:
            continue  # written in place
        graph.call_function(copy_, (env[target], env[value])).meta["val"] = target.meta["val"]
    graph.output(tuple(env[n] for n in outputs))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    return UnitGraph(gm, inputs, outputs, list(folded.values()), _key(graph, fakes, real), fakes)


def _in_place(
    node: fx.Node, nodes: list[fx.Node], folded: dict[fx.Node, fx.Node], outputs: list[fx.Node]
) -> InPlace | None:
    """The twin that may take the op's place: all it writes is written back to where it was read, and read no more."""
    twin = IN_PLACE.get(node.target)
    if twin is None:
        return None
    results = {g: g.args[1] for g in node.users}
    later = set(nodes[nodes.index(node) + 1 :])
    for position in range(twin.written(node.args)):
        target = node.args[position]
        back = [g for g, i in results.items() if i == position]
        if not back or any(g in outputs for g in back) or all(folded.get(g) is not target for g in back):
            return None
        if not isinstance(target, fx.Node) or later & set(target.users):
            return None
    return twin


def _call_in_place(graph: fx.Graph, node: fx.Node, twin: InPlace, env: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    """Call the twin: what stands for the op and for each of its results. What is not written stays as it came."""
    made = graph.call_function(twin.op, fx.node.map_arg(node.args, lambda n: env[n]))  # type: ignore[arg-type]
    values = node.meta["val"]
    made.meta["val"] = values[WRITTEN] if len(values) > WRITTEN else None
    found: dict[fx.Node, Any] = {node: made}
    for result in node.users:
        position = result.args[1]
        assert isinstance(position, int)
        found[result] = env[node.args[position]] if position < WRITTEN else made  # type: ignore[index]
    return found


def on_device(val: Any, device: torch.device, mode: Any) -> Any:
    """A fake of the same form on a device, its sizes written in the symbols that torch settled on.

    When two symbols turn out equal torch replaces one by the other, but a size keeps its old name inside; Inductor
    binds the old name and uses the new one (torch 2.11, 2.13), so sizes are made afresh.
    """
    if isinstance(val, torch.SymInt):
        return settled(val)
    if not isinstance(val, torch.Tensor):
        return val
    sizes = (*val.shape, *val.stride())
    if val.device == device and all(isinstance(s, int) for s in sizes):
        return val
    with mode:
        return torch.empty_strided(
            [settled(s) for s in val.shape], [settled(s) for s in val.stride()], dtype=val.dtype, device=device
        )


def settled(size: Any) -> Any:
    if not isinstance(size, torch.SymInt):
        return size
    node = size.node
    if node.expr.is_number:
        return int(node.expr)
    return node.shape_env.create_symintnode(node.expr, hint=node.hint)


def _is_tensor_size(node: fx.Node) -> bool:
    """``sym_size`` and its kin: an integer read off a tensor."""
    return any(isinstance(a.meta.get("val"), torch.Tensor) for a in node.all_input_nodes)


def _copy_size(graph: fx.Graph, node: fx.Node, env: dict[fx.Node, Any], symbols: dict[str, fx.Node]) -> Any:
    """A size computed again inside the unit, from the base symbols: no derived size crosses units."""
    val = node.meta["val"]
    if isinstance(val, (int, float, bool)):
        return val
    if _is_tensor_size(node):
        expression = str(val.node.expr)
        if expression in symbols:
            return env[symbols[expression]]
        return _from_expression(graph, val, env, symbols)
    inner = graph.node_copy(node, lambda n: env[n])
    inner.meta = {"val": val}
    return inner


def _from_expression(graph: fx.Graph, val: torch.SymInt, env: dict[fx.Node, Any], symbols: dict[str, fx.Node]) -> Any:
    """Nodes that compute a size's expression from the base symbols."""
    import sympy
    from torch.utils._sympy.functions import FloorDiv, Mod

    mode_env = {name: env[node] for name, node in symbols.items() if node in env}

    def build(expr: Any) -> Any:
        import operator
        from functools import reduce

        def call(function: Any, *args: Any) -> Any:
            inner = graph.call_function(function, args)
            inner.meta["val"] = function(*[a.meta["val"] if isinstance(a, fx.Node) else a for a in args])
            return inner

        if isinstance(expr, sympy.Integer):
            return int(expr)
        if isinstance(expr, sympy.Symbol) and str(expr) in mode_env:
            return mode_env[str(expr)]
        if isinstance(expr, (sympy.Add, sympy.Mul)):
            function = operator.add if isinstance(expr, sympy.Add) else operator.mul
            return reduce(lambda a, b: call(function, a, b), [build(a) for a in expr.args])
        if isinstance(expr, FloorDiv):
            return call(operator.floordiv, build(expr.args[0]), build(expr.args[1]))
        if isinstance(expr, (Mod, sympy.Mod)):
            return call(operator.mod, build(expr.args[0]), build(expr.args[1]))
        raise PassError(
            f"a number in the graph, {expr}, depends on data and cannot be computed from the sizes of its inputs",
            mend="if it is a float attribute of the model (zuf…): torch._dynamo.config.specialize_float = True, which "
            "ktfx.compile sets by itself; if it is read off a tensor (u…): the model's code must not call .item()",
        )

    return build(val.node.expr)


def _symbols_of(nodes: Iterable[fx.Node], symbols: dict[str, fx.Node]) -> list[fx.Node]:
    """The placeholders of the base symbols that occur in the nodes' values, in the graph's order."""
    names: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, torch.SymInt):
            names.update(str(s) for s in value.node.expr.free_symbols)
        elif isinstance(value, torch.Tensor):
            for size in (*value.shape, *value.stride()):
                collect(size)
        elif isinstance(value, (list, tuple)):
            for item in value:
                collect(item)

    for node in nodes:
        collect(node.meta.get("val"))
    return [node for name, node in symbols.items() if name in names]


def base_symbols(placeholders: Iterable[fx.Node]) -> dict[str, fx.Node]:
    """Name of each symbol that a placeholder holds plainly (``s27``) → that placeholder."""
    found: dict[str, fx.Node] = {}
    for node in placeholders:
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt) and val.node.expr.is_symbol:
            found.setdefault(str(val.node.expr), node)
    return found


def _key(graph: fx.Graph, fakes: list[Any], real: torch.device) -> str:
    """A digest of the unit's text. Symbols are named by first occurrence: layers differ in the names of theirs."""
    number = {node: i for i, node in enumerate(graph.nodes)}
    names = _SymbolNames()
    lines = [str(real), *(_form(fake, names) for fake in fakes)]
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        refs: Callable[[fx.Node], Any] = lambda n: _Reference(number[n])  # noqa: E731
        args: Any = fx.node.map_arg((node.args, node.kwargs), refs)
        lines.append(f"{number[node]} {target_name(node.target)} {args!r}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class _Reference:
    number: int

    def __repr__(self) -> str:
        return f"%{self.number}"


class _SymbolNames:
    """Canonical text of sizes: the n-th symbol met is ``sn``, with the range torch knows of it."""

    def __init__(self) -> None:
        self.names: dict[Any, str] = {}

    def text(self, size: Any) -> str:
        if not isinstance(size, torch.SymInt):
            return str(size)
        expr = size.node.expr
        ranges = []
        for symbol in sorted(expr.free_symbols, key=str):
            if symbol not in self.names:
                self.names[symbol] = f"s{len(self.names)}"
                ranges.append(f"{self.names[symbol]} in {size.node.shape_env.var_to_range.get(symbol)}")
        text = str(expr.xreplace({s: type(s)(self.names[s]) for s in expr.free_symbols}))
        return " ".join([text, *ranges])


def _form(fake: Any, names: _SymbolNames) -> str:
    if isinstance(fake, torch.Tensor):
        shape, stride = [names.text(s) for s in fake.shape], [names.text(s) for s in fake.stride()]
        return f"{fake.dtype} {shape} {stride} {fake.device}"
    return f"{type(fake).__name__} {names.text(fake)}"

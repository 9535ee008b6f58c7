"""Where a subgraph pattern matches a graph in normal form, and where it nearly does and why it does not.

A pattern's names capture any value (a node, or a constant such as an eps); literals must be equal; operators are
compared through ``ktfx.canonical``, so the spelling does not matter. All nodes of a match but its outputs must be read
inside the match only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ktfx.canonical import (
    CAST,
    PART,
    View,
    canonical_expression,
    op_family,
    skipped,
    strip,
    tensor_of,
    views,
)
from ktfx.errors import Origin, RuleError
from ktfx.graph import op_name
from ktfx.patterns import GETITEM, OUTPUTS, Call, Capture, Expression, Literal, Sequence, operators, parse_pattern
from ktfx.text import near

# Commutative operators are tried both ways at every level; past this many steps a candidate is given up, with a reason.
MAX_STEPS = 20_000
# Views: no arithmetic and no memory, so a match may leave them for others to read.
_FREE = frozenset(
    {
        GETITEM,
        "aten.split",
        "aten.chunk",
        "aten.split_with_sizes",
        "aten.slice",
        "aten.select",
        "aten.view",
        "aten.unsqueeze",
        "aten.squeeze",
        "aten.expand",
        "aten.transpose",
        "aten.permute",
        "aten.t",
    }
)


@dataclass(frozen=True)
class Match:
    """One place where the pattern holds.

    root: the node of the pattern's outermost operator. outputs: one node for each output (``(root,)`` for one).
    captures: name → node or constant. nodes: all nodes of the match, outputs included, in the graph's order.
    """

    root: fx.Node
    outputs: tuple[fx.Node, ...]
    captures: Mapping[str, Any]
    nodes: tuple[fx.Node, ...]

    @property
    def inner(self) -> tuple[fx.Node, ...]:
        """The nodes that the match replaces and nothing outside may read."""
        return tuple(n for n in self.nodes if n not in self.outputs)


@dataclass(frozen=True)
class Failure:
    """The first thing that kept the pattern from matching at ``root``.

    kind: ``op``, ``arguments``, ``literal``, ``capture``, ``users`` or ``size``. matched: how many of the pattern's
    operators had matched (what "nearest" compares). where: the operator and argument of the pattern, outermost first.
    pairs: what had matched, as (pattern, node).
    """

    root: fx.Node
    kind: str
    text: str
    matched: int
    where: tuple[str, ...] = ()
    node: fx.Node | None = None
    pairs: tuple[tuple[str, fx.Node], ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class _Binding:
    """What is known half-way: captured values, nodes used, pattern operators matched."""

    captures: tuple[tuple[str, Any], ...] = ()
    nodes: tuple[fx.Node, ...] = ()
    pairs: tuple[tuple[Call, fx.Node], ...] = ()

    def get(self, name: str) -> tuple[Any] | None:
        return next(((value,) for key, value in self.captures if key == name), None)


class _TooManyWays(Exception):
    pass


@dataclass
class Matcher:
    """A compiled pattern. ``origin`` and ``rule`` are what errors name.

    readings: the views of nodes read so far; matchers of one graph may share it.

    Raises RuleError for an operator that does not exist or cannot take the arguments written.
    """

    pattern: Expression
    origin: Origin | None = None
    rule: str | None = None
    readings: dict[fx.Node, list[View]] = field(default_factory=dict)
    canonical: Expression = field(init=False)

    def __post_init__(self) -> None:
        check_operators(self.pattern, self.origin, self.rule)
        self.canonical = canonical_expression(self.pattern)
        outputs: tuple[Expression, ...] = (self.canonical,)
        if isinstance(self.canonical, Call) and self.canonical.op == OUTPUTS:
            outputs = self.canonical.args
        self.outputs = outputs
        # The largest output first: smaller ones are mostly parts of it.
        self._order = sorted(range(len(outputs)), key=lambda i: -_count_calls(outputs[i]))
        self._steps = 0
        self._best: Failure | None = None
        self._root: fx.Node | None = None

    @classmethod
    def of(cls, pattern: str | Expression) -> Matcher:
        """A matcher for a pattern's text."""
        return cls(parse_pattern(pattern) if isinstance(pattern, str) else pattern)

    @property
    def anchor(self) -> Expression:
        """The output that a match is searched by."""
        return self.outputs[self._order[0]]

    @property
    def size(self) -> int:
        """The number of operators in the pattern."""
        return sum(_count_calls(o) for o in self.outputs)

    def forget(self, changed: Iterable[fx.Node]) -> None:
        """These nodes are new or gone: read what depends on them anew."""
        for node in changed:
            for user in (node, *node.users, *(second for first in node.users for second in first.users)):
                self.readings.pop(user, None)

    def candidates(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """The nodes at which the outermost operator can be read."""
        return [n for n in nodes if n.op == "call_function" and self._readable(self.anchor, n)]

    def _readable(self, pattern: Expression, node: fx.Node) -> bool:
        """Whether the node can be the pattern's outermost operator (a cast to the dtype that it has may be missing)."""
        if any(_same_op(pattern, v) for v in self.views(node)):
            return True
        return (
            isinstance(pattern, Call)
            and pattern.op == CAST
            and self._is_cast_already(pattern, node)
            and self._readable(pattern.args[0], node)
        )

    def views(self, node: fx.Node) -> list[View]:
        found = self.readings.get(node)
        if found is None:
            found = self.readings[node] = views(node)
        return found

    def match(self, root: fx.Node) -> Match | Failure:
        """The match whose outermost operator is ``root``, or the first thing that failed."""
        self._steps, self._best, self._root = 0, None, root
        try:
            for binding in self._outputs(root):
                found = self._finished(root, binding)
                if isinstance(found, Match):
                    return found
                self._note(found)
        except _TooManyWays:
            self._note(self._failure("size", f"more than {MAX_STEPS} ways to read it were tried", _Binding(), ()))
        assert self._best is not None
        return self._best

    def nearness(self, failure: Failure) -> tuple[int, bool]:
        """What compares failures: operators matched, then whether the outermost one is spelt as the graph has it."""
        own = self.views(failure.root)[:1]
        return failure.matched, bool(own) and _same_op(self.anchor, own[0])

    def find(self, graph: fx.Graph) -> list[Match]:
        """All matches in the graph's order that share no node (the first one takes it)."""
        taken: set[fx.Node] = set()
        found = []
        for node in self.candidates(graph.nodes):
            result = self.match(node)
            if isinstance(result, Match) and not taken.intersection(result.nodes):
                taken.update(result.nodes)
                found.append(result)
        return found

    # ---- one expression against one value

    def _outputs(self, root: fx.Node) -> Iterator[_Binding]:
        first, *others = (self.outputs[i] for i in self._order)
        for binding in self._match(first, root, _Binding(), ()):
            yield from self._others(others, binding)

    def _others(self, others: list[Expression], binding: _Binding) -> Iterator[_Binding]:
        """The further outputs: each starts at a node that the match so far holds or feeds."""
        if not others:
            yield binding
            return
        first, *rest = others
        captured = [v for _, v in binding.captures if isinstance(v, fx.Node)]
        near_nodes = dict.fromkeys((*binding.nodes, *captured))
        ring = list(near_nodes)
        for _ in range(_depth(first)):
            ring = [user for node in ring for user in node.users if user not in near_nodes]
            near_nodes.update(dict.fromkeys(ring))
        tried = False
        for node in near_nodes:
            if self._readable(first, node):
                tried = True
                for found in self._match(first, node, binding, ("output",)):
                    yield from self._others(rest, found)
        if not tried:
            self._fail("op", f"nothing beside it computes the output {text_of(first)}", binding, ("output",), None)

    def _match(self, pattern: Expression, value: Any, binding: _Binding, where: tuple[str, ...]) -> Iterator[_Binding]:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise _TooManyWays
        if isinstance(pattern, Capture):
            yield from self._capture(pattern, value, binding, where)
        elif isinstance(pattern, Literal):
            if literal_equal(pattern.value, value):
                yield binding
            else:
                self._fail("literal", f"expects {pattern.value!r}, the graph has {shown(value)}", binding, where, value)
        elif isinstance(pattern, Sequence):
            yield from self._sequence(pattern, value, binding, where)
        else:
            yield from self._call(pattern, value, binding, where)

    def _capture(self, pattern: Capture, value: Any, binding: _Binding, where: tuple[str, ...]) -> Iterator[_Binding]:
        if pattern.name == "_":
            yield binding
            return
        bound = binding.get(pattern.name)
        if bound is None:
            yield replace(binding, captures=(*binding.captures, (pattern.name, value)))
        elif _same_value(bound[0], value):
            yield binding
        else:
            text = f"{pattern.name} is {shown(value)} here and {shown(bound[0])} elsewhere"
            self._fail("capture", text, binding, where, value)

    def _sequence(self, pattern: Sequence, value: Any, binding: _Binding, where: tuple[str, ...]) -> Iterator[_Binding]:
        if not isinstance(value, list | tuple) or len(value) != len(pattern.items):
            text = f"expects a list of {len(pattern.items)}, the graph has {shown(value)}"
            self._fail("arguments", text, binding, where, value)
            return
        yield from self._all(list(zip(pattern.items, value, strict=True)), binding, where)

    def _all(
        self, pairs: list[tuple[Expression, Any]], binding: _Binding, where: tuple[str, ...]
    ) -> Iterator[_Binding]:
        if not pairs:
            yield binding
            return
        (pattern, value), *rest = pairs
        for found in self._match(pattern, value, binding, where):
            yield from self._all(rest, found, where)

    def _call(self, pattern: Call, value: Any, binding: _Binding, where: tuple[str, ...]) -> Iterator[_Binding]:
        inside = (*where, pattern.op)
        if not isinstance(value, fx.Node):
            self._fail("op", f"expects {pattern.op}, the graph has {shown(value)}", binding, where, value)
            return
        readings = [v for v in self.views(value) if _same_op(pattern, v)]
        for view in readings:
            held = replace(
                binding,
                nodes=tuple(dict.fromkeys((*binding.nodes, value, *view.consumed))),
                pairs=(*binding.pairs, (pattern, value)),
            )
            yield from self._view(pattern, view, value, held, inside)
        source = skipped(value)
        if source is not None:
            held = replace(binding, nodes=tuple(dict.fromkeys((*binding.nodes, value))))
            yield from self._call(pattern, source, held, where)
        elif not readings and pattern.op == CAST and self._is_cast_already(pattern, value):
            # A cast that the pattern asks for and the graph has no need of.
            dtype = _argument(pattern, 1, "dtype")
            assert dtype is not None
            held = replace(binding, pairs=(*binding.pairs, (pattern, value)))
            for found in self._match(dtype, value.meta["val"].dtype, held, inside):
                yield from self._match(pattern.args[0], value, found, inside)
        elif not readings:
            self._fail("op", f"expects {pattern.op}, the graph has {shown(value)}", binding, where, value)

    @staticmethod
    def _is_cast_already(pattern: Call, value: fx.Node) -> bool:
        mine, dtype = tensor_of(value), _argument(pattern, 1, "dtype")
        if mine is None or dtype is None or not pattern.args:
            return False
        return isinstance(dtype, Capture) or (isinstance(dtype, Literal) and literal_equal(dtype.value, mine.dtype))

    def _view(
        self, pattern: Call, view: View, node: fx.Node, binding: _Binding, where: tuple[str, ...]
    ) -> Iterator[_Binding]:
        places = [a for a in view.args if not a.keyword_only]
        names = [a.name for a in view.args]
        if len(pattern.args) > len(places):
            text = f"is written with {len(pattern.args)} arguments, {op_name(node)} ({node.name}) has {len(places)}"
            self._fail("arguments", text, binding, where, node)
            return
        for name, _ in pattern.kwargs:
            if name not in names or name in names[: len(pattern.args)]:
                self._fail("arguments", f"{op_name(node)} ({node.name}) has no {name!r}", binding, where, node)
                return
        given = dict(pattern.kwargs)
        for order in view.orders:
            pairs: list[tuple[Expression, Any, str]] = []
            for position, source in enumerate(order):
                argument = view.args[source]
                if position < len(pattern.args):
                    pairs.append((pattern.args[position], argument.value, argument.name))
                elif argument.name in given:
                    pairs.append((given[argument.name], argument.value, argument.name))
                elif not argument.omittable:
                    text = f"the graph has {argument.name}={shown(argument.value)}, which the pattern does not write"
                    self._fail("arguments", text, binding, where, node)
                    break
            else:
                yield from self._arguments(pairs, view, node, binding, where)

    def _arguments(
        self,
        pairs: list[tuple[Expression, Any, str]],
        view: View,
        node: fx.Node,
        binding: _Binding,
        where: tuple[str, ...],
    ) -> Iterator[_Binding]:
        if not pairs:
            yield binding
            return
        (pattern, value, name), *rest = pairs
        here = (*where, name)
        if isinstance(pattern, Literal) and name in ("dim", "dims", "dim0", "dim1"):
            rank = _dim_rank(view, node)
            value = _wrapped(value, rank)
            pattern = Literal(_wrapped(pattern.value, rank))
        if isinstance(pattern, Sequence) and name == "size":
            # A written -1 is any size.
            pattern = Sequence(tuple(Capture("_") if i == Literal(-1) else i for i in pattern.items))
        if isinstance(pattern, Literal) and name == "size" and _size_equal(pattern.value, value):
            found: Iterator[_Binding] = iter((binding,))
        else:
            found = self._match(pattern, value, binding, here)
        for further in found:
            yield from self._arguments(rest, view, node, further, where)

    # ---- a whole match

    def _finished(self, root: fx.Node, binding: _Binding) -> Match | Failure:
        outputs = tuple(self._output_node(o, binding) for o in self.outputs)
        inside = set(binding.nodes)
        captures = dict(binding.captures)
        for name, value in captures.items():
            if isinstance(value, fx.Node) and value in inside and value not in outputs:
                return self._failure("users", f"{value.name} is captured as {name} and is also inside it", binding, ())
        for node in sorted(inside, reverse=True):
            user = next((u for u in node.users if u not in inside and not _is_dead(u)), None)
            if node in outputs or user is None:
                continue
            if op_family(node.target) in _FREE or skipped(node) is not None:
                inside.discard(node)  # it costs nothing and may stay for its other readers
                continue
            reader = "the graph's output" if user.op == "output" else f"{op_name(user)} ({user.name})"
            text = f"{op_name(node)} ({node.name}) is also read by {reader}"
            return self._failure("users", text, binding, (), node)
        return Match(root, outputs, captures, tuple(sorted(inside)))

    def _output_node(self, output: Expression, binding: _Binding) -> fx.Node:
        """The outermost node of an output, skipped nodes in front of it not counted."""
        return next(node for call, node in binding.pairs if call is output)

    def _fail(self, kind: str, text: str, binding: _Binding, where: tuple[str, ...], value: Any) -> None:
        prefix = _place(where)
        node = value if isinstance(value, fx.Node) else None
        self._note(self._failure(kind, f"{prefix}: {text}" if prefix else text, binding, where, node))

    def _failure(
        self, kind: str, text: str, binding: _Binding, where: tuple[str, ...], node: fx.Node | None = None
    ) -> Failure:
        assert self._root is not None
        pairs = tuple((call.op, n) for call, n in binding.pairs)
        return Failure(self._root, kind, text, len(binding.pairs), where, node, pairs)

    def _note(self, failure: Failure) -> None:
        if self._best is None or failure.matched > self._best.matched or failure.kind in ("users", "size"):
            self._best = failure


# ---- comparing values


def literal_equal(written: Any, value: Any) -> bool:
    """Whether a pattern's constant equals a graph's argument: 2 is 2.0, -1 is [-1], 'float32' is torch.float32."""
    value = strip(value)
    if isinstance(value, torch.dtype | torch.device | torch.memory_format | torch.layout):
        return isinstance(written, str) and str(value).removeprefix("torch.") == written.removeprefix("torch.")
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        items = written if isinstance(written, tuple) else (written,)
        return len(items) == len(value) and all(literal_equal(a, b) for a, b in zip(items, value, strict=True))
    if isinstance(written, bool) or isinstance(value, bool):
        return isinstance(written, bool) and isinstance(value, bool) and written == value
    if isinstance(written, int | float) and isinstance(value, int | float):
        return written == value
    return type(written) is type(value) and bool(written == value)


def _same_value(a: Any, b: Any) -> bool:
    a, b = strip(a), strip(b)
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same_value(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def _size_equal(written: Any, value: Any) -> bool:
    """Sizes as written and as they are; a written -1 is any size."""
    if not isinstance(written, tuple) or not isinstance(value, list | tuple) or len(written) != len(value):
        return False
    return all(w == -1 or literal_equal(w, v) for w, v in zip(written, value, strict=True))


def _wrapped(value: Any, rank: int | None) -> Any:
    """Dimensions counted from the front."""
    if rank is None:
        return value
    if isinstance(value, list | tuple):
        return type(value)(_wrapped(v, rank) for v in value)
    return value % rank if type(value) is int and -rank <= value < 0 else value


def _dim_rank(view: View, node: fx.Node) -> int | None:
    """The rank that a ``dim`` counts in: the result's where the operator makes a dimension."""
    if view.op in ("aten.unsqueeze", "aten.stack"):
        mine = tensor_of(node)
        return mine.dim() if mine is not None else None
    return view.rank if view.rank is not None else _list_rank(view)


def _list_rank(view: View) -> int | None:
    first = view.args[0].value if view.args else None
    item = tensor_of(first[0]) if isinstance(first, list | tuple) and first else None
    return item.dim() if item is not None else None


def _same_op(pattern: Expression, view: View) -> bool:
    """Whether a view can be read as the pattern's outermost operator."""
    if not isinstance(pattern, Call):
        return False
    if pattern.op == view.op:
        return True
    family, _, overload = pattern.op.rpartition(".")
    return family == view.op and overload == (view.overload or "default") and family.count(".") == 1


def _argument(call: Call, position: int, name: str) -> Expression | None:
    if position < len(call.args):
        return call.args[position]
    return dict(call.kwargs).get(name)


def _is_dead(node: fx.Node) -> bool:
    return node.op == "call_function" and not node.users and not node.is_impure()


def _count_calls(expression: Expression) -> int:
    if isinstance(expression, Call):
        return 1 + sum(_count_calls(a) for a in expression.args) + sum(_count_calls(v) for _, v in expression.kwargs)
    if isinstance(expression, Sequence):
        return sum(_count_calls(i) for i in expression.items)
    return 0


def _depth(expression: Expression) -> int:
    if isinstance(expression, Call):
        parts = (*expression.args, *(v for _, v in expression.kwargs))
        return 1 + max((_depth(p) for p in parts), default=0)
    return max((_depth(i) for i in expression.items), default=0) if isinstance(expression, Sequence) else 0


# ---- which operators there are


def operator_packet(name: str, origin: Origin | None = None, rule: str | None = None) -> Any:
    """The operator (or overload) that a pattern names. RuleError, with the near name, if there is none."""
    namespace, _, rest = name.partition(".")
    base, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace), base, None)
    if packet is None:
        named = (n.partition("::") for n in _all_operators())
        known = sorted({rest.partition(".")[0] for space, _, rest in named if space == namespace})
        if not known:
            spaces = sorted({n.partition("::")[0] for n in _all_operators()})
            raise RuleError(
                f"there are no operators {namespace}.…{near(namespace, spaces)}",
                origin=origin,
                rule=rule,
                expected="aten, ktfx, prims, or a namespace that a loaded package registers",
                mend=f"write the operator as the graph has it, e.g. aten.{base}",
            )
        raise RuleError(
            f"there is no operator {namespace}.{base}{near(base, known)}",
            origin=origin,
            rule=rule,
            expected=f"an operator of torch.ops.{namespace}",
            mend="`ktfx explain` and the graphs of options={'keep_graphs': True} show how the model spells it",
        )
    if not overload:
        return packet
    if overload not in packet.overloads():
        raise RuleError(
            f"{namespace}.{base} has no overload {overload!r}{near(overload, packet.overloads())}",
            origin=origin,
            rule=rule,
            expected="one of " + ", ".join(packet.overloads()),
            mend=f"write {namespace}.{base} to match any overload",
        )
    return getattr(packet, overload)


def schemas_of(target: Any) -> list[Any]:
    """The overloads of an operator, or the one overload."""
    return [target] if isinstance(target, torch._ops.OpOverload) else [getattr(target, o) for o in target.overloads()]


def check_operators(expression: Expression, origin: Origin | None = None, rule: str | None = None) -> None:
    """RuleError unless every operator exists and has an overload with the arguments written.

    The ops of ktfx must be loaded (``ktfx.ops.load_ops``).
    """
    for name in operators(expression):
        operator_packet(name, origin, rule)
    _check_calls(expression, origin, rule)


def _check_calls(expression: Expression, origin: Origin | None, rule: str | None) -> None:
    if isinstance(expression, Sequence):
        for item in expression.items:
            _check_calls(item, origin, rule)
    if not isinstance(expression, Call):
        return
    if expression.op not in (GETITEM, OUTPUTS):
        overloads = schemas_of(operator_packet(expression.op, origin, rule))
        # A cast is written (x, dtype) in any spelling.
        is_cast = op_family(overloads[0]) == CAST and len(expression.args) + len(expression.kwargs) == 2
        if not is_cast and not any(_binds(expression, o._schema) for o in overloads):
            written = ", ".join(["…"] * len(expression.args) + [f"{k}=…" for k, _ in expression.kwargs])
            raise RuleError(
                f"{expression.op}({written}) fits no overload of the operator",
                origin=origin,
                rule=rule,
                expected=" or ".join(str(o._schema).partition(" ->")[0] for o in overloads[:4]),
                mend="write arguments in the order, or by the names, of one of these",
            )
    for argument in (*expression.args, *(v for _, v in expression.kwargs)):
        _check_calls(argument, origin, rule)


def _binds(call: Call, schema: Any) -> bool:
    places = [a for a in schema.arguments if not a.kwarg_only]
    names = {a.name for a in schema.arguments}
    if len(call.args) > len(places) or any(k not in names for k, _ in call.kwargs):
        return False
    given = {a.name for a in places[: len(call.args)]} | {k for k, _ in call.kwargs}
    return all(a.has_default_value() or a.name in given for a in schema.arguments)


def _all_operators() -> list[str]:
    return list(torch._C._dispatch_get_all_op_names())


# ---- text


def shown(value: Any) -> str:
    """A graph value as messages show it: its operator and name, or the constant."""
    if isinstance(value, fx.Node):
        return f"input {value.name}" if value.op == "placeholder" else f"{op_name(value)} ({value.name})"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(v.name if isinstance(v, fx.Node) else str(v) for v in value) + "]"
    return repr(value)


def text_of(expression: Expression) -> str:
    """A pattern as text again."""
    if isinstance(expression, Capture):
        return expression.name
    if isinstance(expression, Literal):
        return repr(list(expression.value)) if isinstance(expression.value, tuple) else repr(expression.value)
    if isinstance(expression, Sequence):
        return "[" + ", ".join(map(text_of, expression.items)) + "]"
    if expression.op == OUTPUTS:
        return "[" + ", ".join(map(text_of, expression.args)) + "]"
    if expression.op == GETITEM:
        return f"{text_of(expression.args[0])}[{text_of(expression.args[1])}]"
    if expression.op == PART:
        source, index, count, dim = map(text_of, expression.args)
        return f"aten.chunk({source}, {count}, {dim})[{index}]"
    parts = [*map(text_of, expression.args), *(f"{k}={text_of(v)}" for k, v in expression.kwargs)]
    return f"{expression.op}({', '.join(parts)})"


def _place(where: tuple[str, ...]) -> str:
    """``aten.mul › self › aten.silu``: the place in the pattern, without the last operator's own name twice."""
    return " › ".join(where)


def explain_match(graph: fx.Graph, pattern: str | Expression, node: fx.Node | None = None) -> list[str]:
    """Lines that show the pattern beside the graph at ``node`` (or at the nearest candidate), and the first thing that
    failed; for a match, what the names stand for."""
    matcher = Matcher.of(pattern)
    lines = [f"pattern  {text_of(matcher.pattern)}"]
    result = matcher.match(node) if node is not None else nearest(matcher, graph.nodes)
    if result is None:
        root = matcher.anchor
        name = root.op if isinstance(root, Call) else text_of(root)
        ops = {op_family(n.target) for n in graph.nodes if n.op == "call_function"}
        return [*lines, f"✗ no node of the graph is a {name}{near(name, sorted(ops))}"]
    lines.append(f"node     {described(result.root)}")
    if isinstance(result, Match):
        lines.append("✓ it matches")
        lines += [f"    {name} = {shown(value)}" for name, value in result.captures.items()]
        return lines
    lines += [f"✓ {op:<20} {described(n)}" for op, n in result.pairs]
    lines.append(f"✗ {result.text}")
    if result.node is not None and result.node.op == "call_function":
        lines.append(f"    there   {described(result.node)}")
    return lines


def nearest(matcher: Matcher, nodes: Iterable[fx.Node]) -> Match | Failure | None:
    """The first match, else the failure that got furthest, else None (no node has the outermost operator)."""
    failures = []
    for node in matcher.candidates(nodes):
        result = matcher.match(node)
        if isinstance(result, Match):
            return result
        failures.append(result)
    return max(failures, key=matcher.nearness, default=None)


def described(node: fx.Node) -> str:
    """``mul_15 = aten.mul.Tensor(silu, getitem_5): float32[14, 32]``."""
    if node.op != "call_function":
        return node.name
    parts = [_argument_text(a) for a in node.args] + [f"{k}={_argument_text(v)}" for k, v in node.kwargs.items()]
    val = tensor_of(node)
    kind = f": {str(val.dtype).removeprefix('torch.')}{list(val.shape)}" if val is not None else ""
    return f"{node.name} = {op_name(node)}({', '.join(parts)}){kind}"


def _argument_text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    return "[" + ", ".join(map(_argument_text, value)) + "]" if isinstance(value, list | tuple) else str(value)

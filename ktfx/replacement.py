"""The right-hand side of a pattern rule: an expression over captures → new nodes in place of a match."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ktfx.canonical import same_shape, tensor_of
from ktfx.errors import Origin, PassError
from ktfx.graph import info, insert_call, refresh_values
from ktfx.matcher import Match, operator_packet, shown, text_of
from ktfx.patterns import GETITEM, OUTPUTS, Call, Capture, Expression, Literal, walk


@dataclass(frozen=True)
class Refusal:
    """Why a match cannot be replaced: the operator does not take what was captured there."""

    text: str


@dataclass(frozen=True)
class Replacement:
    """``expression`` is what the rule writes; ``origin`` and ``rule`` are what errors name and new nodes carry."""

    expression: Expression
    origin: Origin | None = None
    rule: str | None = None

    @property
    def outputs(self) -> tuple[Expression, ...]:
        is_several = isinstance(self.expression, Call) and self.expression.op == OUTPUTS
        return self.expression.args if is_several and isinstance(self.expression, Call) else (self.expression,)

    def refusal(self, match: Match) -> Refusal | None:
        """Whether the operators take what was captured, said before anything is edited."""
        try:
            for output in self.outputs:
                self._overload_of(output, match.captures)
        except _Refused as refused:
            return Refusal(str(refused))
        return None

    def apply(self, graph: fx.Graph, match: Match) -> list[fx.Node]:
        """Put the replacement in place of the match and remove the nodes that nothing reads any more.

        Returns the new nodes. PassError if a value would change its shape or dtype, or if the operator refuses its
        inputs when run on fakes.
        """
        point = insertion_point(graph, match)
        assert not isinstance(point, Refusal)
        made: list[fx.Node] = []
        built: dict[Expression, fx.Node] = {}
        with graph.inserting_before(point):
            values = [self._build(graph, o, match, built, made) for o in self.outputs]
        for old, new in zip(match.outputs, values, strict=True):
            if not isinstance(new, fx.Node):
                raise self._error(f"the replacement gives {shown(new)}, not a tensor", old)
            self._check_same(old, new)
            old.replace_all_uses_with(new)
            self._restride(old, new)
        for node in reversed(match.nodes):
            if not node.users:
                graph.erase_node(node)
        return made

    def _overload_of(self, expression: Expression, captures: Mapping[str, Any]) -> None:
        """Check nested calls innermost first; values of inner calls are unknown here and taken to fit."""
        if not isinstance(expression, Call):
            return
        parts = (*expression.args, *(v for _, v in expression.kwargs))
        for part in parts:
            self._overload_of(part, captures)
        if expression.op == GETITEM or any(_holds_call(p) for p in parts):
            return
        args = [self._value(a, captures) for a in expression.args]
        kwargs = {k: self._value(v, captures) for k, v in expression.kwargs}
        overload(expression, args, kwargs)

    def _value(self, expression: Expression, captures: Mapping[str, Any]) -> Any:
        if isinstance(expression, Capture):
            return captures[expression.name]
        if isinstance(expression, Literal):
            return list(expression.value) if isinstance(expression.value, tuple) else expression.value
        assert not isinstance(expression, Call)
        return [self._value(item, captures) for item in expression.items]

    def _build(
        self,
        graph: fx.Graph,
        expression: Expression,
        match: Match,
        built: dict[Expression, fx.Node],
        made: list[fx.Node],
    ) -> Any:
        """The node (or constant) of an expression; the same call written twice is made once."""
        if isinstance(expression, Capture | Literal):
            return self._value(expression, match.captures)
        if not isinstance(expression, Call):
            return [self._build(graph, item, match, built, made) for item in expression.items]
        if expression in built:
            return built[expression]
        args = [self._build(graph, a, match, built, made) for a in expression.args]
        kwargs = {k: self._build(graph, v, match, built, made) for k, v in expression.kwargs}
        root = match.root
        try:
            if expression.op == GETITEM:
                target: Any = operator.getitem
            else:
                target, args, kwargs = overload(expression, args, kwargs)
            node = insert_call(graph, target, args, kwargs, like=root, rule=self.rule or info(root).rule)
        except _Refused as refused:
            raise self._error(str(refused), root) from None
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            raise self._error(
                f"{text_of(expression)} refuses its inputs: {type(error).__name__}: {str(error).splitlines()[0]}", root
            ) from error
        built[expression] = node
        made.append(node)
        return node

    def _check_same(self, old: fx.Node, new: fx.Node) -> None:
        before, after = tensor_of(old), tensor_of(new)
        if before is None or after is None:
            raise self._error(f"{shown(old)} or its replacement is no single tensor", old)
        if before.dtype != after.dtype or not same_shape(before.shape, after.shape):
            raise self._error(
                f"{text_of(self.expression)} gives {_kind(after)}, and {shown(old)} was {_kind(before)}", old
            )

    def _restride(self, old: fx.Node, new: fx.Node) -> None:
        before, after = old.meta["val"], new.meta["val"]
        if [str(s) for s in before.stride()] == [str(s) for s in after.stride()]:
            return
        try:
            refresh_values([new])
        except (RuntimeError, ValueError) as error:
            raise self._error(f"what reads it cannot take its strides: {str(error).splitlines()[0]}", old) from error

    def _error(self, what: str, node: fx.Node) -> PassError:
        return PassError(
            what,
            origin=self.origin,
            rule=self.rule,
            module=info(node).module,
            expected="the shape and dtype that the pattern's own value has",
            mend="narrow the rule by where: {dtype: …, shapes: …}, or write an operator that keeps both",
        )


class _Refused(Exception):
    pass


def overload(call: Call, args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, list[Any], dict[str, Any]]:
    """The overload that takes these arguments, and the arguments as it takes them (``'float32'`` as the dtype)."""
    packet = operator_packet(call.op)
    for convert in (lambda v: v, _as_dtype):
        given = [convert(a) for a in args]
        named = {k: convert(v) for k, v in kwargs.items()}
        fakes, fake_names = fx.node.map_arg((tuple(given), named), lambda n: n.meta["val"])
        if isinstance(packet, torch._ops.OpOverload):
            target = packet
        else:
            try:
                name = torch._C._jit_resolve_packet(packet._qualified_op_name, *fakes, **fake_names)
            except (RuntimeError, TypeError):
                continue
            target = getattr(packet, name)
        problem = _unfit(target, given, named)
        if problem is not None:
            raise _Refused(f"{call.op} takes no {problem}")
        return target, given, named
    values = ", ".join([shown(a) for a in args] + [f"{k}={shown(v)}" for k, v in kwargs.items()])
    raise _Refused(f"{call.op} does not take ({values})")


def _unfit(target: Any, args: list[Any], kwargs: dict[str, Any]) -> str | None:
    """aten takes None for any tensor and a 0-d tensor for any number without a word; neither can be meant."""
    schema = target._schema.arguments
    given = [*zip(schema, args, strict=False), *((a, kwargs[a.name]) for a in schema if a.name in kwargs)]
    for argument, value in given:
        kind = str(argument.type)
        if value is None and not kind.startswith("Optional"):
            return f"None as {argument.name}"
        number = kind.removeprefix("Optional[").rstrip("]") in ("float", "int", "number", "bool")
        if number and tensor_of(value) is not None:
            return f"tensor as {argument.name} ({shown(value)}; under dynamic=True numbers of a module become tensors)"
    return None


def _as_dtype(value: Any) -> Any:
    if isinstance(value, str) and isinstance(found := getattr(torch, value.removeprefix("torch."), None), torch.dtype):
        return found
    return value


def insertion_point(graph: fx.Graph, match: Match) -> fx.Node | Refusal:
    """Before which node the replacement goes: after all it reads, before all that read its values."""
    if len(match.outputs) == 1:
        return match.outputs[0]
    inputs = [n for v in match.captures.values() for n in _nodes_in(v)]
    inside = set(match.nodes)
    readers = [u for o in match.outputs for u in o.users if u not in inside]
    if not readers:
        return Refusal("none of its values is read")
    first = min(readers)
    late = next((n for n in inputs if not n < first), None)
    if late is not None:
        return Refusal(f"{shown(first)} reads one of its values before {shown(late)}, which it needs, is there")
    return first


def _nodes_in(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return found


def _holds_call(expression: Expression) -> bool:
    return any(isinstance(e, Call) for e in walk(expression))


def _kind(val: torch.Tensor) -> str:
    return f"{str(val.dtype).removeprefix('torch.')}{[str(s) if not isinstance(s, int) else s for s in val.shape]}"

"""Subgraph patterns as text: ``aten.mul(aten.silu(gate), up)`` → a small tree, by ``ast`` and an allow list.

Nothing is evaluated and nothing is imported; which graph nodes a tree matches is decided elsewhere.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ktfx.errors import Origin, RuleError
from ktfx.text import did_you_mean, nearest

MAX_LENGTH = 4000
MAX_DEPTH = 40
NAMESPACES = ("aten", "ktfx", "prims")

# What subscripts and a list at the top are read as: ``aten.topk(x, k)[1]``, ``[aten.add(x, r), aten.relu(…)]``.
GETITEM = "getitem"
OUTPUTS = "outputs"

LiteralValue = int | float | str | bool | None | tuple["LiteralValue", ...]


@dataclass(frozen=True)
class Call:
    """An operator applied: ``op`` is ``namespace.name`` or ``namespace.name.overload``.

    ``op`` is ``getitem`` for ``call[i]``, and ``outputs`` for a list of expressions at the top.
    """

    op: str
    args: tuple[Expression, ...]
    kwargs: tuple[tuple[str, Expression], ...]


@dataclass(frozen=True)
class Capture:
    """A name: any value; the same name twice is the same value. ``_`` is any value and need not be the same twice."""

    name: str


@dataclass(frozen=True)
class Literal:
    """A constant. Lists are read as tuples."""

    value: LiteralValue


@dataclass(frozen=True)
class Sequence:
    """A list or tuple that holds captures or calls, e.g. ``aten.cat([a, b], -1)``."""

    items: tuple[Expression, ...]


Expression = Call | Capture | Literal | Sequence


def parse_pattern(text: str, origin: Origin | None = None, rule: str | None = None) -> Expression:
    """The tree of one expression. RuleError with line and column for anything that is not an operator call.

    ``origin`` is the place of the expression's first character.
    """
    place = origin or Origin("<pattern>", 1, 1)
    if len(text) > MAX_LENGTH:
        raise RuleError(f"the pattern has {len(text)} characters", origin=place, rule=rule, expected=f"≤ {MAX_LENGTH}")
    # Leading blanks would be an indentation error; one pair of brackets lets a pattern run over several lines.
    try:
        tree = ast.parse("(" + text + "\n)", mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        line = getattr(error, "lineno", None) or 1
        column = (getattr(error, "offset", None) or 1) - (1 if line == 1 else 0)
        raise RuleError(
            f"the pattern is no expression: {getattr(error, 'msg', None) or error}",
            origin=_shift(place, line, column),
            rule=rule,
            expected="operator calls over names, e.g. aten.mul(aten.silu(gate), up)",
            mend="check brackets and commas",
        ) from None
    reader = _Reader(place, rule)
    found: Expression
    # The bracket that is put around the text makes a bare `a, b` a tuple too; only one with its own brackets is meant.
    own_bracket = (tree.body.lineno, tree.body.col_offset) != (1, 0)
    if isinstance(tree.body, ast.List | ast.Tuple) and len(tree.body.elts) > 1 and own_bracket:
        found = Call(OUTPUTS, tuple(reader.read(part, 1) for part in tree.body.elts), ())
        if not all(isinstance(part, Call) for part in found.args):
            found = Literal(None)
    else:
        found = reader.read(tree.body, 0)
    if not isinstance(found, Call):
        raise RuleError(
            "the pattern is no operator call",
            origin=place,
            rule=rule,
            expected="an operator call, e.g. aten.mul(aten.silu(gate), up)",
            mend="name the operator that computes the value",
        )
    return found


def captures(expression: Expression) -> list[str]:
    """The names in an expression, in order of appearance, each once, without ``_``."""
    return list(dict.fromkeys(node.name for node in walk(expression) if isinstance(node, Capture) and node.name != "_"))


def operators(expression: Expression) -> list[str]:
    """The operators in an expression, outermost first, each once."""
    own = (GETITEM, OUTPUTS)
    return list(dict.fromkeys(node.op for node in walk(expression) if isinstance(node, Call) and node.op not in own))


def walk(expression: Expression) -> Iterator[Expression]:
    """The expression and all it holds, depth first."""
    yield expression
    if isinstance(expression, Call):
        for arg in expression.args:
            yield from walk(arg)
        for _, arg in expression.kwargs:
            yield from walk(arg)
    elif isinstance(expression, Sequence):
        for item in expression.items:
            yield from walk(item)


def _shift(origin: Origin, line: int, column: int) -> Origin:
    """``line`` and ``column`` (from 1) within the text to a place in the file."""
    if not origin.line:
        return origin
    if line <= 1:
        return Origin(origin.file, origin.line, origin.column + column - 1)
    return Origin(origin.file, origin.line + line - 1, column)


class _Reader:
    def __init__(self, origin: Origin, rule: str | None) -> None:
        self.origin = origin
        self.rule = rule

    def error(self, node: ast.AST, what: str, mend: str | None = None) -> RuleError:
        line, offset = getattr(node, "lineno", 1), getattr(node, "col_offset", 0)
        column = offset if line == 1 else offset + 1
        return RuleError(
            what,
            origin=_shift(self.origin, line, column),
            rule=self.rule,
            expected="operator calls, names and constants only",
            mend=mend,
        )

    def read(self, node: ast.expr, depth: int) -> Expression:
        if depth > MAX_DEPTH:
            raise self.error(node, f"the pattern is nested more than {MAX_DEPTH} levels deep")
        if isinstance(node, ast.Call):
            return self.call(node, depth)
        if isinstance(node, ast.Name):
            return Capture(node.id)
        if isinstance(node, ast.Constant):
            if isinstance(node.value, int | float | str | bool | None):
                return Literal(node.value)
            raise self.error(node, f"the constant {node.value!r} cannot stand in a pattern")
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            inner = self.read(node.operand, depth + 1)
            if isinstance(inner, Literal) and type(inner.value) in (int, float):
                return Literal(-inner.value)  # type: ignore[operator]
        if isinstance(node, ast.List | ast.Tuple):
            parts = tuple(self.read(part, depth + 1) for part in node.elts)
            if all(isinstance(part, Literal) for part in parts):
                return Literal(tuple(part.value for part in parts))  # type: ignore[union-attr]
            return Sequence(parts)
        if isinstance(node, ast.Subscript):
            source, index = self.read(node.value, depth + 1), self.read(node.slice, depth + 1)
            if (
                isinstance(source, Call)
                and isinstance(index, Literal)
                and type(index.value) is int
                and index.value >= 0
            ):
                return Call(GETITEM, (source, index), ())
            raise self.error(node, "only an operator call can be indexed, by a number", "write aten.topk(x, k)[0]")
        if isinstance(node, ast.Attribute):
            raise self.error(node, f"{ast.unparse(node)!r} is not called", f"write {ast.unparse(node)}(…)")
        if isinstance(node, ast.BinOp | ast.UnaryOp | ast.Compare | ast.BoolOp):
            mend = "write the operator by name, e.g. aten.add(a, b) for a + b"
            raise self.error(node, "an arithmetic sign cannot stand in a pattern", mend)
        raise self.error(node, f"{type(node).__name__} cannot stand in a pattern")

    def call(self, node: ast.Call, depth: int) -> Call:
        op = self.operator(node.func)
        for arg in node.args:
            if isinstance(arg, ast.Starred):
                raise self.error(arg, "* cannot stand in a pattern", "write each argument")
        kwargs: list[tuple[str, Expression]] = []
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self.error(keyword.value, "** cannot stand in a pattern", "write each argument")
            kwargs.append((keyword.arg, self.read(keyword.value, depth + 1)))
        return Call(op, tuple(self.read(arg, depth + 1) for arg in node.args), tuple(kwargs))

    def operator(self, node: ast.expr) -> str:
        parts: list[str] = []
        inner = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if not isinstance(inner, ast.Name):
            raise self.error(node, f"{ast.unparse(node)!r} is no operator name", "write namespace.name(…)")
        parts.append(inner.id)
        name = ".".join(reversed(parts))
        if len(parts) == 1:
            raise self.error(node, f"the operator {name!r} has no namespace", f"write aten.{name}(…) or ktfx.{name}(…)")
        if len(parts) > 3:
            raise self.error(node, f"{name!r} is no operator name", "write namespace.name or namespace.name.overload")
        if any(part.startswith("__") for part in parts):
            raise self.error(node, f"{name!r} is no operator name", "operators have no double underscores")
        self.check_spelling(node, inner.id, parts[-2])
        return name

    def check_spelling(self, node: ast.expr, namespace: str, op: str) -> None:
        """Refuse a misspelt namespace or aten operator; operators of other libraries are known only when loaded."""
        meant = nearest(namespace, NAMESPACES) if namespace not in NAMESPACES else None
        if meant is not None:
            raise self.error(node, f"no operator namespace {namespace!r}", f"did you mean {meant!r}?")
        if namespace == "aten" and not hasattr(torch.ops.aten, op):
            raise self.error(
                node, f"ATen has no operator {op!r}", did_you_mean(op, [*dir(torch), *dir(torch.nn.functional)])
            )

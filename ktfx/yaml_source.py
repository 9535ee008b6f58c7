"""YAML text or Python data → nodes that remember their place, with every limit and slip of the format checked here.

The rest of ktfx reads ``Scalar``, ``Items`` and ``Table`` and never touches PyYAML. Aliases and merge keys (``<<``)
work; duplicate keys, tags of one's own, several documents, deep nesting and alias bombs are errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ktfx.errors import Origin, RuleError
from ktfx.text import did_you_mean

MAX_BYTES = 1 << 20
MAX_NODES = 20_000
MAX_DEPTH = 32

# The C parser is about ten times faster; both give the same marks.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PYTHON = Origin("<rules given in Python>")


@dataclass(frozen=True)
class Scalar:
    """One value. ``text``: as written, for keys such as ``0-29`` or ``010``. ``block``: written with ``|`` or ``>``."""

    value: str | int | float | bool | None
    text: str
    origin: Origin
    block: bool = False
    quoted: bool = False


@dataclass(frozen=True)
class Items:
    """A list."""

    items: tuple[Node, ...]
    origin: Origin


@dataclass(frozen=True)
class Entry:
    key: Scalar
    value: Node


@dataclass(frozen=True)
class Table:
    """A mapping; keys are compared by their text and are unique."""

    entries: tuple[Entry, ...]
    origin: Origin

    def get(self, key: str) -> Node | None:
        for entry in self.entries:
            if entry.key.text == key:
                return entry.value
        return None


Node = Scalar | Items | Table


def read_file(path: Path) -> Node:
    """The nodes of a YAML file. RuleError if it cannot be read or is no YAML that ktfx takes."""
    origin = Origin(str(path))
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise RuleError(
                f"the file has {size:,} bytes",
                origin=origin,
                expected=f"a rule file of at most {MAX_BYTES:,} bytes",
                mend="is this a rule file? If so, use roles and `layers:` ranges rather than a rule for each module",
            )
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RuleError(
            f"byte {error.start} is no UTF-8", origin=origin, expected="a text file in UTF-8", mend="save it as UTF-8"
        ) from None
    except OSError as error:
        raise RuleError(
            f"the rule file cannot be read: {error.strerror or error}",
            origin=origin,
            expected="a readable YAML file",
            mend="check the path and its permissions",
        ) from None
    return read_text(text, str(path))


def read_text(text: str, file: str) -> Node:
    """The nodes of YAML text; ``file`` is what errors call it."""
    if len(text.encode()) > MAX_BYTES:
        raise RuleError(f"the text has more than {MAX_BYTES:,} bytes", origin=Origin(file), mend="use fewer rules")
    try:
        _check_events(text, file)
        root = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, file) from None
    except yaml.YAMLError as error:
        raise RuleError(f"not YAML: {error}", origin=Origin(file), mend="remove control characters") from None
    if root is None:
        raise RuleError(
            "the file is empty", origin=Origin(file, 1, 1), expected="rules", mend="write at least one rule"
        )
    return _Converter(file).convert(root)


def read_python(data: object) -> Node:
    """The nodes of plain Python data (dict, list, str, int, float, bool, None); they have no line."""
    return _from_python(data, 0)


def _check_events(text: str, file: str) -> None:
    """Refuse what would make composing slow or deep, from the event stream, before any tree is built."""
    depth = nodes = documents = 0
    for event in yaml.parse(text, Loader=_LOADER):
        mark = event.start_mark
        origin = Origin(file, mark.line + 1, mark.column + 1) if mark else Origin(file)
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise RuleError("a second YAML document begins", origin=origin, expected="one document in a file")
        elif isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        nodes += isinstance(event, yaml.NodeEvent)
        if depth > MAX_DEPTH:
            raise RuleError("nested too deeply", origin=origin, expected=f"at most {MAX_DEPTH} levels")
        if nodes > MAX_NODES:
            raise RuleError("too many values", origin=origin, expected=f"at most {MAX_NODES:,} values in a rule file")


def _syntax_error(error: yaml.MarkedYAMLError, text: str, file: str) -> RuleError:
    mark = error.problem_mark or error.context_mark
    origin = Origin(file, mark.line + 1, mark.column + 1) if mark else Origin(file)
    problem = error.problem or error.context or "a syntax error"
    lines = text.splitlines()
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    indent = line[: len(line) - len(line.lstrip())]
    if "\t" in indent or "'\\t'" in problem:
        return RuleError("a tab is used for indentation", origin=origin, expected="spaces", mend="use spaces, not tabs")
    if "undefined alias" in problem:
        return RuleError(
            f"not YAML: {problem}", origin=origin, mend="write the anchor (&name) before its alias (*name)"
        )
    if "nesting depth" in problem:  # PyYAML's own limit, from 6.0.4 on, found ahead of ours
        return RuleError("nested too deeply", origin=origin, expected=f"at most {MAX_DEPTH} levels")
    return RuleError(f"not YAML: {problem}", origin=origin, mend="check indentation, quotes and brackets there")


class _Converter:
    """PyYAML's nodes to ours, counting what aliases expand to."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.count = 0
        self.open: set[int] = set()
        self.entry = Origin(file)

    def convert(self, node: yaml.Node) -> Node:
        origin = Origin(self.file, node.start_mark.line + 1, node.start_mark.column + 1)
        self.count += 1
        if len(self.open) == 1:
            self.entry = origin  # an aliased node has its anchor's place; this is the place in the file that grows
        if self.count > MAX_NODES:
            raise RuleError(
                "its aliases expand to too many values",
                origin=self.entry,
                expected=f"at most {MAX_NODES:,} values after expansion",
                mend="write the rules out, or use fewer aliases",
            )
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, origin)
        if node.tag not in ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
            raise RuleError(
                f"the tag {node.tag!r} is not allowed", origin=origin, mend="write plain lists and mappings"
            )
        if id(node) in self.open:
            raise RuleError("an alias stands inside its own anchor", origin=origin, mend="remove the alias")
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return Items(tuple(self.convert(child) for child in node.value), origin)
            if isinstance(node, yaml.MappingNode):
                return self._table(node, origin)
            raise RuleError("a value of unknown kind", origin=origin)
        finally:
            self.open.discard(id(node))

    def _scalar(self, node: yaml.ScalarNode, origin: Origin) -> Scalar:
        block = node.style in ("|", ">")
        quoted = node.style in ("'", '"')
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        value: str | int | float | bool | None = node.value
        # 1:30 is a base-60 number to YAML 1.1; nobody means that in a rule file.
        if kind in ("null", "bool", "int", "float") and ":" not in node.value:
            try:
                value = getattr(yaml.constructor.SafeConstructor(), f"construct_yaml_{kind}")(node)
            except (ValueError, KeyError) as error:
                raise RuleError(f"{node.value!r} is no {kind}: {error}", origin=origin) from None
        elif kind not in ("null", "bool", "int", "float", "str", "timestamp", "merge", "value"):
            raise RuleError(f"the tag {node.tag!r} is not allowed", origin=origin, mend="remove it")
        return Scalar(value, node.value, origin, block, quoted)

    def _table(self, node: yaml.MappingNode, origin: Origin) -> Table:
        entries: dict[str, Entry] = {}
        merged: list[Entry] = []
        for key_node, value_node in node.value:
            key = self.convert(key_node)
            if not isinstance(key, Scalar):
                raise RuleError("a key is a list or a mapping", origin=key.origin, expected="a plain word as key")
            value = self.convert(value_node)
            if key_node.tag == "tag:yaml.org,2002:merge":
                merged += self._merged(value)
                continue
            if key.text in entries:
                raise RuleError(
                    f"the key {key.text!r} is given twice",
                    origin=key.origin,
                    expected=f"one {key.text!r} (the first is at line {entries[key.text].key.origin.line})",
                    mend="remove one; for two rules, start each with its own '-'",
                )
            entries[key.text] = Entry(key, value)
        for entry in merged:
            entries.setdefault(entry.key.text, entry)
        return Table(tuple(entries.values()), origin)

    def _merged(self, value: Node) -> list[Entry]:
        sources = value.items if isinstance(value, Items) else (value,)
        found: list[Entry] = []
        for source in sources:
            if not isinstance(source, Table):
                raise RuleError("'<<' merges something that is no mapping", origin=source.origin, expected="<<: *name")
            found += source.entries
        return found


def _from_python(data: object, depth: int) -> Node:
    if depth > MAX_DEPTH:
        raise RuleError("nested too deeply", origin=_PYTHON, expected=f"at most {MAX_DEPTH} levels")
    if isinstance(data, Mapping):
        entries: dict[str, Entry] = {}
        for key, value in data.items():
            if not isinstance(key, str | int):
                raise RuleError(f"the key {key!r} is no string", origin=_PYTHON, expected="strings as keys")
            entries[str(key)] = Entry(Scalar(key, str(key), _PYTHON), _from_python(value, depth + 1))
        return Table(tuple(entries.values()), _PYTHON)
    if data is None or isinstance(data, str | bool | int | float):
        return Scalar(data, str(data), _PYTHON)
    if isinstance(data, Sequence) and not isinstance(data, bytes):
        return Items(tuple(_from_python(item, depth + 1) for item in data), _PYTHON)
    raise RuleError(
        f"{type(data).__name__} cannot stand in rules",
        origin=_PYTHON,
        expected="dicts, lists, strings, numbers, booleans",
    )


# ---- typed access, with errors that say where and what


def kind_of(node: Node) -> str:
    """What a node is, in words for a message."""
    if isinstance(node, Table):
        return "a mapping"
    if isinstance(node, Items):
        return "a list"
    if node.value is None:
        return "nothing"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return f"{names[type(node.value)]} ({node.text!r})"


def table(node: Node, what: str, rule: str | None = None) -> Table:
    if not isinstance(node, Table):
        raise RuleError(f"{what} is {kind_of(node)}", origin=node.origin, rule=rule, expected="a mapping (key: value)")
    return node


def items(node: Node, what: str, rule: str | None = None) -> Items:
    if not isinstance(node, Items):
        raise RuleError(f"{what} is {kind_of(node)}", origin=node.origin, rule=rule, expected="a list")
    return node


def string(node: Node, what: str, rule: str | None = None) -> str:
    if not isinstance(node, Scalar) or not isinstance(node.value, str):
        raise RuleError(f"{what} is {kind_of(node)}", origin=node.origin, rule=rule, expected="a string")
    if not node.value:
        raise RuleError(f"{what} is empty", origin=node.origin, rule=rule, expected="a non-empty string")
    return node.value


def boolean(node: Node, what: str, rule: str | None = None) -> bool:
    if not isinstance(node, Scalar) or not isinstance(node.value, bool):
        raise RuleError(
            f"{what} is {kind_of(node)}",
            origin=node.origin,
            rule=rule,
            expected="true or false",
            mend="write it without quotes: a quoted word is a string, and every string counts as true",
        )
    return node.value


def known_keys(node: Table, known: Sequence[str], what: str, rule: str | None = None) -> None:
    """RuleError for the first key that is not in ``known``, with the near name."""
    for entry in node.entries:
        if entry.key.text not in known:
            raise RuleError(
                f"unknown key {entry.key.text!r} in {what}",
                origin=entry.key.origin,
                rule=rule,
                expected="one of " + ", ".join(known),
                mend=did_you_mean(entry.key.text, known) or "remove it",
            )


def plain(node: Node) -> Any:
    """The node as plain Python data; keys that YAML reads as integers stay integers."""
    if isinstance(node, Table):
        return {
            (entry.key.value if isinstance(entry.key.value, int | str) else entry.key.text): plain(entry.value)
            for entry in node.entries
        }
    if isinstance(node, Items):
        return [plain(item) for item in node.items]
    return node.value

"""What changed between two graphs: nodes by name, op counts, and the programs as text."""

from __future__ import annotations

import bisect
import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ktfx.debug.snapshot import InputLine, NodeLine, Snapshot, by_name, flat, node_from_json


@dataclass(frozen=True)
class NodeDiff:
    """From one graph to the next.

    removed: names. added: (name of the node it follows, "" for the first; the node). changed: nodes of the same name
    that now read, place or compute something else. order: all names in order, only if nodes that stayed were moved.
    inputs: all placeholders, only if they changed.
    """

    removed: tuple[str, ...]
    added: tuple[tuple[str, NodeLine], ...]
    changed: tuple[NodeLine, ...]
    returns: str
    order: tuple[str, ...] | None = None
    inputs: tuple[InputLine, ...] | None = None

    @property
    def empty(self) -> bool:
        return not (self.removed or self.added or self.changed or self.order)

    def to_json(self) -> dict[str, Any]:
        return {
            "removed": list(self.removed),
            "added": [{"after": after, **flat(node)} for after, node in self.added],
            "changed": [flat(node) for node in self.changed],
            "returns": self.returns,
            "order": list(self.order) if self.order is not None else None,
            "inputs": [flat(i) for i in self.inputs] if self.inputs is not None else None,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> NodeDiff:
        added = tuple(
            (entry["after"], node_from_json({k: v for k, v in entry.items() if k != "after"}))
            for entry in data["added"]
        )
        inputs = data["inputs"]
        return NodeDiff(
            tuple(data["removed"]),
            added,
            tuple(node_from_json(n) for n in data["changed"]),
            data["returns"],
            tuple(data["order"]) if data["order"] is not None else None,
            tuple(InputLine(**{**i, "shape": tuple(i["shape"])}) for i in inputs) if inputs is not None else None,
        )


def node_diff(before: Snapshot, after: Snapshot) -> NodeDiff:
    old, new = by_name(before.nodes), by_name(after.nodes)
    added: list[tuple[str, NodeLine]] = []
    previous = ""
    for node in after.nodes:
        if node.name not in old:
            added.append((previous, node))
        previous = node.name
    kept_before = [n.name for n in before.nodes if n.name in new]
    kept_after = [n.name for n in after.nodes if n.name in old]
    return NodeDiff(
        removed=tuple(n.name for n in before.nodes if n.name not in new),
        added=tuple(added),
        changed=tuple(n for n in after.nodes if n.name in old and n != old[n.name]),
        returns=after.returns,
        order=tuple(n.name for n in after.nodes) if kept_before != kept_after else None,
        inputs=after.inputs if after.inputs != before.inputs else None,
    )


def apply_diff(before: Snapshot, diff: NodeDiff) -> Snapshot:
    """The graph after, from the graph before."""
    removed = set(diff.removed)
    changed = by_name(diff.changed)
    following: dict[str, list[NodeLine]] = {}
    for previous, node in diff.added:
        following.setdefault(previous, []).append(node)
    nodes: list[NodeLine] = []

    def take(node: NodeLine) -> None:
        nodes.append(node)
        for following_node in following.get(node.name, []):
            take(following_node)

    for node in following.get("", []):
        take(node)
    kept = [changed.get(n.name, n) for n in before.nodes if n.name not in removed]
    if diff.order is not None:
        known = by_name([*kept, *(n for _, n in diff.added)])
        nodes = [known[name] for name in diff.order]
    else:
        for node in kept:
            take(node)
    return replace(
        before, nodes=tuple(nodes), returns=diff.returns, inputs=before.inputs if diff.inputs is None else diff.inputs
    )


def text_diff(before: str, after: str, before_name: str, after_name: str, context: int = 3) -> str:
    """A unified diff of two programs, without their docstrings' first line (it names the side)."""
    old, new = before.splitlines()[1:], after.splitlines()[1:]
    if old == new:
        return ""
    lines = [f"--- {before_name}", f"+++ {after_name}"]
    for group in _groups(_opcodes(old, new), context):
        (_, i, _, j, _), (_, _, i_end, _, j_end) = group[0], group[-1]
        lines.append(f"@@ -{_range(i, i_end)} +{_range(j, j_end)} @@")
        for kind, a, b, c, d in group:
            if kind == "equal":
                lines += [" " + line for line in old[a:b]]
            else:
                lines += ["-" + line for line in old[a:b]] + ["+" + line for line in new[c:d]]
    return "\n".join(lines) + "\n"


_Opcode = tuple[str, int, int, int, int]


def _opcodes(old: list[str], new: list[str]) -> list[_Opcode]:
    """As difflib's, but in seconds less: lines that stand once in both texts, and in one order, are matched first."""
    anchors = _anchors(old, new)
    opcodes: list[_Opcode] = []
    i = j = 0
    for a, b in [*anchors, (len(old), len(new))]:
        if i < a and j < b:
            opcodes += [
                (kind, i + i1, i + i2, j + j1, j + j2)
                for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(None, old[i:a], new[j:b], False).get_opcodes()
            ]
        elif i < a or j < b:
            opcodes.append(("delete" if i < a else "insert", i, a, j, b))
        if a < len(old):
            opcodes.append(("equal", a, a + 1, b, b + 1))
        i, j = a + 1, b + 1
    return _merged(opcodes)


def _anchors(old: list[str], new: list[str]) -> list[tuple[int, int]]:
    """The longest run of pairs of equal lines, each unique in its text, that ascends in both (patience sorting)."""
    in_old, in_new = Counter(old), Counter(new)
    where = {line: i for i, line in enumerate(old) if in_old[line] == 1}
    pairs = [(where[line], j) for j, line in enumerate(new) if in_new[line] == 1 and line in where]
    tails: list[int] = []
    last: list[int] = []
    previous: list[int] = []
    for index, (i, _) in enumerate(pairs):
        place = bisect.bisect_left(tails, i)
        previous.append(last[place - 1] if place else -1)
        if place == len(tails):
            tails.append(i)
            last.append(index)
        else:
            tails[place], last[place] = i, index
    chain: list[tuple[int, int]] = []
    index = last[-1] if last else -1
    while index >= 0:
        chain.append(pairs[index])
        index = previous[index]
    return chain[::-1]


def _merged(opcodes: list[_Opcode]) -> list[_Opcode]:
    """Neighbours of one kind as one; a deletion next to an insertion as a replacement."""
    merged: list[_Opcode] = []
    for kind, i, i_end, j, j_end in opcodes:
        if merged and (merged[-1][0] == "equal") == (kind == "equal"):
            before = merged.pop()
            kind = before[0] if before[0] == kind else "replace"
            i, j = before[1], before[3]
        merged.append((kind, i, i_end, j, j_end))
    return merged


def _groups(opcodes: list[_Opcode], context: int) -> Iterator[list[_Opcode]]:
    """Changes with ``context`` equal lines around them; those nearer than twice that are one group."""
    group: list[_Opcode] = []
    for kind, i, i_end, j, j_end in opcodes:
        if kind != "equal":
            group.append((kind, i, i_end, j, j_end))
            continue
        length = i_end - i
        if group and length > 2 * context:
            yield [*group, (kind, i, i + context, j, j + context)]
            group = []
        if not group:
            skipped = max(0, length - context)
            i, j = i + skipped, j + skipped
        group.append((kind, i, i_end, j, j_end))
    if any(kind != "equal" for kind, *_ in group):
        kind, i, i_end, j, j_end = group[-1]
        if kind == "equal":
            group[-1] = (kind, i, min(i_end, i + context), j, min(j_end, j + context))
        yield group


def _range(start: int, stop: int) -> str:
    length = stop - start
    return f"{start + 1 if length else start},{length}" if length != 1 else f"{start + 1}"


def op_counts(nodes: Iterable[NodeLine]) -> Counter[str]:
    return Counter(n.op for n in nodes if n.op != "get_attr")


@dataclass(frozen=True)
class OpChange:
    op: str
    before: int
    after: int


def op_changes(before: Mapping[str, int], after: Mapping[str, int]) -> list[OpChange]:
    """Ops whose number changed, the largest changes first."""
    changes = [OpChange(op, before.get(op, 0), after.get(op, 0)) for op in {*before, *after}]
    return sorted((c for c in changes if c.before != c.after), key=lambda c: (-abs(c.after - c.before), c.op))


def regions(nodes: Sequence[NodeLine], names: Iterable[str]) -> dict[str, int]:
    """How many of the named nodes lie in each module."""
    wanted = set(names)
    return dict(Counter(n.module for n in nodes if n.name in wanted))

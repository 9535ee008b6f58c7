"""What changed between two graphs: nodes by name, op counts, and the programs as text."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ktfx.debug.snapshot import InputLine, NodeLine, Snapshot, by_name, node_from_json


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
            "added": [{"after": after, **asdict(node)} for after, node in self.added],
            "changed": [asdict(node) for node in self.changed],
            "returns": self.returns,
            "order": list(self.order) if self.order is not None else None,
            "inputs": [asdict(i) for i in self.inputs] if self.inputs is not None else None,
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
    return "\n".join(difflib.unified_diff(old, new, before_name, after_name, lineterm="", n=context)) + "\n"


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

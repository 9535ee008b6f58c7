"""What ``ktfx diff`` shows: one pass's two graphs, or the same pass's graphs in two traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ktfx.debug.dump import program_text
from ktfx.debug.graph_diff import NodeDiff, OpChange, node_diff, op_changes, op_counts, regions, text_diff
from ktfx.debug.snapshot import Snapshot
from ktfx.debug.trace_dir import PassTrace, Trace
from ktfx.errors import OptionError


@dataclass(frozen=True)
class Comparison:
    """Two graphs side by side. rewrites: as in ``report.json``. …_in: module → number of nodes."""

    title: str
    nodes: NodeDiff
    ops: list[OpChange]
    rewrites: list[dict[str, Any]]
    removed_in: Mapping[str, int]
    added_in: Mapping[str, int]
    changed_in: Mapping[str, int]
    text: str

    @property
    def empty(self) -> bool:
        return self.nodes.empty and not self.text and not self.rewrites

    def to_json(self, with_text: bool = True) -> dict[str, Any]:
        return {
            "title": self.title,
            "ops": [asdict(o) for o in self.ops],
            "rewrites": self.rewrites,
            "removed": list(self.nodes.removed),
            "added": [node.name for _, node in self.nodes.added],
            "changed": [node.name for node in self.nodes.changed],
            "reordered": self.nodes.order is not None,
            "removed_in": dict(self.removed_in),
            "added_in": dict(self.added_in),
            "changed_in": dict(self.changed_in),
            **({"text": self.text} if with_text else {}),
        }


def compare_pass(trace: Trace, entry: PassTrace) -> Comparison:
    """Before and after one pass."""
    text = (entry.folder / "graph.diff").read_text(encoding="utf-8")
    return _compare(f"{trace.label} {entry.folder.name}", entry.before, entry.after, entry.report["rewrites"], text)


def compare_traces(first: Sequence[Trace], second: Sequence[Trace], phase: str | None = None) -> list[Comparison]:
    """The captured graphs, and the graphs after each pass that both have, matched by phase and pass name.

    After the first difference the later passes are compared all the same: they carry it along.
    """
    others = {t.label: t for t in second}
    result: list[Comparison] = []
    for trace in first:
        other = others.get(trace.label)
        if phase not in (None, trace.label) or other is None:
            continue
        result += _compare_trace(trace, other)
    if not result:
        raise OptionError(
            "the two traces have no phase in common" + (f" named {phase!r}" if phase else ""),
            expected=", ".join(sorted({t.label for t in (*first, *second)})),
        )
    return result


def _compare_trace(trace: Trace, other: Trace) -> list[Comparison]:
    label = trace.label
    result = []
    if trace.passes and other.passes:
        result.append(_compared(f"{label}: as captured", trace.passes[0].before, other.passes[0].before))
    later = {p.name: p for p in other.passes}
    for entry in trace.passes:
        match = later.pop(entry.name, None)
        if match is None:
            result.append(_only(f"{label}: pass {entry.name} runs in the first trace only", entry))
        else:
            result.append(_compared(f"{label}: after {entry.name}", entry.after, match.after))
    result += [_only(f"{label}: pass {name} runs in the second trace only", entry) for name, entry in later.items()]
    return result


def _only(title: str, entry: PassTrace) -> Comparison:
    return _compare(title, entry.before, entry.after, entry.report["rewrites"], "")


def _compared(title: str, before: Snapshot, after: Snapshot) -> Comparison:
    text = text_diff(program_text(before, title), program_text(after, title), "first", "second")
    return _compare(title, before, after, [], text)


def _compare(title: str, before: Snapshot, after: Snapshot, rewrites: list[dict[str, Any]], text: str) -> Comparison:
    nodes = node_diff(before, after)
    return Comparison(
        title=title,
        nodes=nodes,
        ops=op_changes(op_counts(before.nodes), op_counts(after.nodes)),
        rewrites=rewrites,
        removed_in=regions(before.nodes, nodes.removed),
        added_in=regions(after.nodes, [n.name for _, n in nodes.added]),
        changed_in=regions(after.nodes, [n.name for n in nodes.changed]),
        text=text,
    )

"""A trace as one static page: no network, no other file. The data is in the page as JSON, the drawing in its script."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ktfx.debug.graph_diff import op_changes
from ktfx.debug.snapshot import NodeLine, by_name
from ktfx.debug.trace_dir import PassTrace, Trace, read_traces
from ktfx.errors import OptionError

TEMPLATE = "view.html.j2"
_FIELDS = ("text", "form", "module", "cls", "layer", "device", "rule", "source", "code")


def write_page(directory: Path, output: Path | None = None) -> Path:
    """The page of a trace, beside it as ``view.html`` unless told otherwise; a file of others is not replaced."""
    output = output or directory / "view.html"
    if output.exists() and not _is_ours(output):
        raise OptionError(f"{output} exists and is no ktfx page", mend="name another file with -o")
    text = page(read_traces(directory), str(directory))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    return output


def _is_ours(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return "ktfx-view" in file.read(400)


def page(traces: Sequence[Trace], title: str) -> str:
    """The whole page as text."""
    from jinja2 import Environment

    template = resources.files("ktfx.debug").joinpath(TEMPLATE).read_text(encoding="utf-8")
    data = {"title": title, "graphs": [graph_data(t) for t in traces]}
    # In a script element only "</" could end it; escaping every "<" keeps the JSON valid.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), default=str).replace("<", "\\u003c")
    return Environment(autoescape=True).from_string(template).render(title=title, data=text)


def graph_data(trace: Trace) -> dict[str, Any]:
    """One graph for the page: every node once, each pass as what it changes. Strings that repeat are numbered."""
    table = _Table()
    first = trace.passes[0].before.nodes if trace.passes else ()
    ids = {node.name: table.add(node) for node in first}
    start = [ids[n.name] for n in first]
    passes = [_pass_data(entry, ids, table) for entry in trace.passes]
    manifest = trace.manifest
    copied = ("phase_reason", "rules", "logical", "devices", "versions", "seconds", "warnings", "runs", "model")
    of_unit = ("index", "device", "run", "layer", "key", "shared", "compile_seconds")
    return {
        "phase": trace.label,
        "command": manifest.get("command"),
        **{key: manifest.get(key) for key in copied},
        "units": [{**{k: u[k] for k in of_unit}, "nodes": len(u["nodes"])} for u in manifest["units"]],
        "transfers": manifest["transfers"],
        "timeline": [[t["step"], round(t["start_us"], 1), round(t["us"], 1)] for t in manifest["timeline"]],
        "start": start,
        "passes": passes,
        "nodes": table.rows,
        "strings": table.strings,
    }


def _pass_data(entry: PassTrace, ids: dict[str, int], table: _Table) -> dict[str, Any]:
    report = entry.report
    nodes = report["nodes"]
    before = by_name(entry.before.nodes)
    after = by_name(entry.after.nodes)
    removed = [ids[name] for name in nodes["removed"]]
    changed = [[ids[n["name"]], table.changes(before[n["name"]], after[n["name"]])] for n in nodes["changed"]]
    added = []
    for item in nodes["added"]:
        # A name may come back for a new node: it gets a number of its own.
        previous = ids[item["after"]] if item["after"] else -1
        ids[item["name"]] = table.add(after[item["name"]])
        added.append([previous, ids[item["name"]]])
    return {
        "name": entry.name,
        "folder": entry.folder.name,
        "seconds": report["seconds"],
        "options": report["options"],
        "rewrites": [_rewrite_data(r) for r in report["rewrites"]],
        "misses": report["misses"],
        "ops": [[c.op, c.before, c.after] for c in op_changes(report["ops_before"], report["ops_after"])],
        "removed": removed,
        "added": added,
        "changed": changed,
        "order": [ids[n] for n in nodes["order"]] if nodes["order"] is not None else None,
    }


def _rewrite_data(rewrite: dict[str, Any]) -> dict[str, Any]:
    keys = ("number", "what", "module", "rule", "file", "line", "yaml", "nodes_before", "nodes_after")
    return {key: rewrite[key] for key in keys}


class _Table:
    """Nodes by number, their strings by number: layers repeat nearly everything."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []
        self.strings: list[str] = []
        self._index: dict[str, int] = {}

    def add(self, node: NodeLine) -> int:
        self.rows.append([node.name, *(self.value(getattr(node, f), f) for f in _FIELDS)])
        return len(self.rows) - 1

    def value(self, value: Any, name: str) -> Any:
        """Text stays as it is (each node's is its own); what repeats becomes its string's number."""
        if name in ("text", "layer") or value is None:
            return value
        if value not in self._index:
            self._index[value] = len(self.strings)
            self.strings.append(value)
        return self._index[value]

    def changes(self, before: NodeLine, after: NodeLine) -> dict[str, Any]:
        """Position of each field that changed → its new value."""
        return {
            str(i + 1): self.value(getattr(after, f), f)
            for i, f in enumerate(_FIELDS)
            if getattr(before, f) != getattr(after, f)
        }

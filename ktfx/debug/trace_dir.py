"""A trace on disk: one folder a pass, with the graph before and after as programs, their difference, and a report.

    DIR/trace.json               what was compiled and how; the captured graph; partitions, transfers, timeline
    DIR/inputs.pt                every argument of the programs (only if asked for)
    DIR/001_resolve_rules/       before.py  after.py  graph.diff  report.json
    DIR/002_rewrite_experts/     …

A trace of several graphs has one such folder for each (``prefill``, ``generate``) and an ``index.json``.
"""

from __future__ import annotations

import functools
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ktfx.debug.dump import is_big, packed_texts, program_text, with_title
from ktfx.debug.graph_diff import NodeDiff, apply_diff, node_diff, text_diff
from ktfx.debug.inputs import packed_values
from ktfx.debug.snapshot import NodeLine, Seen, Snapshot, attributes, snapshot
from ktfx.errors import KtfxError, OptionError, Origin
from ktfx.graph import info, tensor_bytes
from ktfx.ops.transfer import is_transfer, transfer_ends
from ktfx.pass_manager import PassContext, PassRecord, Rewrite
from ktfx.state import GraphReport, ModelState

VERSION = 1
MANIFEST = "trace.json"
INDEX = "index.json"


def folder_name(number: int, name: str) -> str:
    return f"{number:03d}_{name}"


def title_of(phase: str, name: str, side: str) -> str:
    return f"{phase}: the graph {side} pass {name}"


# ---- what is written


@dataclass(frozen=True)
class TraceFiles:
    """One graph's trace. files: relative path → text. names: the passes' folders; diffs, counts: of each pass."""

    files: dict[str, str]
    names: list[str]
    diffs: list[NodeDiff]
    counts: list[int]


def trace_files(report: GraphReport, state: ModelState, about: Mapping[str, Any] | None = None) -> TraceFiles:
    """Every file of one graph's trace. about: what the caller knows (model, command, …)."""
    context = report.context
    if context is None or not report.records or report.records[0].graph_before is None:
        raise OptionError(
            "this graph was compiled without its record", mend="compile with options={'keep_graphs': True}"
        )
    shots = _snapshots(report.records, context)
    texts = packed_texts_of(shots, context, report.inputs)
    diffs = [node_diff(a, b) for a, b in pairwise(shots)]
    programs = [program_text(shots[0], "", texts)]
    for earlier, shot in pairwise(shots):
        programs.append(programs[-1] if shot == earlier else program_text(shot, "", texts))
    files: dict[str, str] = {}
    names: list[str] = []
    for position, record in enumerate(report.records):
        folder = folder_name(position + 1, record.name)
        names.append(folder)
        before = with_title(programs[position], title_of(report.phase, record.name, "before"))
        after = with_title(programs[position + 1], title_of(report.phase, record.name, "after"))
        files[f"{folder}/before.py"] = before
        files[f"{folder}/after.py"] = after
        files[f"{folder}/graph.diff"] = text_diff(before, after, f"{folder}/before.py", f"{folder}/after.py")
        files[f"{folder}/report.json"] = _json(record_json(record, position + 1, diffs[position], state))
    manifest = {
        "ktfx_trace": VERSION,
        **(about or {}),
        **_graph_json(report, state, context),
        "passes": names,
        "graph": shots[0].to_json(),
    }
    files[MANIFEST] = _json(manifest)
    return TraceFiles(files, names, diffs, [len(shot.nodes) for shot in shots[1:]])


def packed_texts_of(
    shots: Sequence[Snapshot], context: PassContext, values: Mapping[str, Any] | None
) -> dict[str, str]:
    texts: dict[str, str] = {}
    for shot in (shots[0], shots[-1]):
        texts |= packed_texts(shot, context, values)
    return texts


def _snapshots(records: Sequence[PassRecord], context: PassContext) -> list[Snapshot]:
    """The graph before the first pass and after each; a graph that two records share is read once."""
    inputs = context.captured.inputs
    seen = Seen()
    graphs = [records[0].graph_before, *(r.graph_after for r in records)]
    found: list[Snapshot] = []
    for gm in graphs:
        assert isinstance(gm, fx.GraphModule)
        found.append(snapshot(gm, inputs, seen))
    return found


def record_json(record: PassRecord, number: int, diff: NodeDiff, state: ModelState | None) -> dict[str, Any]:
    """``report.json`` of one pass."""
    options = asdict(record.options) if is_dataclass(record.options) and not isinstance(record.options, type) else {}
    return {
        "number": number,
        "name": record.name,
        "options": options,
        "seconds": record.seconds,
        "rewrites": [rewrite_json(r) for r in record.rewrites],
        "misses": [asdict(m) for m in record.misses],
        "ops_before": dict(record.ops_before),
        "ops_after": dict(record.ops_after),
        "nodes": diff.to_json(),
    }


def rewrite_json(rewrite: Rewrite) -> dict[str, Any]:
    data = {f.name: getattr(rewrite, f.name) for f in fields(rewrite) if f.name != "origin"}
    origin = rewrite.origin
    return {
        **data,
        "file": origin.file if origin else None,
        "line": origin.line or None if origin else None,
        "yaml": rule_lines(origin) if origin else [],
    }


def rule_lines(origin: Origin, most: int = 16) -> list[str]:
    """The lines of the rule file that a rule stands in, if the file can still be read."""
    path = Path(origin.file)
    if not origin.line:
        return []
    if not path.is_file():
        from importlib import resources

        shipped = resources.files("ktfx.rules").joinpath(path.name)
        if not shipped.is_file():
            return []
        text = shipped.read_text(encoding="utf-8")
    else:
        text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()[origin.line - 1 :]
    if not lines:
        return []
    indent = len(lines[0]) - len(lines[0].lstrip())
    taken = [lines[0]]
    for line in lines[1:most]:
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            break
        taken.append(line)
    return [line.rstrip() for line in taken if line.strip()]


def _graph_json(report: GraphReport, state: ModelState, context: PassContext) -> dict[str, Any]:
    gm = report.records[-1].graph_after
    assert gm is not None
    built = report.built
    rules = state.ruleset.origin
    return {
        "phase": report.phase,
        "phase_reason": report.phase_reason,
        "rules": rules.file,
        "logical": state.logical_name,
        "devices": {name: str(state.devices[name]) for name in state.resolution.device_names()},
        "versions": versions(),
        "seconds": report.seconds,
        "warnings": report.warnings,
        "runs": list(report.runs),
        "units": [
            {
                "index": unit.index,
                "device": unit.device,
                "run": unit.run,
                "layer": unit.layer,
                "nodes": [n.name for n in unit.nodes],
                "key": done.key,
                "shared": done.shared,
                "compile_seconds": done.seconds,
            }
            for unit, done in zip(built.units, built.compiled, strict=True)
        ],
        "transfers": [_transfer_json(n) for n in gm.graph.nodes if is_transfer(n)],
        "timeline": timeline_json(report),
    }


def _transfer_json(node: fx.Node) -> dict[str, Any]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    start, end = transfer_ends(node)
    return {
        "name": node.name,
        "value": source.name,
        "from": start,
        "to": end,
        "bytes": tensor_bytes(source.meta.get("val")),
        "module": info(source).module,
        "readers": sorted({info(u).module for u in node.users if u.op == "call_function"}),
    }


def timeline_json(report: GraphReport) -> list[dict[str, Any]]:
    """The steps of one run, in microseconds from its start; empty if none was timed."""
    timeline = report.built.program.timeline
    if not timeline:
        return []
    origin = timeline[0][1]
    return [
        {"step": text, "start_us": (start - origin) * 1e6, "us": (end - start) * 1e6} for text, start, end in timeline
    ]


def versions() -> dict[str, str]:
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": f"{sys.platform} {platform.machine()}",
    }


def _json(data: Mapping[str, Any]) -> str:
    """JSON with a line for each key, and for each item of a list of objects (indenting more takes seconds)."""
    text = functools.partial(json.dumps, ensure_ascii=False, default=str)

    def lines(value: Any, indent: str) -> str:
        if isinstance(value, Mapping) and any(isinstance(v, (Mapping, list)) for v in value.values()):
            inner = (f"{indent} {text(str(k))}: {lines(v, indent + ' ')}" for k, v in value.items())
            return "{\n" + ",\n".join(inner) + f"\n{indent}}}"
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            return "[\n" + ",\n".join(f"{indent} {text(v)}" for v in value) + f"\n{indent}]"
        return text(value)

    return lines(data, "") + "\n"


# ---- writing


def write_trace(
    directory: Path, files: Mapping[str, str], tensors: Mapping[str, Mapping[str, torch.Tensor]] | None = None
) -> list[Path]:
    """Write the files. One that an earlier trace wrote is replaced, any other is an error; nothing else is touched.

    tensors: file name → tensors, e.g. ``inputs.pt``.
    """
    tensors = tensors or {}
    ours = written_before(directory)
    for name in (*files, *tensors):
        if (directory / name).exists() and name not in ours:
            raise OptionError(
                f"{directory / name} exists and is not of an earlier trace",
                expected="an empty directory, or one that an earlier `ktfx trace` wrote",
                mend="give -o another directory",
            )
    stale = sorted(ours - set(files) - set(tensors))
    written = []
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    for name, values in tensors.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(values), directory / name)
        written.append(directory / name)
    for name in stale:
        (directory / name).unlink(missing_ok=True)
        _remove_if_empty((directory / name).parent, directory)
    (directory / ".written").write_text("\n".join(sorted([*files, *tensors])) + "\n", encoding="utf-8")
    return written


def written_before(directory: Path) -> set[str]:
    """The files that an earlier trace wrote there. OptionError if the directory is a file."""
    if directory.exists() and not directory.is_dir():
        raise OptionError(f"{directory} is a file", expected="a directory", mend="give -o a directory")
    try:
        names = (directory / ".written").read_text(encoding="utf-8").split("\n")
    except OSError:
        return set()
    return {n for n in names if n and not Path(n).is_absolute() and ".." not in Path(n).parts}


def _remove_if_empty(folder: Path, root: Path) -> None:
    while folder != root and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def big_constants(report: GraphReport) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for record in report.records:
        if record.graph_after is not None:
            own = attributes(record.graph_after)
            found |= {n: v.detach() for n, v in own.items() if isinstance(v, torch.Tensor) and is_big(v)}
    return found


def saved_inputs(report: GraphReport, state: ModelState) -> dict[str, torch.Tensor]:
    """Every argument of every program of the trace: what the first call brought, weights, and packed weights."""
    if report.inputs is None or report.context is None:
        raise OptionError("the graph was never called, so it has no inputs", mend="run the model once before tracing")
    found = {n: v for n, v in report.inputs.items() if isinstance(v, torch.Tensor)}
    return {n: t.detach().cpu() for n, t in (found | packed_values(report.context, state.store)).items()}


# ---- reading


@dataclass(frozen=True)
class PassTrace:
    """One pass's folder, read back. before, after: the whole graphs."""

    folder: Path
    report: dict[str, Any]
    before: Snapshot
    after: Snapshot

    @property
    def name(self) -> str:
        return str(self.report["name"])


@dataclass(frozen=True)
class Trace:
    """One graph's trace, read back."""

    folder: Path
    manifest: dict[str, Any]
    passes: list[PassTrace] = field(default_factory=list)

    @property
    def label(self) -> str:
        return str(self.manifest.get("phase", self.folder.name))


def read_traces(directory: Path) -> list[Trace]:
    """Every graph's trace in a directory that ``ktfx trace`` wrote."""
    if (directory / MANIFEST).is_file():
        return [read_trace(directory)]
    index = directory / INDEX
    if index.is_file():
        return [read_trace(directory / name) for name in _read(index)["graphs"]]
    raise OptionError(
        f"{directory} is no trace: it has neither {MANIFEST} nor {INDEX}",
        expected="a directory that `ktfx trace … -o DIR` wrote",
        mend="write one with `ktfx trace`",
    )


def read_trace(directory: Path) -> Trace:
    manifest = _read(directory / MANIFEST)
    if manifest.get("ktfx_trace") != VERSION:
        raise OptionError(
            f"{directory / MANIFEST} is of version {manifest.get('ktfx_trace')!r}",
            expected=f"version {VERSION}",
            mend="trace again with this ktfx",
        )
    shot = Snapshot.from_json(manifest["graph"])
    passes: list[PassTrace] = []
    for name in manifest["passes"]:
        report = _read(directory / name / "report.json")
        after = apply_diff(shot, NodeDiff.from_json(report["nodes"]))
        passes.append(PassTrace(directory / name, report, shot, after))
        shot = after
    return Trace(directory, manifest, passes)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KtfxError(f"{path} cannot be read: {error}", mend="trace again with `ktfx trace`") from None
    if not isinstance(data, dict):
        raise KtfxError(f"{path} holds no object", mend="trace again with `ktfx trace`")
    return data


def find_pass(trace: Trace, wanted: str) -> PassTrace:
    """A pass by its folder's name, its own name, or its number."""
    for entry in trace.passes:
        if wanted in (entry.folder.name, entry.name, str(entry.report["number"])):
            return entry
    from ktfx.text import near

    names = [p.folder.name for p in trace.passes]
    raise OptionError(
        f"the trace has no pass {wanted!r}{near(wanted, [*names, *(p.name for p in trace.passes)])}",
        expected="one of " + ", ".join(names),
    )


def unit_of(trace: Trace) -> dict[str, int]:
    return {name: unit["index"] for unit in trace.manifest["units"] for name in unit["nodes"]}


def nodes_of(trace: Trace) -> Sequence[NodeLine]:
    """The nodes after the last pass."""
    return trace.passes[-1].after.nodes if trace.passes else ()

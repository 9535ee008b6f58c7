"""A session's graphs → trace folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ktfx.debug.session import Session
from ktfx.debug.trace_dir import INDEX, VERSION, TraceFiles, big_constants, saved_inputs, trace_files, write_trace
from ktfx.errors import OptionError
from ktfx.state import GraphReport


def write_session(
    session: Session, directory: Path, *, save_inputs: bool = False, command: Sequence[str] = ()
) -> dict[str, Any]:
    """Write every graph of a session and return what ``ktfx trace --json`` prints.

    One graph goes into ``directory`` itself, several into a folder each, named by their phase.
    """
    graphs = session.graphs
    if not graphs:
        raise OptionError(f"no {session.setup.phase} graph was compiled", mend="use --phase both to see what was")
    about = {"model": session.setup.model or "demo", "command": list(command)}
    files: dict[str, str] = {}
    tensors: dict[str, dict[str, Any]] = {}
    names: list[str] = []
    summaries: list[dict[str, Any]] = []
    for graph in graphs:
        folder = "" if len(graphs) == 1 else _free(graph.phase, names)
        names.append(folder)
        prefix = f"{folder}/" if folder else ""
        written = trace_files(graph, session.state, about)
        files |= {prefix + name: text for name, text in written.files.items()}
        summaries.append(_summary(graph, directory / folder, written))
        if save_inputs:
            tensors[f"{prefix}inputs.pt"] = saved_inputs(graph, session.state)
        if constants := big_constants(graph):
            tensors[f"{prefix}constants.pt"] = constants
    if len(graphs) > 1:
        files[INDEX] = json.dumps({"ktfx_trace": VERSION, "graphs": names}, indent=1) + "\n"
    write_trace(directory, files, tensors)
    return {"directory": str(directory), "graphs": summaries}


def _summary(graph: GraphReport, folder: Path, written: TraceFiles) -> dict[str, Any]:
    """What a graph's trace holds, pass by pass."""
    passes = []
    for name, record, diff, count in zip(written.names, graph.records, written.diffs, written.counts, strict=True):
        passes.append(
            {
                "folder": name,
                "name": record.name,
                "seconds": record.seconds,
                "rewrites": len(record.rewrites),
                "misses": len(record.misses),
                "nodes": count,
                "added": len(diff.added),
                "removed": len(diff.removed),
                "changed": len(diff.changed),
            }
        )
    return {"phase": graph.phase, "folder": str(folder), "passes": passes}


def _free(name: str, taken: Sequence[str]) -> str:
    number = 1
    wanted = name
    while wanted in taken:
        number += 1
        wanted = f"{name}_{number}"
    return wanted

"""A session's graphs → trace folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ktfx.debug.session import Session
from ktfx.debug.trace_dir import INDEX, VERSION, big_constants, read_traces, saved_inputs, trace_files, write_trace
from ktfx.errors import OptionError


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
    for graph in graphs:
        folder = "" if len(graphs) == 1 else _free(graph.phase, names)
        names.append(folder)
        prefix = f"{folder}/" if folder else ""
        files |= {prefix + name: text for name, text in trace_files(graph, session.state, about).items()}
        if save_inputs:
            tensors[f"{prefix}inputs.pt"] = saved_inputs(graph, session.state)
        if constants := big_constants(graph):
            tensors[f"{prefix}constants.pt"] = constants
    if len(graphs) > 1:
        files[INDEX] = json.dumps({"ktfx_trace": VERSION, "graphs": names}, indent=1) + "\n"
    write_trace(directory, files, tensors)
    return {"directory": str(directory), "graphs": summary(directory)}


def summary(directory: Path) -> list[dict[str, Any]]:
    """What a trace holds, pass by pass."""
    result = []
    for trace in read_traces(directory):
        passes = []
        for entry in trace.passes:
            nodes = entry.report["nodes"]
            passes.append(
                {
                    "folder": entry.folder.name,
                    "name": entry.name,
                    "seconds": entry.report["seconds"],
                    "rewrites": len(entry.report["rewrites"]),
                    "misses": len(entry.report["misses"]),
                    "nodes": len(entry.after.nodes),
                    "added": len(nodes["added"]),
                    "removed": len(nodes["removed"]),
                    "changed": len(nodes["changed"]),
                }
            )
        result.append({"phase": trace.label, "folder": str(trace.folder), "passes": passes})
    return result


def _free(name: str, taken: Sequence[str]) -> str:
    number = 1
    wanted = name
    while wanted in taken:
        number += 1
        wanted = f"{name}_{number}"
    return wanted

"""``ktfx trace``: every pass's graph, before and after, on disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ktfx.cli.common import Debug, Json, guarded, print_json, stdout
from ktfx.cli.debug_options import (
    Backend,
    Dtype,
    Layers,
    ModelArgument,
    Phase,
    RulesOption,
    Seed,
    Simulate,
    Tiny,
    Tokens,
)


@guarded
def trace(
    model: ModelArgument = None,
    rules: RulesOption = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the trace goes: an empty or new directory.")
    ] = Path("ktfx-trace"),
    simulate: Simulate = None,
    phase: Phase = "prefill",
    tokens: Tokens = 8,
    layers: Layers = None,
    tiny: Tiny = False,
    dtype: Dtype = None,
    backend: Backend = "eager",
    seed: Seed = 0,
    inputs: Annotated[
        bool, typer.Option("--inputs", help="Save every tensor the programs read (weights too) as inputs.pt.")
    ] = False,
    timeline: Annotated[bool, typer.Option("--timeline", help="Run once more and time each step.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write one folder per pass: before.py and after.py (programs that run), graph.diff and report.json."""
    from ktfx.debug.session import Setup, run
    from ktfx.debug.trace_dir import written_before
    from ktfx.debug.tracing import write_session

    written_before(output)  # what is wrong with it should be said before the model runs
    session = run(Setup(model, rules, simulate, layers, tiny, dtype, tokens, phase, backend, seed, timeline=timeline))
    summary = write_session(session, output, save_inputs=inputs, command=["ktfx", *sys.argv[1:]])
    if as_json:
        return print_json(summary)
    console = stdout()
    for graph in summary["graphs"]:
        table = Table(
            title=f"{graph['phase']}: {graph['folder']}", title_justify="left", box=None, padding=(0, 2, 0, 0)
        )
        for heading in ("pass", "ms", "rewrites", "misses", "nodes", "added", "removed", "changed"):
            table.add_column(heading, justify="left" if heading == "pass" else "right")
        for entry in graph["passes"]:
            table.add_row(
                entry["folder"],
                f"{entry['seconds'] * 1e3:.1f}",
                *(str(entry[k]) for k in ("rewrites", "misses", "nodes", "added", "removed", "changed")),
            )
        console.print(table)
    console.print(f"next: ktfx view {output}")
    return None

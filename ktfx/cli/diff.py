"""``ktfx diff``: what a pass changed, or what differs between two traces."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from ktfx.cli.common import Debug, Json, guarded, print_json, stdout
from ktfx.errors import OptionError


@guarded
def diff(
    first: Annotated[Path, typer.Argument(metavar="DIR", help="A trace that `ktfx trace` wrote.")],
    second: Annotated[
        str,
        typer.Argument(metavar="PASS | DIR2", help="A pass of the trace (name, number or folder), or another trace."),
    ],
    phase: Annotated[str | None, typer.Option("--phase", help="Which graph, where the trace has several.")] = None,
    text: Annotated[bool, typer.Option("--text/--no-text", help="Also the programs' difference, as a diff.")] = True,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a pass changed, or how two traces differ: op counts, regions, nodes, and the text in colour."""
    from ktfx.debug.compare import compare_pass, compare_traces
    from ktfx.debug.trace_dir import find_pass, read_traces

    if Path(second).is_dir():
        comparisons = compare_traces(read_traces(first), read_traces(Path(second)), phase)
    else:
        traces = [t for t in read_traces(first) if phase in (None, t.label)]
        if not traces:
            raise OptionError(
                f"the trace has no graph {phase!r}", expected=", ".join(t.label for t in read_traces(first))
            )
        comparisons = [compare_pass(trace, find_pass(trace, second)) for trace in traces]
    if as_json:
        return print_json({"comparisons": [c.to_json(with_text=text) for c in comparisons]})
    console = stdout()
    for comparison in comparisons:
        _show(console, comparison, text)
    return None


def _show(console: Console, comparison: Any, text: bool) -> None:
    console.rule(f"[bold]{comparison.title}[/bold]", align="left")
    if comparison.empty:
        console.print("no difference")
        return
    if comparison.ops:
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("op")
        for heading in ("before", "after", "change"):
            table.add_column(heading, justify="right")
        for change in comparison.ops:
            delta = change.after - change.before
            colour = "green" if delta > 0 else "red"
            table.add_row(change.op, str(change.before), str(change.after), f"[{colour}]{delta:+d}[/{colour}]")
        console.print(table)
    for rewrite in comparison.rewrites:
        place = f"  {rewrite['file']}:{rewrite['line']}" if rewrite.get("line") else ""
        module = f" in {rewrite['module']}" if rewrite["module"] else ""
        console.print(f"rewrite {rewrite['number']}: {rewrite['what']}{module}{place}", soft_wrap=True)
    for word, regions, colour in (
        ("removed", comparison.removed_in, "red"),
        ("added", comparison.added_in, "green"),
        ("changed", comparison.changed_in, "yellow"),
    ):
        total = sum(regions.values())
        if total:
            console.print(f"[{colour}]{total} nodes {word}[/{colour}]")
            for module, count in list(regions.items())[:20]:
                console.print(f"  {count:5d}  {module or '(the model itself)'}", soft_wrap=True)
            if len(regions) > 20:
                console.print(f"         and {len(regions) - 20} more modules (--json has all)")
    if text and comparison.text:
        console.print(Syntax(comparison.text, "diff", theme="ansi_light", background_color="default", word_wrap=False))

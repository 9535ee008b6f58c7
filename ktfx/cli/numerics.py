"""``ktfx numerics``: errors after each pass, module by module."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ktfx.cli.common import Debug, Exit, Json, guarded, print_json, stdout
from ktfx.cli.debug_options import Dtype, Layers, ModelArgument, Phase, RulesOption, Seed, Simulate, Tiny, Tokens
from ktfx.errors import OptionError

Tolerance = Annotated[
    float | None,
    typer.Option(
        "--tolerance", metavar="X", help="Largest relative error allowed; default: what the dtype's rounding explains."
    ),
]


@guarded
def numerics(
    model: ModelArgument = None,
    rules: RulesOption = None,
    simulate: Simulate = None,
    tolerance: Tolerance = None,
    reference: Annotated[str, typer.Option("--reference", help="float64 or float32.")] = "float64",
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.svg", help="Draw the errors along the model.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every module, not only the worst.")] = False,
    phase: Phase = "prefill",
    tokens: Tokens = 8,
    layers: Layers = None,
    tiny: Tiny = False,
    dtype: Dtype = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the graph after each pass on the same inputs; print the error at each module border. Exit code 1 if over."""
    from ktfx.debug import numerics as tool
    from ktfx.debug.replay import Replay
    from ktfx.debug.session import Setup, run_unrewritten

    if tolerance is not None and not tolerance > 0:
        raise OptionError(f"--tolerance {tolerance:g}", expected="a number above 0")
    session = run_unrewritten(Setup(model, rules, simulate, layers, tiny, dtype, tokens, phase, seed=seed))
    replays = [Replay.of(session.state, g) for g in session.compiled]
    reports = tool.run_numerics(replays, tolerance, reference, session.graphs)
    if plot is not None:
        for number, (_, report) in enumerate(reports):
            path = plot if number == 0 else plot.with_stem(f"{plot.stem}-{number + 1}")
            try:
                path.write_text(tool.plot(report), encoding="utf-8")
            except OSError as error:
                raise OptionError(f"--plot {path} cannot be written: {error}") from None
    if as_json:
        print_json({"graphs": [{"phase": name, **report.to_json()} for name, report in reports]})
    else:
        for name, report in reports:
            _show(name, report, every)
        if plot is not None:
            stdout().print(f"plot: {plot}")
    if any(report.first_over is not None for _, report in reports):
        raise typer.Exit(Exit.NO)


def _show(phase: str, report: Any, every: bool) -> None:
    from ktfx.debug.numerics import summary_rows

    console = stdout()
    rows = report.borders if every else summary_rows(report)
    table = Table(title=f"{phase}: relative error against {report.reference}", title_justify="left", box=None)
    table.add_column("leaves", overflow="fold", min_width=32)
    # A pass that moves no error says nothing that the column before it does not.
    shown = [c for i, c in enumerate(report.columns) if i == 0 or c.errors != report.columns[i - 1].errors]
    for column in shown:
        table.add_column(column.name, justify="right")
    table.add_column("allowed", justify="right", style="dim")
    for border in rows:
        allowed = report.tolerances[border.key]
        cells = []
        for column in shown:
            error = column.errors.get(border.key)
            text = "–" if error is None else f"{error:.1e}"
            cells.append(f"[red]{text}[/red]" if error is not None and error > allowed else text)
        table.add_row(border.key, *cells, f"{allowed:.0e}")
    console.print(table)
    same = [c.name for c in report.columns if c not in shown and c.failed is None]
    if same:
        console.print(f"[dim]as in the column before: {', '.join(same)}[/dim]", soft_wrap=True)
    if len(rows) < len(report.borders):
        console.print(f"[dim]{len(report.borders) - len(rows)} more borders: --all[/dim]")
    if report.fallbacks:
        console.print(f"[dim]the reference ran these in a narrower dtype: {', '.join(report.fallbacks)}[/dim]")
    for column in report.columns:
        if column.failed is not None:
            console.print(f"[red]pass {column.name} failed[/red] in {column.failed_module!r}: {column.failed}")
    found = report.first_over
    if found is None:
        console.print("[green]no pass is over the tolerance[/green]")
    elif report.columns[-1].failed is None or found[0] != report.columns[-1].name:
        name, border, error = found
        console.print(f"[red]first over the tolerance: pass {name}, at {border.key}, error {error:.2e}[/red]")

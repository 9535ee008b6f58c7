"""The ``ktfx`` command. One file a command in this folder; what they share is in ``common``.

Exit codes, for every command:

==== ===========================================================================================
0    the answer is yes, or there was nothing to ask
1    the answer is no: lint found errors, tokens differ from eager's, doctor misses something
2    a command or option that does not exist, or a value that it does not take
3    a rule file that cannot be read or makes no sense
4    a model that cannot be loaded, or not be traced
5    a placement that cannot be: a missing device, one too small, an op that does not fit
70   a fault inside ktfx
130  interrupted
==== ===========================================================================================
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from ktfx.cli import common
from ktfx.cli.bisect import bisect
from ktfx.cli.diff import diff
from ktfx.cli.doctor import doctor
from ktfx.cli.explain import explain
from ktfx.cli.lint import lint
from ktfx.cli.numerics import numerics
from ktfx.cli.passes import passes
from ktfx.cli.pipeline import pipeline
from ktfx.cli.repro import reduce, repro
from ktfx.cli.resolve import resolve
from ktfx.cli.rules import rules
from ktfx.cli.run import run
from ktfx.cli.stats import stats
from ktfx.cli.trace import trace
from ktfx.cli.view import view
from ktfx.cli.why import why

_ABOUT = "Run Mixture-of-Experts models too large for one GPU, over GPUs and host, by the rules in a YAML file."
_CODES = "\n\n".join(f"[cyan]{int(code):>3}[/cyan]  {meaning}" for code, meaning in common.MEANING.items())

app = typer.Typer(
    name="ktfx",
    help=_ABOUT,
    epilog=f"[bold]Exit codes[/bold]\n\n{_CODES}",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for command in (run, explain, resolve, lint, rules, doctor):
    app.command()(command)
for command in (passes, pipeline, trace, diff, view, why, bisect, numerics, stats, repro, reduce):
    app.command(rich_help_panel="Seeing what the passes do")(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ktfx {version('ktfx')}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    app()

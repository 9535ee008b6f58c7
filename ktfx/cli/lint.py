"""``ktfx lint``: what is wrong with a rule file, by itself and against a model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ktfx.cli import common
from ktfx.cli.models import find_model, meta_model

if TYPE_CHECKING:
    from ktfx.lint import Finding


@common.guarded
def lint(
    rules: common.Rules,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="Check against this model too: a directory, a config.json, `demo`, or a published shape.",
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as errors.")] = False,
    as_json: common.Json = False,
    debug: common.Debug = False,
) -> None:
    """Check a rule file: every finding with its line and column, and how to mend it.

    Exit code 0: no errors; 1: errors (with --strict, warnings too); 3: there is no such file; 4: no such model.
    """
    from ktfx.lint import lint as findings_of
    from ktfx.ruleset import load_ruleset, shipped_rulesets

    if not Path(rules).is_file() and rules.removesuffix(".yaml") not in shipped_rulesets():
        load_ruleset(rules)  # raises: no such file
    findings = findings_of(rules, meta_model(find_model(model)) if model is not None else None)
    errors = sum(f.severity == "error" for f in findings)
    if as_json:
        common.print_json([_as_json(f) for f in findings])
    else:
        console = common.stdout()
        for finding in findings:
            console.print(_as_text(finding), soft_wrap=True)
        against = f" against {model}" if model is not None else ""
        if findings:
            warnings = len(findings) - errors
            console.print(
                f"\n{_count(errors, 'error')}, {_count(warnings, 'warning')} in {rules}{against}", soft_wrap=True
            )
        else:
            console.print(Text.assemble(("✓ ", "green"), f"{rules}{against}: nothing to mend"), soft_wrap=True)
    if errors or (strict and findings):
        raise typer.Exit(common.Exit.NO)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _as_json(finding: Finding) -> dict[str, Any]:
    origin = finding.origin
    data = {k: v for k, v in asdict(finding).items() if k != "origin"}
    return {"file": origin.file, "line": origin.line or None, "column": origin.column or None, **data}


def _as_text(finding: Finding) -> Text:
    """file:line:column first, so that editors can jump there."""
    colour = "red" if finding.severity == "error" else "yellow"
    text = Text.assemble((f"{finding.origin}: ", "bold"), (finding.severity, colour), (f" [{finding.code}] ", "dim"))
    if finding.rule:
        text.append(f"{finding.rule}: ")
    text.append(finding.message)
    if finding.mend:
        text.append("\n    mend: ", "green").append(finding.mend)
    return text

"""``ktfx why``: why a rule did not apply."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from ktfx.cli.common import Debug, Exit, Json, ModelOption, guarded, print_json, stdout
from ktfx.cli.debug_options import Layers, Phase, RulesOption, Simulate


@guarded
def why(
    rule: Annotated[
        str | None,
        typer.Argument(metavar="[RULE | PATTERN]", help="A rule's number, or a pattern: 'aten.mul(aten.silu(a), b)'."),
    ] = None,
    rules: RulesOption = None,
    model: ModelOption = "demo",
    module: Annotated[str | None, typer.Option("--module", metavar="PATH", help="The module in question.")] = None,
    simulate: Simulate = "cpu",
    phase: Phase = "prefill",
    layers: Layers = 2,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say which rules were tried on a module and what failed first; or where a rule or pattern comes nearest.

    Module rules need no weights. A pattern is tried on a graph of the model's first layers in small widths. Exit code 1
    if the rule applies nowhere, or not to the module.
    """
    from ktfx.debug import why as tool
    from ktfx.errors import OptionError
    from ktfx.ruleset import load_ruleset

    if rule is None and module is None:
        raise OptionError("nothing to explain", expected="a rule, a pattern, or --module", mend="ktfx why 3 --rules R")
    is_pattern = rule is not None and "(" in rule
    ruleset = load_ruleset(rules) if rules is not None else None
    if ruleset is None and not is_pattern:
        raise OptionError("which rules?", mend="add --rules FILE")
    chosen = tool.find_rule(ruleset, rule) if ruleset is not None and rule is not None and not is_pattern else None
    if is_pattern or (chosen is not None and chosen.pattern is not None):
        pattern = rule if is_pattern else chosen.pattern  # type: ignore[union-attr]
        return _pattern(pattern, rules, model, module, simulate, phase, layers, as_json)
    return _modules(ruleset, chosen, model, module, as_json)


def _modules(ruleset: Any, chosen: Any, name: str, module: str | None, as_json: bool) -> None:
    from ktfx.cli.models import find_model, meta_model
    from ktfx.debug import why as tool
    from ktfx.resolve import resolve

    model = meta_model(find_model(name))
    resolution = resolve(ruleset, model)
    applied = None
    if chosen is not None:
        row, applied = tool.why_rule(ruleset, resolution, model, chosen, module)
        rows = [row]
    else:
        assert module is not None
        rows = tool.tried_rules(ruleset, resolution, model, module)
    placement = resolution.placements[rows[0].module if rows else module or ""]
    result = {
        "module": placement.module,
        "applies_to": applied,
        "placed_by": placement.rule.label if placement.rule else placement.reason,
        "tried": [{**asdict(r), "text": r.text()} for r in rows],
    }
    if as_json:
        print_json(result)
    else:
        console = stdout()
        console.print(
            f"[bold]{placement.module or '(the whole model)'}[/bold]  {placement.cls}, role {placement.role or 'none'}"
        )
        table = Table(box=None, padding=(0, 2, 0, 0))
        for heading in ("rule", "from", "outcome", "first that failed"):
            table.add_column(heading, overflow="fold")
        for r in rows:
            colour = "green" if r.outcome == "applies" else "yellow" if r.outcome == "shadowed" else "red"
            table.add_row(
                r.rule, r.place, f"[{colour}]{r.outcome}[/{colour}]", r.text() if r.outcome != "applies" else ""
            )
        console.print(table)
        if applied is not None:
            console.print(
                f"{chosen.label} applies to {applied} module(s)" + ("" if module else "; shown is the nearest")
            )
        console.print(f"placed by: {result['placed_by']}")
    if chosen is not None and rows[0].outcome != "applies":
        raise typer.Exit(Exit.NO)


def _pattern(
    pattern: Any,
    rules: str | None,
    model: str,
    module: str | None,
    simulate: str | None,
    phase: str,
    layers: int | None,
    as_json: bool,
) -> None:
    from ktfx.debug import why as tool
    from ktfx.debug.session import Setup, run_unrewritten

    setup = Setup(model, rules or {"ktfx": 1, "default_device": "cpu"}, simulate, layers, True, phase=phase, tokens=4)
    graph = run_unrewritten(setup).graphs[0].records[0].graph_before
    assert graph is not None
    answer = tool.why_pattern(graph.graph, pattern, module)
    if as_json:
        print_json({**asdict(answer), "phase": phase})
    else:
        console = stdout()
        console.print(
            f"{len(answer.matches)} matches" + (": " + ", ".join(answer.matches[:8]) if answer.matches else "")
        )
        for line in answer.nearest:
            console.print(line, markup=False, soft_wrap=True)
    if not answer.matches:
        raise typer.Exit(Exit.NO)

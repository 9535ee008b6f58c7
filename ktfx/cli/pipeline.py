"""``ktfx pipeline``: the passes that a rule file comes to, each value with its place."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

from ktfx.cli.common import Debug, Json, Rules, guarded, print_json, stdout


@guarded
def pipeline(rules: Rules, as_json: Json = False, debug: Debug = False) -> None:
    """Print the resolved pipeline of a rule file: every value with the file and line it came from."""
    from ktfx.debug.pipeline import resolved_pipeline, settings
    from ktfx.ruleset import load_ruleset

    steps = resolved_pipeline(rules)
    values = settings(load_ruleset(rules))
    if as_json:
        return print_json({"passes": [asdict(s) for s in steps], "settings": [asdict(v) for v in values]})
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("", "pass", "value", "from"):
        table.add_column(heading, justify="right" if not heading else "left")
    for step in steps:
        table.add_row(str(step.number), f"[cyan]{step.name}[/cyan]", "", step.origin)
        for value in step.options:
            table.add_row("", f"  {value.name}", repr(value.value), value.origin)
    for value in values:
        table.add_row("", f"[dim]{value.name}[/dim]", repr(value.value), value.origin)
    stdout().print(table)
    return None

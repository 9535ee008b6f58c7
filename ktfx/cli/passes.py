"""``ktfx passes``: every pass there is, where it stands, and what it takes."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from ktfx.cli.common import Debug, Json, guarded, print_json, stdout


@guarded
def passes(as_json: Json = False, debug: Debug = False) -> None:
    """List every registered pass: file, options, what it requires, and whether it preserves the numerics."""
    from ktfx.debug.pipeline import pass_rows

    rows = pass_rows()
    if as_json:
        return print_json([asdict(row) for row in rows])
    console = stdout()
    for row in rows:
        marks = ["required" if row.required else "in the default pipeline" if row.in_default else "on request"]
        marks.append("preserves numerics" if row.numerics_preserving else "changes numerics")
        marks += [f"requires {', '.join(row.requires)}"] if row.requires else []
        marks += [f"provides {', '.join(row.provides)}"] if row.provides else []
        console.print(
            Text.assemble((row.name, "bold cyan"), f"  {row.file}:{row.line}  ", ("; ".join(marks), "dim")),
            soft_wrap=True,
        )
        console.print(Text("  " + row.summary))
        if row.options:
            table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
            for option in row.options:
                table.add_row(f"    {option.name}", option.type, f"= {option.default!r}", option.description)
            console.print(table)
    return None

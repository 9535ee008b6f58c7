"""``ktfx stats``: what a compile cost, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ktfx.cli.common import Debug, Json, guarded, print_json, stdout
from ktfx.cli.debug_options import Backend, Dtype, Layers, ModelArgument, Phase, RulesOption, Simulate, Tiny, Tokens


@guarded
def stats(
    model: ModelArgument = None,
    rules: RulesOption = None,
    simulate: Simulate = None,
    phase: Phase = "both",
    tokens: Tokens = 8,
    layers: Layers = None,
    tiny: Tiny = False,
    dtype: Dtype = None,
    backend: Backend = "inductor",
    save: Annotated[
        Path | None, typer.Option("--save", metavar="FILE", help="Keep the numbers and cache keys.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="FILE", help="Say which part of a key differs from that run's.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Matches per rule, time per pass, compile time per partition, cache hits and misses, and why a key was missed."""
    from ktfx.debug.session import Setup, run
    from ktfx.debug.stats import session_stats, watching_cache

    earlier = _earlier(against) if against is not None else None
    with watching_cache() as cache:
        session = run(Setup(model, rules, simulate, layers, tiny, dtype, tokens, phase, backend))
    result = session_stats(session, cache, earlier)
    if save is not None:
        save.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if as_json:
        return print_json(result)
    for graph in result["graphs"]:
        _show(graph)
    use = result["inductor_cache"]
    console = stdout()
    console.print(f"Inductor's cache: {use['hits']} hits, {use['misses']} misses, {use['bypasses']} bypasses")
    for miss in result.get("missed_because", []):
        parts = ", ".join(d["part"] for d in miss["differs_in"]) or "nothing: the entry was evicted"
        console.print(f"lookup {miss['lookup']} was not in {against}: differs in {parts}", soft_wrap=True)
    return None


def _earlier(path: Path) -> dict[str, Any]:
    from ktfx.errors import OptionError

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(data["inductor_cache"]["lookups"], list)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise OptionError(
            f"{path} holds no saved stats: {error}", mend="write one with ktfx stats --save FILE"
        ) from None
    return dict(data)


def _show(graph: dict[str, Any]) -> None:
    console = stdout()
    console.rule(f"[bold]{graph['phase']}[/bold]", align="left")
    console.print(", ".join(f"{k} {v * 1e3:.0f} ms" for k, v in graph["seconds"].items()))
    _table(graph["rules"], ("rule", "origin", "modules", "rewrites", "misses"))
    _table(graph["passes"], ("name", "seconds", "rewrites", "misses"))
    _table(
        [{**p, "key": p["key"][:8]} for p in graph["partitions"]],
        ("key", "device", "nodes", "used_by", "compile_seconds"),
    )
    console.print(
        f"{graph['units']} units, {graph['shared']} of them shared; {graph['transfers']} transfers, "
        f"{graph['transfer_bytes']} bytes a call"
    )


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if rows and isinstance(rows[0][column], (int, float)) else "left")
    for row in rows:
        table.add_row(*(f"{row[c] * 1e3:.1f} ms" if "seconds" in c else str(row[c]) for c in columns))
    stdout().print(table)

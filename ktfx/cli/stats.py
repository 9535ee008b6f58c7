"""``ktfx stats``: what a compile cost, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ktfx.cli.common import Debug, Json, guarded, print_json, stdout
from ktfx.cli.debug_options import Backend, Dtype, Layers, ModelArgument, Phase, RulesOption, Simulate, Tiny, Tokens
from ktfx.errors import OptionError

_MOST_PARTS = 6


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
    pack_cache: Annotated[
        Path | None, typer.Option("--pack-cache", metavar="DIR", help="Where packed experts are kept between runs.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Matches per rule, time per pass, compile time per partition, cache hits and misses, and why a key was missed."""
    from ktfx.debug import stats as tool
    from ktfx.debug.session import Setup, run

    remembered = tool.remembered_keys()
    then = _earlier(against) if against is not None else remembered
    if save is not None and not save.parent.is_dir():
        raise OptionError(f"--save {save}: there is no directory {save.parent}")
    with tool.watching_cache() as cache:
        setup = Setup(model, rules, simulate, layers, tiny, dtype, tokens, phase, backend)
        session = run(setup, pack_cache=pack_cache)
    result = tool.session_stats(session, cache, then)
    tool.remember_keys(cache.lookups, remembered)
    if save is not None:
        save.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if as_json:
        return print_json(result)
    for graph in result["graphs"]:
        _show(graph)
    _show_caches(result, against)
    return None


def _show_caches(result: dict[str, Any], against: Path | None) -> None:
    console = stdout()
    own, use, packs = result["compile_sharing"], result["inductor_cache"], result["pack_cache"]
    console.print(
        f"compiled once, used again: {own['units']} units, {own['compiled']} compiled in {own['seconds']:.1f} s, "
        f"{own['reused']} reused, which saved {own['seconds_saved']:.1f} s",
        soft_wrap=True,
    )
    console.print(
        f"Inductor's cache: {use['hits']} hits, {use['misses']} misses, {use['bypasses']} bypasses"
        + (f", {use['whole']} answered by AOTAutograd's before it" if use["whole"] else "")
    )
    for miss in result["missed_because"]:
        console.print(f"lookup {miss['lookup']} was missed: {_why(miss, against)}", soft_wrap=True, markup=False)
    if packs is not None:
        console.print("packed experts on disk: " + ", ".join(f"{k} {v}" for k, v in packs.items()), soft_wrap=True)


def _why(miss: dict[str, Any], against: Path | None) -> str:
    if miss["nearest"] is None:
        return "the first of its kind in this cache, as far as `ktfx stats` has seen"
    where = "an earlier lookup of this run" if miss["this_run"] else str(against or "an earlier run")
    if not miss["differs_in"]:
        return f"{where} had this very key: its entry is gone"
    parts = [d["part"] for d in miss["differs_in"]]
    more = f" and {len(parts) - _MOST_PARTS} more parts" if len(parts) > _MOST_PARTS else ""
    return f"the nearest key, of {where}, differs in " + ", ".join(parts[:_MOST_PARTS]) + more


def _earlier(path: Path) -> list[Any]:
    from ktfx.debug.stats import lookups_from

    try:
        return lookups_from(json.loads(path.read_text(encoding="utf-8"))["inductor_cache"]["lookups"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptionError(
            f"{path} holds no saved stats: {error}", mend="write one with ktfx stats --save FILE"
        ) from None


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

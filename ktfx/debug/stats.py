"""What a compile cost and where: matches per rule, time per pass and partition, the caches, and why one missed."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ktfx.debug.session import Session
from ktfx.state import GraphReport, ModelState

_PART = re.compile(r"^\[(\w+)\] ([^:]+): (.*)$", re.DOTALL)


@dataclass
class CacheLookup:
    """One look into Inductor's cache of compiled graphs.

    parts: name of each part of the key → its digest and text. outcome: ``hit``, ``miss`` or ``bypass``.
    """

    key: str
    parts: dict[str, tuple[str, str]]
    outcome: str = "miss"


@dataclass
class CacheUse:
    """Inductor's cache over one session: counters, and each key that was looked up, in order.

    whole: partitions that AOTAutograd's own cache answered, before Inductor's was asked.
    """

    hits: int = 0
    misses: int = 0
    bypasses: int = 0
    whole: int = 0
    lookups: list[CacheLookup] = field(default_factory=list)


_COUNTERS = {"hits": "fxgraph_cache_hit", "misses": "fxgraph_cache_miss", "bypasses": "fxgraph_cache_bypass"}


@contextlib.contextmanager
def watching_cache() -> Iterator[CacheUse]:
    """Count the lookups inside the block and keep their keys."""
    from torch._dynamo.utils import counters
    from torch._inductor import codecache

    use = CacheUse()

    def counted() -> dict[str, int]:
        now = {name: counters["inductor"][key] for name, key in _COUNTERS.items()}
        return {**now, "whole": counters["aot_autograd"]["autograd_cache_hit"]}

    before = at_last = counted()
    original = codecache.compiled_fx_graph_hash

    def settle() -> None:
        """Torch counts a lookup's outcome after it made the key: by the next one it is known."""
        nonlocal at_last
        now = counted()
        if use.lookups:
            kinds = {"hit": "hits", "bypass": "bypasses"}
            use.lookups[-1].outcome = next((k for k, name in kinds.items() if now[name] > at_last[name]), "miss")
        at_last = now

    def kept(*args: Any, **kwargs: Any) -> Any:
        settle()
        key, lines = original(*args, **kwargs)
        use.lookups.append(CacheLookup(key, _parts(lines)))
        return key, lines

    codecache.compiled_fx_graph_hash = kept
    try:
        yield use
    finally:
        codecache.compiled_fx_graph_hash = original
        settle()
        for name, value in counted().items():
            setattr(use, name, value - before[name])


def _parts(lines: Sequence[str]) -> dict[str, tuple[str, str]]:
    parts: dict[str, tuple[str, str]] = {}
    for line in lines:
        found = _PART.match(line)
        if found:
            parts[found[2]] = (found[1], found[3][:400])
    return parts


@dataclass(frozen=True)
class KeyDifference:
    """A part of a cache key that was not as before. before, after: its text, cut; None if it was not there."""

    part: str
    before: str | None
    after: str | None


def key_differences(before: CacheLookup, after: CacheLookup) -> list[KeyDifference]:
    """Which parts of two keys differ; the graph's own code comes first."""
    names = [*before.parts, *(n for n in after.parts if n not in before.parts)]
    different = [n for n in names if before.parts.get(n, ("", ""))[0] != after.parts.get(n, ("", ""))[0]]
    return [
        KeyDifference(
            n, before.parts[n][1] if n in before.parts else None, after.parts[n][1] if n in after.parts else None
        )
        for n in sorted(different, key=lambda n: n != "gm")
    ]


def missed_because(now: Sequence[CacheLookup], then: Sequence[CacheLookup]) -> list[dict[str, Any]]:
    """For each miss of now: the same key earlier in this run, or the nearest of earlier runs, and what differs.

    nearest is None where there is nothing to compare with; differs_in is empty where the key itself was known, so that
    its entry is gone.
    """
    result = []
    for number, lookup in enumerate(now):
        if lookup.outcome != "miss":
            continue
        same = next((old for old in now[:number] if old.key == lookup.key), None)
        nearest = same or min(then, key=lambda old: len(key_differences(old, lookup)), default=None)
        differences = [asdict(d) for d in key_differences(nearest, lookup)] if nearest is not None else []
        result.append(
            {
                "lookup": number,
                "key": lookup.key,
                "nearest": nearest.key if nearest is not None else None,
                "this_run": same is not None,
                "differs_in": differences,
            }
        )
    return result


# ---- the keys of earlier runs, kept beside the cache that they explain

_KEYS = "ktfx_keys.json"
_MOST_KEYS = 256


def remembered_keys() -> list[CacheLookup]:
    """The keys that earlier ``ktfx stats`` runs looked up in this cache directory, the latest first."""
    try:
        return lookups_from(json.loads(_keys_file().read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return []  # none yet, or of another version: then there is nothing to compare with


def remember_keys(lookups: Sequence[CacheLookup], earlier: Sequence[CacheLookup]) -> None:
    """Keep the keys of this run and of those before it, written whole or not at all."""
    kept = {lookup.key: lookup for lookup in [*reversed(lookups), *earlier]}
    entries = [asdict(lookup) for lookup in list(kept.values())[:_MOST_KEYS]]
    path = _keys_file()
    draft = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(entries) + "\n", encoding="utf-8")
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)  # a cache directory that cannot be written to explains nothing later


def _keys_file() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / _KEYS


def lookups_from(entries: Sequence[Mapping[str, Any]]) -> list[CacheLookup]:
    """Lookups as ``--json`` prints them."""
    return [
        CacheLookup(e["key"], {k: (v[0], v[1]) for k, v in e["parts"].items()}, e.get("outcome", "miss"))
        for e in entries
    ]


def graph_stats(graph: GraphReport, state: ModelState) -> dict[str, Any]:
    """One compiled graph."""
    applied = Counter(r.rule or "(no rule)" for record in graph.records for r in record.rewrites if r.before or r.rule)
    missed = Counter(m.rule or "(no rule)" for record in graph.records for m in record.misses)
    placed = Counter(p.rule.label for p in state.resolution.placements.values() if p.rule is not None)
    rules = [
        {
            "rule": rule.label,
            "origin": str(rule.origin),
            "modules": placed[rule.label],
            "rewrites": applied[rule.label],
            "misses": missed[rule.label],
        }
        for rule in state.ruleset.rules
    ]
    units = [
        {
            "key": done.key,
            "device": unit.device,
            "nodes": done.nodes,
            "used_by": done.shared,
            "compile_seconds": done.seconds,
        }
        for unit, done in _first_use(graph)
    ]
    return {
        "phase": graph.phase,
        "seconds": graph.seconds,
        "rules": rules,
        "passes": [
            {"name": r.name, "seconds": r.seconds, "rewrites": len(r.rewrites), "misses": len(r.misses)}
            for r in graph.records
        ],
        "partitions": units,
        "units": len(graph.built.units),
        "shared": len(graph.built.units) - len(units),
        "transfers": len(graph.transfers()),
        "transfer_bytes": sum(n for _, _, n in graph.transfers()),
    }


def _first_use(graph: GraphReport) -> list[tuple[Any, Any]]:
    seen: dict[int, tuple[Any, Any]] = {}
    for unit, done in zip(graph.built.units, graph.built.compiled, strict=True):
        seen.setdefault(id(done), (unit, done))
    return list(seen.values())


def sharing(graphs: Sequence[GraphReport]) -> dict[str, Any]:
    """ktfx's own compile cache: equal units of a graph are compiled once.

    units: asked for; compiled: distinct ones; reused: the rest; seconds, seconds_saved: what compiling took, and would
    have taken more without sharing; again: units that two graphs compiled each for itself.
    """
    distinct = [(unit, done) for graph in graphs for unit, done in _first_use(graph)]
    units = sum(len(graph.built.units) for graph in graphs)
    return {
        "units": units,
        "compiled": len(distinct),
        "reused": units - len(distinct),
        "seconds": sum(done.seconds for _, done in distinct),
        "seconds_saved": sum(done.seconds * (done.shared - 1) for _, done in distinct),
        "again": len(distinct) - len({done.key for _, done in distinct}),
    }


def session_stats(session: Session, cache: CacheUse, then: Sequence[CacheLookup] = ()) -> dict[str, Any]:
    """What ``ktfx stats --json`` prints. then: keys of earlier runs, to say why entries were missed."""
    packs = session.state.store.pack_cache
    return {
        "graphs": [graph_stats(g, session.state) for g in session.graphs],
        "compile_sharing": sharing(session.graphs),
        "inductor_cache": {
            "hits": cache.hits,
            "misses": cache.misses,
            "bypasses": cache.bypasses,
            "whole": cache.whole,
            "lookups": [asdict(lookup) for lookup in cache.lookups],
        },
        "missed_because": missed_because(cache.lookups, then),
        "pack_cache": packs.report() if packs is not None else None,
    }

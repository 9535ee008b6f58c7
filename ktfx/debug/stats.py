"""What a compile cost and where: matches per rule, time per pass and partition, Inductor's cache, and why it missed."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ktfx.debug.session import Session
from ktfx.state import GraphReport, ModelState

_PART = re.compile(r"^\[(\w+)\] ([^:]+): (.*)$", re.DOTALL)


@dataclass
class CacheLookup:
    """One look into Inductor's cache of compiled graphs. parts: name of each part of the key → its digest and text."""

    key: str
    parts: dict[str, tuple[str, str]]


@dataclass
class CacheUse:
    """Inductor's cache over one session: counters, and each key that was looked up, in order."""

    hits: int = 0
    misses: int = 0
    bypasses: int = 0
    lookups: list[CacheLookup] = field(default_factory=list)


@contextlib.contextmanager
def watching_cache() -> Iterator[CacheUse]:
    """Count the lookups inside the block and keep their keys."""
    from torch._dynamo.utils import counters
    from torch._inductor import codecache

    use = CacheUse()
    names = {"hits": "fxgraph_cache_hit", "misses": "fxgraph_cache_miss", "bypasses": "fxgraph_cache_bypass"}
    before = {name: counters["inductor"][key] for name, key in names.items()}
    original = codecache.compiled_fx_graph_hash

    def kept(*args: Any, **kwargs: Any) -> Any:
        key, lines = original(*args, **kwargs)
        use.lookups.append(CacheLookup(key, _parts(lines)))
        return key, lines

    codecache.compiled_fx_graph_hash = kept
    try:
        yield use
    finally:
        codecache.compiled_fx_graph_hash = original
        for name, key in names.items():
            setattr(use, name, counters["inductor"][key] - before[name])


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
    """For each key of now that an earlier run did not have: the nearest key it had, and the parts that differ."""
    known = {lookup.key for lookup in then}
    result = []
    for number, lookup in enumerate(now):
        if lookup.key in known or not then:
            continue
        nearest = min(then, key=lambda old: len(key_differences(old, lookup)))
        differences = [asdict(d) for d in key_differences(nearest, lookup)]
        result.append({"lookup": number, "key": lookup.key, "nearest": nearest.key, "differs_in": differences})
    return result


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


def session_stats(session: Session, cache: CacheUse, earlier: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What ``ktfx stats --json`` prints. earlier: such an object of another run, to say why its entries were missed."""
    result: dict[str, Any] = {
        "graphs": [graph_stats(g, session.state) for g in session.graphs],
        "inductor_cache": {
            "hits": cache.hits,
            "misses": cache.misses,
            "bypasses": cache.bypasses,
            "lookups": [asdict(lookup) for lookup in cache.lookups],
        },
    }
    if earlier is not None:
        then = [
            CacheLookup(e["key"], {k: (v[0], v[1]) for k, v in e["parts"].items()})
            for e in earlier["inductor_cache"]["lookups"]
        ]
        result["missed_because"] = missed_because(cache.lookups, then)
    return result

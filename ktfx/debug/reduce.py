"""A failing setup made smaller, one thing at a time, as long as it fails in the same way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ktfx.debug.failure import Failure
from ktfx.debug.repro import failure_of, rules_data
from ktfx.debug.session import Setup
from ktfx.errors import KtfxError, OptionError


@dataclass(frozen=True)
class Attempt:
    """One try. kept: it failed in the same way. why: what happened instead."""

    change: str
    kept: bool
    why: str


def reduce(
    setup: Setup,
    pattern: str,
    progress: Callable[[Attempt], None] | None = None,
    run: Callable[[Setup], Failure | None] | None = None,
) -> tuple[Setup, Failure, list[Attempt]]:
    """The smallest setup found. pattern: searched in ``kind: message``. OptionError if it does not fail so at first.

    Tried in turn until nothing helps: small widths, half the layers, one layer less, half the prompt, prefill alone,
    partitions uncompiled, each rule left out, each pass left out.
    """
    wanted = re.compile(pattern)
    run = run or _failure
    attempts: list[Attempt] = []

    def fails(candidate: Setup) -> tuple[Failure | None, str]:
        try:
            failure = run(candidate)
        except KtfxError as error:
            return None, f"{type(error).__name__}: {error.what}"
        if failure is None:
            return None, "it did not fail"
        return (failure, "") if wanted.search(failure.text) else (None, failure.text)

    found, why = fails(setup)
    if found is None:
        raise OptionError(f"the repro does not fail as it did: {why}", expected=f"an error that matches {pattern!r}")
    settled = False
    while not settled:
        settled = True
        for change, candidate in _smaller(setup):
            failure, why = fails(candidate)
            attempt = Attempt(change, failure is not None, why)
            attempts.append(attempt)
            if progress is not None:
                progress(attempt)
            if failure is not None:
                setup, found, settled = candidate, failure, False
                break
    return setup, found, attempts


def _failure(setup: Setup) -> Failure | None:
    found = failure_of(setup)
    return found[0] if found is not None else None


def _smaller(setup: Setup) -> Iterator[tuple[str, Setup]]:
    if not setup.tiny:
        yield "small widths", replace(setup, tiny=True)
    if setup.layers is None:
        yield "two layers", replace(setup, layers=2)
    else:
        for count in dict.fromkeys((setup.layers // 2, setup.layers - 1)):
            if 1 <= count < setup.layers:
                yield f"{count} layers", replace(setup, layers=count)
    if setup.phase == "both":
        yield "prefill alone", replace(setup, phase="prefill")
    if setup.backend != "eager":
        yield "partitions uncompiled", replace(setup, backend="eager")
    if setup.tokens > 2:
        yield f"{max(2, setup.tokens // 2)} tokens", replace(setup, tokens=max(2, setup.tokens // 2))
    if setup.rules is not None:
        for change, rules in fewer_rules(rules_data(setup)):
            yield change, replace(setup, rules=rules)


def fewer_rules(data: Any) -> Iterator[tuple[str, Any]]:
    """(change, rules) with one rule or one pass left out."""
    if isinstance(data, list):
        for number in range(len(data)):
            yield f"without rule {number + 1}", [r for i, r in enumerate(data) if i != number]
        return
    for key, word in (("rules", "rule"), ("passes", "pass")):
        entries = data.get(key) or []
        for number, entry in enumerate(entries):
            left = [e for i, e in enumerate(entries) if i != number]
            name = entry if isinstance(entry, str) else next(iter(entry)) if key == "passes" else number + 1
            yield f"without {word} {name}", {**data, key: left}

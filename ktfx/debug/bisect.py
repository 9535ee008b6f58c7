"""Down to one rewrite: which of the numbered rewrites makes the result wrong.

First over the optional passes (``KTFX_BISECT_PASSES=N`` runs the first N), then over the rewrites of the guilty pass
(``KTFX_BISECT_LIMIT=N`` runs the first N). Each step halves what is left, so n rewrites take about log2(n) runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ktfx.debug.replay import PassFailure, Replay, Replayed, tolerance_for
from ktfx.errors import OptionError
from ktfx.pass_manager import REQUIRED, Rewrite, build_pipeline
from ktfx.verify import relative_error

_LINE = re.compile(r"^ktfx bisect: (?:NOT )?running (rewrite|pass) \((\d+)\) (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Verdict:
    """What the oracle said of one run. passes, rewrites: how many there were in all, run or not."""

    good: bool
    why: str
    passes: int
    rewrites: int
    described: dict[int, str] = field(default_factory=dict)


Oracle = Callable[[int | None, int | None], Verdict]
"""(rewrites to run, optional passes to run; None is all) → a verdict."""


@dataclass(frozen=True)
class Probe:
    """One run of the search."""

    limit: int | None
    passes: int | None
    good: bool
    why: str
    seconds: float


@dataclass
class Found:
    """The answer. number: the rewrite; None if the pass has no counted rewrites, or no optional pass is to blame.

    pass_number, pass_name: the optional pass; None if the result is wrong with all of them off.
    """

    number: int | None
    what: str
    pass_number: int | None
    pass_name: str | None
    total: int
    probes: list[Probe]
    rewrite: Rewrite | None = None

    @property
    def variables(self) -> dict[str, str]:
        """The environment that still shows the fault and runs nothing after it."""
        if self.number is not None:
            return {"KTFX_BISECT_LIMIT": str(self.number)}
        return {"KTFX_BISECT_PASSES": str(self.pass_number or 0)}

    @property
    def variables_before(self) -> dict[str, str] | None:
        """The environment of the last good run; None if there is none."""
        if self.number is not None:
            return {"KTFX_BISECT_LIMIT": str(self.number - 1)}
        return {"KTFX_BISECT_PASSES": str(self.pass_number - 1)} if self.pass_number else None


def bisect(oracle: Oracle, progress: Callable[[Probe], None] | None = None) -> Found:
    """Search with an oracle. Raises OptionError if everything on is good: there is nothing to find."""
    probes: list[Probe] = []

    def ask(limit: int | None, passes: int | None) -> Verdict:
        start = time.perf_counter()
        verdict = oracle(limit, passes)
        probe = Probe(limit, passes, verdict.good, verdict.why, time.perf_counter() - start)
        probes.append(probe)
        if progress is not None:
            progress(probe)
        return verdict

    everything = ask(None, None)
    if everything.good:
        raise OptionError(
            f"with every rewrite on, the result is good: {everything.why}",
            expected="a failing command, or an error above the tolerance",
            mend="lower --tolerance, or give the command that fails",
        )
    nothing = ask(0, 0)
    if not nothing.good:
        return Found(None, nothing.why, None, None, everything.rewrites, probes)
    first_pass = _first_bad(everything.passes, lambda n: not ask(None, n).good) if everything.passes > 1 else 1
    before = ask(None, first_pass - 1).rewrites if first_pass > 1 else 0
    upto = ask(None, first_pass).rewrites if first_pass < everything.passes else everything.rewrites
    name = everything.described.get(-first_pass, "")
    # A pass that is wrong before its first counted rewrite (or counts none) is named as a whole.
    if upto <= before or not ask(before, first_pass).good:
        return Found(None, everything.why, first_pass, name, everything.rewrites, probes)
    number = _first_bad(upto, lambda n: not ask(n, first_pass).good, before)
    return Found(number, everything.described.get(number, ""), first_pass, name, everything.rewrites, probes)


def _first_bad(count: int, bad: Callable[[int], bool], good: int = 0) -> int:
    """The smallest n in (good, count] that is bad, where ``good`` is known good and ``count`` bad."""
    while count - good > 1:
        middle = (good + count) // 2
        if bad(middle):
            count = middle
        else:
            good = middle
    return count


# ---- oracle: the graph's own numbers


def numerics_oracle(replay: Replay, tolerance: float | None = None) -> tuple[Oracle, Callable[[], Replayed | None]]:
    """The rewritten graph's outputs against the captured graph's, on the inputs of the first call.

    Nothing is compiled and no model code runs, so a probe costs one run of the passes and one of the graph. Weights
    that were quantised stand dequantised on both sides. A pass that raises is a bad run. The second value gives the
    last run of the passes with everything on.
    """
    names = [p.name for p in build_pipeline(replay.state.ruleset.passes) if p.name not in REQUIRED]
    reference: dict[frozenset[str], Sequence[Any]] = {}
    full: list[Replayed] = []

    def oracle(limit: int | None, passes: int | None) -> Verdict:
        described = {-i: n for i, n in enumerate(names, 1)}
        try:
            run = replay.run(limit=limit if limit is not None else 1 << 60, passes=passes, keep_graphs=False)
        except PassFailure as failure:
            counted = _counted(failure.log)
            why = str(failure.error).splitlines()[0]
            return Verdict(False, why, len(names), counted[0], {**described, **counted[1]})
        if limit is None and passes is None:
            full.append(run)
        counted = _counted(run.log)
        substitutes = replay.dequantised(run.context)
        key = frozenset(substitutes)
        if key not in reference:
            reference[key] = outputs_of(replay, replay.captured_graph, run, substitutes)
        got = outputs_of(replay, run.final, run, substitutes)
        worst, limit_of = worst_error(got, reference[key], run, tolerance)
        why = f"largest error {worst:.2e}, tolerance {limit_of:.0e}"
        return Verdict(worst <= limit_of, why, len(names), run.count, {**described, **counted[1]})

    return oracle, lambda: full[-1] if full else None


def outputs_of(replay: Replay, gm: fx.GraphModule, run: Replayed, substitutes: dict[str, Any]) -> Sequence[Any]:
    with torch.no_grad():
        return list(fx.Interpreter(gm).run(*replay.arguments(gm, run.context, substitutes)))


def worst_error(got: Sequence[Any], want: Sequence[Any], run: Replayed, tolerance: float | None) -> tuple[float, float]:
    """(largest relative error, the tolerance it is held to); an output's excess counts by its own dtype's tolerance."""
    worst, held = 0.0, tolerance if tolerance is not None else tolerance_for(want, run.context)
    for a, b in zip(got, want, strict=True):
        if isinstance(b, torch.Tensor):
            worst = max(worst, relative_error(a, b))
    return worst, held


def _counted(text: str) -> tuple[int, dict[int, str]]:
    """(rewrites counted, number → text, −number → pass) from the lines that a limited run prints."""
    described: dict[int, str] = {}
    most = 0
    for kind, number, rest in _LINE.findall(text):
        if kind == "rewrite":
            most = max(most, int(number))
            described[int(number)] = rest
        else:
            described[-int(number)] = rest
    return most, described


# ---- oracle: a command's exit code


def command_oracle(command: Sequence[str], timeout: float | None = None) -> Oracle:
    """Good is exit code 0. The command must compile with ktfx in its own process and leave its stdout readable."""

    def oracle(limit: int | None, passes: int | None) -> Verdict:
        environment = dict(os.environ)
        # Every run is limited, if only by a number none reaches: that makes ktfx print and count its rewrites.
        environment["KTFX_BISECT_LIMIT"] = str(limit if limit is not None else 1 << 60)
        environment["KTFX_BISECT_PASSES"] = str(passes if passes is not None else 1 << 60)
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return Verdict(False, f"no answer in {timeout:g} s", 0, 0)
        except OSError as error:
            raise OptionError(f"cannot run {command[0]!r}: {error}", mend="give the command after `--`") from None
        rewrites, described = _counted(done.stdout + done.stderr)
        passes_seen = max((-n for n in described if n < 0), default=0)
        return Verdict(done.returncode == 0, f"exit code {done.returncode}", passes_seen, rewrites, described)

    return oracle

"""Down to one rewrite: which of the numbered rewrites makes the result wrong.

First over the optional passes (``KTFX_BISECT_PASSES=N`` runs the first N), then over the rewrites of the guilty pass
(``KTFX_BISECT_LIMIT=N`` runs the first N). Both are numbered over all graphs of a run, prefill's before decode's. Each
step halves what is left, so n rewrites take about log2(n) runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ktfx.debug.replay import Checkpoint, PassFailure, Replay, Replayed, tolerance_for
from ktfx.errors import OptionError
from ktfx.pass_manager import RunCount
from ktfx.state import GraphReport
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

    pass_number, pass_name: the optional pass; None if the result is wrong with all of them off. phase: its graph's.
    """

    number: int | None
    what: str
    pass_number: int | None
    pass_name: str | None
    total: int
    probes: list[Probe]
    phase: str | None = None

    @property
    def variables(self) -> dict[str, str]:
        """The environment that still shows the fault and runs nothing after it."""
        passes = {"KTFX_BISECT_PASSES": str(self.pass_number or 0)}
        return passes if self.number is None else {"KTFX_BISECT_LIMIT": str(self.number), **passes}

    @property
    def variables_before(self) -> dict[str, str] | None:
        """The environment of the last good run; None if there is none."""
        if self.number is not None:
            return {"KTFX_BISECT_LIMIT": str(self.number - 1), "KTFX_BISECT_PASSES": str(self.pass_number)}
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
    if not everything.passes and not everything.rewrites:
        raise OptionError(
            f"it is wrong ({everything.why}), but no optional pass or rewrite was counted",
            expected="a run that compiles a model with ktfx, with rewrites to leave out",
            mend="look at what it prints with KTFX_BISECT_LIMIT=1000000; `ktfx pipeline RULES` shows its passes",
        )
    nothing = ask(0, 0)
    if not nothing.good:
        return Found(None, nothing.why, None, None, everything.rewrites, probes)
    first_pass = _first_bad(everything.passes, lambda n: not ask(None, n).good) if everything.passes > 1 else 1
    before = ask(None, first_pass - 1).rewrites if first_pass > 1 else 0
    upto = ask(None, first_pass).rewrites if first_pass < everything.passes else everything.rewrites
    name, phase = _name_and_phase(everything.described.get(-first_pass, ""))
    # A pass that is wrong before its first counted rewrite (or counts none) is named as a whole.
    if upto <= before or not ask(before, first_pass).good:
        return Found(None, everything.why, first_pass, name, everything.rewrites, probes, phase)
    number = _first_bad(upto, lambda n: not ask(n, first_pass).good, before)
    what = everything.described.get(number, "")
    return Found(number, what, first_pass, name, everything.rewrites, probes, phase)


def _name_and_phase(text: str) -> tuple[str, str | None]:
    """``plant in prefill`` → its two parts."""
    name, found, phase = text.rpartition(" in ")
    return (name, phase) if found else (text, None)


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


def numerics_oracle(
    replays: Sequence[Replay], tolerance: float | None = None, judged: Sequence[GraphReport] | None = None
) -> Oracle:
    """The rewritten graphs' outputs against the captured graphs', on the inputs of their first calls.

    replays: every graph of the run, in the order of the compiles, for numbers count through all of them. judged: the
    graphs whose outputs count; None is all. Nothing is compiled and no model code runs. A run starts where the first
    one was after the last pass that it does not touch, so it costs the passes from there and one run of the graph. A
    pass that raises is a bad run. Weights that were quantised stand dequantised on both sides.
    """
    trials = [_GraphTrials(r, tolerance, judged is None or r.report in judged) for r in replays]

    def oracle(limit: int | None, passes: int | None) -> Verdict:
        count = RunCount()
        everything = limit is None and passes is None
        described: dict[int, str] = {}
        said: list[str] = []
        good = True
        for trial in trials:
            outcome = trial.ask(limit, passes, count)
            described |= outcome.described
            if outcome.judged or not outcome.good:
                said.append(f"{trial.replay.report.phase}: {outcome.why}")
            if not outcome.good and not everything:
                # What comes later is over every number asked for, or was not reached.
                return Verdict(False, said[-1], count.passes, count.rewrites, described)
            good = good and outcome.good
        return Verdict(good, "; ".join(said), count.passes, count.rewrites, described)

    return oracle


@dataclass(frozen=True)
class _Outcome:
    good: bool
    why: str
    counted: RunCount
    judged: bool
    described: dict[int, str] = field(default_factory=dict)


class _GraphTrials:
    """The runs of one graph: equal ones are made once, and all start from where the first was."""

    def __init__(self, replay: Replay, tolerance: float | None, judged: bool) -> None:
        self.replay, self.tolerance, self.judged = replay, tolerance, judged
        self.checkpoints: list[Checkpoint] = []
        self.known: dict[tuple[int, int], _Outcome] = {}
        self.total: RunCount | None = None
        self.reference: dict[frozenset[str], Sequence[Any]] = {}

    def ask(self, limit: int | None, passes: int | None, count: RunCount) -> _Outcome:
        """One verdict. count: what earlier graphs have counted; this graph's numbers are added."""
        of_limit = _left(limit, count.rewrites, self.total.rewrites if self.total else None)
        of_passes = _left(passes, count.passes, self.total.passes if self.total else None)
        found = self.known.get((of_limit, of_passes))
        if found is None:
            before = replace(count)
            found = self.known[of_limit, of_passes] = self._run(before, of_limit, of_passes)
            if self.total is None and limit is None and passes is None:
                self.total = found.counted
                # Asked again with numbers instead of None, this is the same run.
                self.known[found.counted.rewrites, found.counted.passes] = found
        count.passes += found.counted.passes
        count.rewrites += found.counted.rewrites
        return found

    def _run(self, before: RunCount, limit: int, passes: int) -> _Outcome:
        first = not self.known
        possible = [c for c in self.checkpoints if c.counted.rewrites <= limit and c.counted.passes <= passes]
        count = replace(before)
        try:
            run = self.replay.run(
                limit=before.rewrites + limit,
                passes=before.passes + passes,
                keep_graphs=False,
                count=count,
                checkpoint=self.checkpoints.append if first else None,
                resume=possible[-1] if possible else None,
            )
        except PassFailure as failure:
            counted = RunCount(count.passes - before.passes, count.rewrites - before.rewrites)
            described = _counted(failure.log)[1]
            return _Outcome(False, str(failure.error).splitlines()[0], counted, self.judged, described)
        counted = RunCount(count.passes - before.passes, count.rewrites - before.rewrites)
        described = _counted(run.log)[1]
        if not self.judged:
            return _Outcome(True, "not judged", counted, False, described)
        substitutes = self.replay.dequantised(run.context)
        key = frozenset(substitutes)
        if key not in self.reference:
            self.reference[key] = outputs_of(self.replay, self.replay.captured_graph, run, substitutes)
        got = outputs_of(self.replay, run.final, run, substitutes)
        worst, held = worst_error(got, self.reference[key], run, self.tolerance)
        why = f"largest error {worst:.2e}, tolerance {held:.0e}"
        return _Outcome(worst <= held, why, counted, True, described)


_ALL = 1 << 60


def _left(number: int | None, before: int, total: int | None) -> int:
    """How many of a run's numbers reach into a graph that starts after ``before`` of them and counts ``total``."""
    left = _ALL if number is None else max(0, number - before)
    return left if total is None else min(left, total)


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

    if not command:
        raise OptionError("the command is empty", mend="--command 'python check.py', where exit code 0 is good")

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
            raise OptionError(
                f"cannot run {command[0]!r}: {error}", mend="give a program, e.g. --command 'python check.py'"
            ) from None
        rewrites, described = _counted(done.stdout + done.stderr)
        passes_seen = max((-n for n in described if n < 0), default=0)
        return Verdict(done.returncode == 0, f"exit code {done.returncode}", passes_seen, rewrites, described)

    return oracle

"""``ktfx bisect``: down to the one rewrite that makes the result wrong."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from ktfx.cli.common import Debug, Json, guarded, print_json, stderr, stdout
from ktfx.cli.debug_options import Dtype, Layers, ModelArgument, Phase, RulesOption, Seed, Simulate, Tiny, Tokens
from ktfx.cli.numerics import Tolerance


@guarded
def bisect(
    model: ModelArgument = None,
    rules: RulesOption = None,
    command: Annotated[
        str | None,
        typer.Option(
            "--command", "-c", metavar="COMMAND", help="Judge by this command's exit code instead of the numbers."
        ),
    ] = None,
    simulate: Simulate = None,
    tolerance: Tolerance = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", help="Seconds a command may take; more is a failure.")
    ] = None,
    phase: Phase = "prefill",
    tokens: Tokens = 8,
    layers: Layers = None,
    tiny: Tiny = False,
    dtype: Dtype = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the one rewrite that makes a command fail, or the numbers differ from eager's, in about log2(n) runs."""
    from ktfx.debug.bisect import bisect as search
    from ktfx.debug.bisect import command_oracle, numerics_oracle
    from ktfx.debug.replay import Replay
    from ktfx.debug.session import Setup, environment, run_unrewritten, words_of

    def progress(probe: Any) -> None:
        limit = "all" if probe.limit is None else probe.limit
        passes = "all" if probe.passes is None else probe.passes
        word = "[green]good[/green]" if probe.good else "[red]bad[/red]"
        stderr().print(f"rewrites {limit}, passes {passes}: {word}  {probe.why}  ({probe.seconds:.1f} s)")

    with environment({"KTFX_BISECT_LIMIT": None, "KTFX_BISECT_PASSES": None}):
        if command is not None:
            found = search(command_oracle(shlex.split(command), timeout), progress)
            return _answer(found, command, as_json)
        setup = Setup(model, rules, simulate, layers, tiny, dtype, tokens, phase, seed=seed)
        session = run_unrewritten(setup)
        replays = [Replay.of(session.state, graph) for graph in session.compiled]
        found = search(numerics_oracle(replays, tolerance, session.graphs), progress)
    more = [] if tolerance is None else ["--tolerance", f"{tolerance:g}"]
    return _answer(found, shlex.join([*words_of("numerics", setup, rules), *more]), as_json)


def _answer(found: Any, command: str, as_json: bool) -> None:
    before = found.variables_before
    bad = " ".join(f"{k}={v}" for k, v in found.variables.items()) + " " + command
    good = (" ".join(f"{k}={v}" for k, v in before.items()) + " " + command) if before else None
    if as_json:
        return print_json(
            {
                "rewrite": found.number,
                "phase": found.phase,
                "what": found.what,
                "pass": found.pass_name,
                "pass_number": found.pass_number,
                "rewrites": found.total,
                "runs": len(found.probes),
                "seconds": sum(p.seconds for p in found.probes),
                "reproduce": bad,
                "last_good": good,
                "probes": [vars(p) for p in found.probes],
            }
        )
    console = stdout()
    if found.number is not None:
        console.print(f"[bold]rewrite {found.number} of {found.total}[/bold]: {found.what}", soft_wrap=True)
    elif found.pass_number is not None:
        console.print(
            f"[bold]pass {found.pass_number}, {found.pass_name} in {found.phase}[/bold]: "
            "it counts no rewrite that could be left out"
        )
    else:
        console.print("[bold]wrong with every optional pass off[/bold]: " + found.what, soft_wrap=True)
    console.print(f"{len(found.probes)} runs, {sum(p.seconds for p in found.probes):.1f} s")
    console.print(f"bad:  {bad}", soft_wrap=True, markup=False)
    if good:
        console.print(f"good: {good}", soft_wrap=True, markup=False)
    return None

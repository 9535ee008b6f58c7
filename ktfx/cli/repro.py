"""``ktfx repro`` and ``ktfx reduce``: a failure as a directory, and the same failure smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ktfx.cli.common import Debug, Exit, Json, guarded, print_json, stderr, stdout
from ktfx.cli.debug_options import (
    Backend,
    Dtype,
    Layers,
    ModelArgument,
    Phase,
    RulesOption,
    Seed,
    Simulate,
    Tiny,
    Tokens,
)

Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A directory that does not exist yet.")]


@guarded
def repro(
    model: ModelArgument = None,
    rules: RulesOption = None,
    output: Output = Path("ktfx-repro"),
    simulate: Simulate = None,
    phase: Phase = "both",
    tokens: Tokens = 8,
    layers: Layers = None,
    tiny: Tiny = False,
    dtype: Dtype = None,
    backend: Backend = "inductor",
    seed: Seed = 0,
    verify: Annotated[bool, typer.Option("--verify", help="Wrong numbers are a failure too.")] = False,
    inputs: Annotated[bool, typer.Option("--inputs", help="Keep the tensors, weights too, not just shapes.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compile and run; if anything fails, write all that is needed to see it again. Exit code 1 if it failed."""
    from ktfx.debug.repro import failure_of, write_repro
    from ktfx.debug.session import Setup

    setup = Setup(model, rules, simulate, layers, tiny, dtype, tokens, phase, backend, seed, verify)
    failure = failure_of(setup)
    if failure is None:
        return print_json({"failed": False}) if as_json else stdout().print("nothing failed; nothing was written")
    path = write_repro(setup, failure, output, save_inputs=inputs)
    if as_json:
        print_json({"failed": True, "kind": failure.kind, "message": failure.message, "directory": str(path)})
    else:
        stdout().print(f"{failure.kind}: {failure.message}", markup=False, soft_wrap=True)
        stdout().print(f"written to {path}; make it smaller with: ktfx reduce {path}", soft_wrap=True)
    raise typer.Exit(Exit.NO)


@guarded
def reduce(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `ktfx repro` wrote.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Default: DIR-reduced.")] = None,
    match: Annotated[str | None, typer.Option("--match", help="A regular expression of the error to keep.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a repro smaller (widths, layers, prompt, rules, passes) as long as it fails with the same error."""
    from ktfx.debug.reduce import reduce as shrink
    from ktfx.debug.repro import command_of, read_repro, write_repro
    from ktfx.errors import OptionError

    setup, pattern = read_repro(directory)
    output = output or directory.with_name(directory.name + "-reduced")
    if output.exists():
        raise OptionError(f"{output} exists", mend="give -o another name")

    def progress(attempt: Any) -> None:
        word = "[green]kept[/green]" if attempt.kept else "[dim]no[/dim]"
        stderr().print(f"{attempt.change}: {word}  {attempt.why}", soft_wrap=True)

    smaller, failure, attempts = shrink(setup, match or pattern, progress)
    path = write_repro(smaller, failure, output)
    kept = [a.change for a in attempts if a.kept]
    if as_json:
        return print_json({"directory": str(path), "kept": kept, "runs": len(attempts) + 1})
    stdout().print(f"{len(kept)} changes kept in {len(attempts) + 1} runs: {', '.join(kept)}", soft_wrap=True)
    stdout().print(f"{path}: {command_of(smaller)}", soft_wrap=True)
    return None

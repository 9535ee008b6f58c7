"""``ktfx repro`` and ``ktfx reduce``: a failure as a directory, and the same failure smaller."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

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
from ktfx.errors import OptionError

Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A directory that does not exist yet.")]


def _check_output(path: Path) -> None:
    """What is wrong with it should be said before the model runs."""
    if path.exists():
        raise OptionError(f"{path} exists", expected="a directory that does not", mend="give -o another name")
    above = next(p for p in (path.absolute().parent, *path.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise OptionError(f"{above} cannot be written to", mend="give -o a name elsewhere")


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
    import tempfile

    from ktfx.debug.repro import failure_of, write_repro
    from ktfx.debug.session import Setup

    _check_output(output)
    setup = Setup(model, rules, simulate, layers, tiny, dtype, tokens, phase, backend, seed, verify)
    with tempfile.TemporaryDirectory() as folder:
        found = failure_of(setup, Path(folder) / "graphs", inputs)
        if found is None:
            return print_json({"failed": False}) if as_json else stdout().print("nothing failed; nothing was written")
        failure, graph = found
        path = write_repro(setup, failure, output, found=graph)
    if as_json:
        print_json(
            {
                "failed": True,
                "kind": failure.kind,
                "message": failure.message,
                "directory": str(path),
                "graph": graph is not None,
            }
        )
    else:
        stdout().print(failure.text, markup=False, soft_wrap=True)
        stdout().print(f"written to {path}; make it smaller with: ktfx reduce {path}", soft_wrap=True)
        if graph is not None:
            stdout().print(f"without the model: python {path / 'run.py'}", soft_wrap=True)
    raise typer.Exit(Exit.NO)


@guarded
def reduce(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="What `ktfx repro` wrote, or a failure under KTFX_REPRO_DIR.")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Default: DIR-reduced.")] = None,
    match: Annotated[str | None, typer.Option("--match", help="A regular expression of the error to keep.")] = None,
    graph: Annotated[
        bool, typer.Option("--graph", help="Leave the model as it is: only the graph gets smaller.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a failure smaller as long as it fails with the same error.

    First the model, where the repro names one (widths, layers, prompt, rules, passes), then its graph, node by node:
    outputs left out, the end cut off, blocks of nodes made inputs, nodes replaced by an argument, sizes halved.
    """
    import re
    import tempfile

    from ktfx.debug.reduce import reduce as shrink
    from ktfx.debug.reduce_graph import reduce_graph
    from ktfx.debug.repro import command_of, failure_of, read_case, read_repro, write_case, write_repro

    found = read_repro(directory)
    output = output or directory.with_name(directory.name + "-reduced")
    _check_output(output)
    pattern = match or found.pattern
    try:
        re.compile(pattern)
    except re.error as error:
        raise OptionError(f"--match {pattern!r} is no regular expression: {error}") from None
    if found.setup is None and found.case is None:
        raise OptionError(
            f"{directory} holds no graph that can be run again: {found.lacking}",
            expected="a repro with a module tree, or one that `ktfx repro MODEL` wrote",
            mend="python graph.py there still runs the graph as it was captured",
        )

    def progress(attempt: Any) -> None:
        word = "[green]kept[/green]" if attempt.kept else "[dim]no[/dim]"
        stderr().print(f"{attempt.change}: {word}  {escape(attempt.why)}", soft_wrap=True)

    setup, case, first = found.setup, found.case, None
    attempts: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        if setup is not None and not graph:
            setup, failure, attempts = shrink(setup, pattern, progress)
            again = failure_of(setup, Path(folder) / "graphs", True)
            if again is not None:
                case = read_case(again[1]) if again[1] is not None else None
        if case is not None:
            first = case.nodes
            case, failure, more = reduce_graph(case, pattern, progress)
            attempts = [*attempts, *more]
            path = write_case(case, failure, output, every_tensor=True, setup=setup)
        else:
            assert setup is not None
            path = write_repro(setup, failure, output)
    kept = [a.change for a in attempts if a.kept]
    if as_json:
        return print_json(
            {
                "directory": str(path),
                "kept": kept,
                "runs": len(attempts) + 1,
                "nodes_before": first,
                "nodes": case.nodes if case is not None else None,
                "error": failure.text,
            }
        )
    stdout().print(
        f"{len(kept)} changes kept in {len(attempts) + 1} runs: {failure.text}", markup=False, soft_wrap=True
    )
    if case is not None:
        stdout().print(f"the graph: {first} nodes, now {case.nodes}: {path / 'graph.py'}", soft_wrap=True)
        stdout().print(f"without the model: python {path / 'run.py'}", soft_wrap=True)
    if setup is not None:
        stdout().print(f"the model: {command_of(setup)}", soft_wrap=True)
    return None

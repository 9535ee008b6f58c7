"""The options that the debugging commands share."""

from __future__ import annotations

from typing import Annotated

import typer

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="A model directory, a config.json, `demo` (the default), or the name of a published shape.",
        show_default=False,
    ),
]
RulesOption = Annotated[
    str | None,
    typer.Option(
        "--rules", "-r", metavar="RULES", help="A rule file, or the name of one that ships; default: by model."
    ),
]
Simulate = Annotated[
    str | None,
    typer.Option("--simulate", metavar="DEVICE", help="Run devices that this machine lacks on DEVICE, usually cpu."),
]
Layers = Annotated[
    int | None, typer.Option("--layers", metavar="N", help="Only the first N layers, with random weights.")
]
Tiny = Annotated[bool, typer.Option("--tiny", help="Small widths and random weights: the structure without the size.")]
Tokens = Annotated[int, typer.Option("--tokens", metavar="N", min=2, help="Length of the prompt that is run.")]
Phase = Annotated[str, typer.Option("--phase", help="prefill, generate or both.")]
Backend = Annotated[
    str, typer.Option("--backend", help="What compiles the partitions: eager (fast to start) or inductor.")
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Run the model in this dtype, e.g. bfloat16.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the prompt and of random weights.")]

"""What every command shares: consoles, exit codes, errors as panels, JSON on stdout."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ktfx import errors


class Exit(IntEnum):
    """The exit codes; ``ktfx --help`` prints this table."""

    OK = 0
    NO = 1
    USAGE = 2
    RULES = 3
    MODEL = 4
    PLACEMENT = 5
    INTERNAL = 70
    INTERRUPTED = 130


MEANING = {
    Exit.OK: "the answer is yes, or there was nothing to ask",
    Exit.NO: "the answer is no: lint found errors, tokens differ from eager's, doctor misses something",
    Exit.USAGE: "a command or option that does not exist, or a value that it does not take",
    Exit.RULES: "a rule file that cannot be read or makes no sense",
    Exit.MODEL: "a model that cannot be loaded, or not be traced",
    Exit.PLACEMENT: "a placement that cannot be: a missing device, one too small, an op that does not fit",
    Exit.INTERNAL: "a fault inside ktfx; please report it, with --debug",
    Exit.INTERRUPTED: "interrupted",
}

_BY_KIND: tuple[tuple[type[errors.KtfxError], Exit], ...] = (
    (errors.RuleError, Exit.RULES),
    (errors.PlacementError, Exit.PLACEMENT),
    (errors.OptionError, Exit.USAGE),
    (errors.CaptureError, Exit.MODEL),
    (errors.WeightError, Exit.MODEL),
    (errors.VerifyError, Exit.NO),
)

_TITLES = {
    Exit.RULES: "rule file",
    Exit.PLACEMENT: "placement",
    Exit.USAGE: "usage",
    Exit.MODEL: "model",
    Exit.NO: "verify",
    Exit.INTERNAL: "internal error",
}

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Rules = Annotated[
    str, typer.Argument(metavar="RULES", help="A rule file, or the name of one that ships (see `ktfx rules`).")
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="A model directory, a config.json, `demo`, or the name of a published shape such as deepseek-v3.",
    ),
]


def stdout() -> Console:
    """Where results go."""
    return Console(highlight=False)


def stderr() -> Console:
    """Where errors, warnings and progress go."""
    return Console(stderr=True, highlight=False)


def print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")


def exit_code(error: errors.KtfxError) -> Exit:
    return next((code for kind, code in _BY_KIND if isinstance(error, kind)), Exit.INTERNAL)


def error_json(error: errors.KtfxError) -> dict[str, Any]:
    """An error as ``--json`` prints it."""
    origin = error.origin
    return {
        "kind": type(error).__name__,
        "exit_code": int(exit_code(error)),
        "message": error.what,
        "file": origin.file if origin else None,
        "line": origin.line or None if origin else None,
        "column": origin.column or None if origin else None,
        "rule": error.rule,
        "module": error.module,
        "expected": error.expected,
        "mend": error.mend,
        "repro": error.repro,
    }


def error_panel(error: errors.KtfxError) -> Panel:
    where = [str(error.origin)] if error.origin else []
    where += [error.rule] if error.rule else []
    where += [f"module {error.module or '(the whole model)'}"] if error.module is not None else []
    lines = [Text(", ".join(where), style="bold")] if where else []
    advice = Table.grid(padding=(0, 2))
    reduce = f"{error.repro} (make it smaller: ktfx reduce {error.repro})" if error.repro else None
    rows = (("expected", "dim", error.expected), ("mend", "green", error.mend), ("repro", "cyan", reduce))
    for name, style, text in rows:
        if text:
            advice.add_row(Text(name, style), Text(text))
    return _panel(_TITLES.get(exit_code(error), "error"), Group(*lines, Text(error.what), advice))


def _panel(title: str, body: Any) -> Panel:
    return Panel(body, title=f"ktfx: {title}", title_align="left", border_style="red", padding=(0, 1))


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn every error of a command into a panel on stderr, JSON if ``--json`` asks, and the right exit code."""

    @functools.wraps(command)
    def wrapper(**kwargs: Any) -> Any:
        debug = bool(kwargs.get("debug"))
        try:
            with _plain_warnings():
                return command(**kwargs)
        except errors.KtfxError as error:
            if debug:
                stderr().print_exception()
            if kwargs.get("as_json"):
                print_json({"error": error_json(error)})
            stderr().print(error_panel(error))
            raise typer.Exit(exit_code(error)) from None
        except KeyboardInterrupt:
            stderr().print("interrupted")
            raise typer.Exit(Exit.INTERRUPTED) from None
        except (BrokenPipeError, typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if debug:
                stderr().print_exception()
            if kwargs.get("as_json"):
                text = f"{type(error).__name__}: {error}"
                print_json({"error": {"kind": "internal", "exit_code": int(Exit.INTERNAL), "message": text}})
            hint = Text("Please report it with the output of this command with --debug, and of `ktfx doctor`.")
            notes = [Text(note) for note in getattr(error, "__notes__", ())]
            stderr().print(_panel("internal error", Group(Text(f"{type(error).__name__}: {error}"), *notes, hint)))
            raise typer.Exit(Exit.INTERNAL) from None

    return wrapper


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """ktfx's own warnings as one line on stderr, without a source line."""
    import warnings

    usual = warnings.showwarning

    def show(message: Any, category: Any, *rest: Any, **options: Any) -> None:
        if issubclass(category, errors.KtfxWarning):
            stderr().print(Text.assemble(("warning  ", "yellow"), str(message)))
        else:
            usual(message, category, *rest, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("always", errors.KtfxWarning)
        warnings.showwarning = show
        yield

"""On a failure in a pass, a compile or a run: a repro directory by itself, named in the error.

Asked for by the option ``repro_dir`` or the environment's ``KTFX_REPRO_DIR``; ``KTFX_REPRO_INPUTS=1`` (option
``repro_inputs``) keeps every tensor, weights too, not just shapes and small integers.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktfx.errors import KtfxError

if TYPE_CHECKING:
    from ktfx.capture import Captured
    from ktfx.debug.case import Case
    from ktfx.options import CompileOptions
    from ktfx.pass_manager import PassContext
    from ktfx.state import ModelState


def repro_directory(options: CompileOptions) -> str | None:
    """Where repros of failures go; None if none are asked for."""
    return options.repro_dir or os.environ.get("KTFX_REPRO_DIR") or None


def watch(options: CompileOptions, captured: Captured, state: ModelState) -> Watch:
    """A watch over one compile; call it before the first pass."""
    directory = repro_directory(options)
    if directory is None:
        return Watch(None, None, False)
    from ktfx.debug.case import case_of
    from ktfx.debug.repro import rules_of

    case = case_of(
        captured,
        rules_of(state),
        simulate=options.simulate,
        backend=options.partition_backend,
        verify=options.verify,
    )
    keep = options.repro_inputs or os.environ.get("KTFX_REPRO_INPUTS", "") not in ("", "0")
    return Watch(Path(directory), case, keep)


class Watch:
    """Writes a repro of what fails inside its blocks and calls; does nothing without a directory."""

    def __init__(self, directory: Path | None, case: Case | None, keep_inputs: bool) -> None:
        self.directory, self.case, self.keep_inputs = directory, case, keep_inputs

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """``pass`` or ``compile``."""
        try:
            yield
        except Exception as error:
            self._write(error, name, {})
            raise

    def calls(self, call: Callable[..., Any], context: PassContext) -> Callable[..., Any]:
        """``call`` as the stage ``run``; its arguments are kept as they were when it failed."""
        if self.case is None:
            return call
        from ktfx.debug.inputs import argument_values

        def watched(*args: Any) -> Any:
            try:
                return call(*args)
            except Exception as error:
                self._write(error, "run", argument_values(context, args, weights=self.keep_inputs))
                raise

        return watched

    def _write(self, error: Exception, stage: str, values: Mapping[str, Any]) -> None:
        if self.case is None or self.directory is None or getattr(error, "repro", None):
            return
        from ktfx.debug.failure import failure_from
        from ktfx.debug.repro import free_name, write_case

        case = replace(self.case, stage=stage, values=dict(values))
        failure = failure_from(error)
        try:
            target = free_name(self.directory, f"{case.captured.phase}-{stage}-{failure.kind}")
            path = write_case(case, failure, target, every_tensor=self.keep_inputs, command=["ktfx", *sys.argv[1:]])
        except Exception as second:
            # The failure itself matters more than that it could not be written.
            error.add_note(f"ktfx could not write a repro: {type(second).__name__}: {second}")
            return
        if isinstance(error, KtfxError):
            error.name_repro(str(path))
        else:
            error.add_note(f"ktfx repro: {path} (make it smaller: ktfx reduce {path})")

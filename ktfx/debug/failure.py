"""What went wrong, in a form that can be written down and told again."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass

from ktfx.errors import KtfxError


@dataclass(frozen=True)
class Failure:
    """What went wrong: the exception's kind, its first line, and its traceback."""

    kind: str
    message: str
    trace: str

    @property
    def text(self) -> str:
        """``kind: message``, which patterns are searched in."""
        return f"{self.kind}: {self.message}"

    @property
    def pattern(self) -> str:
        """A regular expression that tells this failure again: the first line, with numbers and node names left open.

        Of a wrong number only the pass is kept: which output and node show it changes with the graph.
        """
        text = self.text
        if self.kind == "VerifyError":
            text = text.partition(": output ")[0]
        parts = re.split(r"(\b[a-z_]\w* \((?:aten|ktfx|transformers)\.[\w.]+\)|\d+)", text)
        return "".join(_open(part) if i % 2 else re.escape(part) for i, part in enumerate(parts))


def _open(part: str) -> str:
    _, found, op = part.partition(" (")
    return r"\w+ \(" + re.escape(op) if found else r"\d+"


def failure_from(error: BaseException) -> Failure:
    """A caught exception as a Failure; of Dynamo's wrapper around a backend's error, the error itself."""
    inner = getattr(error, "inner_exception", None)
    if isinstance(inner, Exception):
        error = inner
    text = error.what if isinstance(error, KtfxError) else str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    trace = "".join(traceback.format_exception(error))
    return Failure(type(error).__name__, first[:300], trace)

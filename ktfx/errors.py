"""KtfxError and its kinds: every message says where, what was expected, and how to mend it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """A place in a rule file. ``line`` and ``column`` count from 1; 0 means unknown (a rule given as a Python dict)."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        if not self.line:
            return self.file
        return f"{self.file}:{self.line}:{self.column}" if self.column else f"{self.file}:{self.line}"


class KtfxError(Exception):
    """The base of every error that ktfx raises on purpose.

    Parameters
    ----------
    what: what is wrong, one sentence.
    origin: the place in the rule file, if one is to blame.
    rule: the rule's own name or number (``rule 3``).
    module: the dotted module path concerned.
    expected: what was expected there.
    mend: how to mend it, as an instruction.

    repro: the directory in which the failure was kept, where that was asked for (``name_repro``).
    """

    def __init__(
        self,
        what: str,
        *,
        origin: Origin | None = None,
        rule: str | None = None,
        module: str | None = None,
        expected: str | None = None,
        mend: str | None = None,
    ) -> None:
        self.what = what
        self.origin = origin
        self.rule = rule
        self.module = module
        self.expected = expected
        self.mend = mend
        self.repro: str | None = None
        super().__init__(self._text())

    def name_repro(self, directory: str) -> None:
        """Say in the message where the failure was kept."""
        self.repro = directory
        self.args = (self._text(),)

    def _text(self) -> str:
        where = [str(self.origin)] if self.origin else []
        if self.rule:
            where.append(self.rule)
        if self.module is not None:
            where.append(f"module {self.module!r}")
        lines = [f"{', '.join(where)}: {self.what}" if where else self.what]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.mend:
            lines.append(f"  mend: {self.mend}")
        if self.repro:
            lines.append(f"  repro: {self.repro} (make it smaller: ktfx reduce {self.repro})")
        return "\n".join(lines)


class RuleError(KtfxError):
    """A rule file that cannot be read, or says something that cannot be."""


class PlacementError(KtfxError):
    """A rule that cannot hold for this model or this machine (an op that cannot take a layout, a device too small)."""


class OptionError(KtfxError):
    """``options=`` or a command-line option that ktfx does not know or cannot take."""


class CaptureError(KtfxError):
    """The traced graph is not one that ktfx can rewrite (grad enabled, training mode, a break inside a layer)."""


class PassError(KtfxError):
    """A pass left the graph in a state that its checks refuse."""


class VerifyError(KtfxError):
    """``verify: true`` found a pass whose graph computes something else than the graph before it."""


class WeightError(KtfxError):
    """A checkpoint or a parameter that cannot be read, placed or packed."""


class HostCallError(KtfxError):
    """A call to the CPU kernels failed."""


class KtfxWarning(UserWarning):
    """Something ktfx did that the user may not have meant (a fallback, a rule that matches nothing)."""

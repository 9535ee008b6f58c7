"""Small helpers for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that ``word`` most likely meant, or None."""
    found = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=cutoff)
    return found[0] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """A mend for a misspelt name, or None if nothing is near."""
    name = nearest(word, known)
    return f"did you mean {name!r}?" if name else None


def near(word: str, known: Iterable[str]) -> str:
    """The same within a sentence: `` (did you mean 'x'?)``, or an empty string."""
    mend = did_you_mean(word, known)
    return f" ({mend})" if mend else ""


def human_bytes(count: float) -> str:
    """1536 → ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError

"""How far a compile has come: the command line listens and shows a bar; by default nobody listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str, int, int], None]
"""Called with (stage, done, total); stages: ``capture``, ``passes``, ``pack``, ``compile``; total 0 is "not known"."""

_LISTENER: ContextVar[Listener | None] = ContextVar("ktfx_progress", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell ``listener`` of every compile inside the block (this thread and what inherits its context)."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def report(stage: str, done: int = 0, total: int = 0) -> None:
    """Say that a compile has reached a stage, or ``done`` of ``total`` pieces within it."""
    listener = _LISTENER.get()
    if listener is not None:
        listener(stage, done, total)

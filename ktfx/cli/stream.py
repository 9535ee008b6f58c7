"""Text as it is generated: ids in, whole characters out, and when each token came."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

_LONGEST_CHARACTER = 16  # tokens; more that make no character are no character


class TokenStream:
    """A streamer for transformers' ``generate(streamer=…)``.

    decode: ids → text. write: takes each piece of new text. A piece never ends inside a character: byte-level tokens
    decode to U+FFFD until their character is whole. ``times`` holds the clock at each token; ``ids`` the tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], write: Callable[[str], None]) -> None:
        self.decode = decode
        self.write = write
        self.ids: list[int] = []
        self.times: list[float] = []
        self._saw_prompt = False
        self._context = 0  # ids before it are not decoded again
        self._shown = 0  # ids before it are written

    def put(self, value: Any) -> None:
        """Called by ``generate`` with the prompt, then with each token."""
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        self.times.append(time.perf_counter())
        self.ids.extend(int(i) for i in value.flatten().tolist())
        self._flush(last=False)

    def end(self) -> None:
        """Called by ``generate`` after the last token."""
        self._flush(last=True)

    def _flush(self, last: bool) -> None:
        # Some tokenizers decode a token differently at the beginning: the piece before it is decoded along.
        before = self.decode(self.ids[self._context : self._shown])
        after = self.decode(self.ids[self._context :])
        waiting = len(self.ids) - self._shown
        if after.endswith("\ufffd") and not last and waiting < _LONGEST_CHARACTER:
            return
        if len(after) > len(before):
            self.write(after[len(before) :])
        self._context, self._shown = self._shown, len(self.ids)

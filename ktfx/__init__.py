"""ktfx: a torch.compile backend that runs Mixture-of-Experts models over GPUs and host by rules in a YAML file."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ktfx.errors import KtfxError, KtfxWarning

if TYPE_CHECKING:
    from ktfx.api import compile, refresh, restore, state_of
    from ktfx.loading import from_pretrained
    from ktfx.ruleset import load_ruleset

__all__ = [
    "KtfxError",
    "KtfxWarning",
    "compile",
    "from_pretrained",
    "load_ruleset",
    "refresh",
    "restore",
    "state_of",
]

# Loaded at first use: torch takes seconds to import, and `ktfx --help` needs none of it.
_HOME = {
    "compile": "ktfx.api",
    "refresh": "ktfx.api",
    "restore": "ktfx.api",
    "state_of": "ktfx.api",
    "from_pretrained": "ktfx.loading",
    "load_ruleset": "ktfx.ruleset",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ktfx' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)

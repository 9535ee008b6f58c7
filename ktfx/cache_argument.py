"""The keyword by which a model's forward takes its key-value cache: ``cache`` since transformers 5.24.

Before that it was ``past_key_values``, which newer models still take (with a warning, until 5.40).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

CACHE_NAMES = ("cache", "past_key_values")


def cache_given(arguments: Mapping[str, Any]) -> Any:
    """The cache among a call's named arguments, by either name; None without one."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def cache_keyword(forward: Callable[..., Any]) -> str:
    """The name that a model's ``forward`` itself has for its cache."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[0])

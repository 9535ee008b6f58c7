"""``generate()`` on a compiled model: the static cache that ktfx asks for gives way to a choice that rules it out, and
its sliding layers get their full length before the masks are made."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from ktfx.cache_argument import CACHE_NAMES, cache_given
from ktfx.sliding_cache import lengthen_sliding_layers

# transformers refuses these together with `cache_implementation="static"`.
_RULES_OUT_STATIC = (*CACHE_NAMES, "assistant_model", "prompt_lookup_num_tokens")


def generate_with_callers_cache(model: nn.Module, own_implementation: Any) -> Callable[..., Any]:
    """The model's ``generate``; with a cache of the caller's, or assisted decoding, the model's own setting holds.

    own_implementation: the ``cache_implementation`` that the model had before ktfx set ``static``.
    """
    cls: Any = type(model)
    generate: Callable[..., Any] = cls.generate
    model_ref = weakref.ref(model)

    @functools.wraps(generate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        owner = model_ref()
        assert owner is not None
        settings: Any = owner.generation_config
        asked = (kwargs, vars(kwargs.get("generation_config") or settings))
        if not any(given.get(name) is not None for given in asked for name in _RULES_OUT_STATIC):
            return generate(owner, *args, **kwargs)
        before = settings.cache_implementation
        settings.cache_implementation = own_implementation
        try:
            return generate(owner, *args, **kwargs)
        finally:
            settings.cache_implementation = before

    return wrapper


def prepare_with_long_layers(model: nn.Module) -> Callable[..., Any]:
    """The model's ``prepare_inputs_for_generation``, which makes the masks by the cache's layers: long ones by then."""
    cls: Any = type(model)
    prepare: Callable[..., Any] = cls.prepare_inputs_for_generation
    model_ref = weakref.ref(model)

    @functools.wraps(prepare)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        lengthen_sliding_layers(cache_given(kwargs), kwargs.get("attention_mask"))
        return prepare(model_ref(), *args, **kwargs)

    return wrapper

"""What is wrong with a call of a compiled model, told by the caller's names instead of the graph's.

Asked only after a call failed (and for two shapes before it is compiled), so that good calls pay nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ktfx.cache_argument import cache_given
from ktfx.errors import CaptureError


def refuse_bad_shapes(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """CaptureError for an empty prompt, or one longer than its static cache, from shapes alone.

    On a GPU the second would write past the cache and end the process's CUDA context, not the call.
    """
    given = _named(forward, args, kwargs)
    name, tokens = _tokens(given)
    if tokens is None or tokens.dim() < 2:
        return
    if tokens.shape[1] == 0 or tokens.shape[0] == 0:
        raise CaptureError(
            f"{name} is empty: its shape is {tuple(tokens.shape)}",
            expected="(batch, length) with at least one token",
            mend="begin an empty prompt with the tokenizer's bos token",
        )
    capacity = _capacity(cache_given(given))
    if capacity is not None and tokens.shape[1] > capacity:
        raise _cache_full(capacity, 0, tokens.shape[1])


def reason_for_failure(
    model: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> CaptureError | None:
    """The mistake in a call that failed, or None if the arguments look right."""
    given = _named(forward, args, kwargs)
    name, tokens = _tokens(given)
    if tokens is None:
        return None
    wrong = _wrong_tokens(name, tokens, _embedding(model))
    return wrong or _wrong_cache(tokens, cache_given(given))


def bound_argument(forward: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call gives an argument, by position or by name; None if nothing."""
    return kwargs[name] if name in kwargs else _named(forward, args, kwargs).get(name) if args else None


def _named(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        bound = inspect.signature(forward).bind_partial(*args, **kwargs)
    except (TypeError, ValueError):
        return dict(kwargs)
    return {**bound.arguments, **bound.arguments.get("kwargs", {})}


def _tokens(given: dict[str, Any]) -> tuple[str, torch.Tensor | None]:
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(given.get(name), torch.Tensor):
            return name, given[name]
    return "", None


def _embedding(model: nn.Module) -> nn.Embedding | None:
    get = getattr(model, "get_input_embeddings", None)
    try:
        found = get() if get is not None else None
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Embedding) else None


def _wrong_tokens(name: str, tokens: torch.Tensor, embedding: nn.Embedding | None) -> CaptureError | None:
    if name == "inputs_embeds":
        width = embedding.embedding_dim if embedding is not None else tokens.shape[-1]
        if tokens.dim() != 3 or tokens.shape[-1] != width:
            return CaptureError(
                f"inputs_embeds is {tuple(tokens.shape)}",
                expected=f"(batch, length, {width})",
                mend="use the model's own model.get_input_embeddings()(input_ids)",
            )
        return None
    if tokens.dtype not in (torch.int64, torch.int32):
        return CaptureError(f"input_ids is {tokens.dtype}", expected="int64 or int32", mend="call input_ids.long()")
    if tokens.dim() != 2:
        return CaptureError(f"input_ids is {tuple(tokens.shape)}", expected="(batch, length)")
    if embedding is None:
        return None
    least, most = int(tokens.min()), int(tokens.max())
    if least < 0 or most >= embedding.num_embeddings:
        return CaptureError(
            f"input_ids holds the token {least if least < 0 else most}",
            expected=f"0 to {embedding.num_embeddings - 1}: the model has {embedding.num_embeddings} tokens",
            mend="use the tokenizer that belongs to the model",
        )
    return None


def _wrong_cache(tokens: torch.Tensor, cache: Any) -> CaptureError | None:
    capacity = _capacity(cache)
    if capacity is None:
        return None
    keys = getattr(cache.layers[0], "keys", None)
    if isinstance(keys, torch.Tensor) and keys.dim() == 4 and keys.shape[0] != tokens.shape[0]:
        return CaptureError(
            f"the cache holds a batch of {keys.shape[0]}, and the call has one of {tokens.shape[0]}",
            expected="one cache for each batch, from its prefill to its last step",
            mend="make a new cache for the new batch",
        )
    used = int(cache.get_seq_length())
    return _cache_full(capacity, used, tokens.shape[1]) if used + tokens.shape[1] > capacity else None


def _cache_full(capacity: int, used: int, more: int) -> CaptureError:
    return CaptureError(
        f"the static cache has {capacity} positions: {used} are used, and the call brings {more} more",
        mend="make it longer (StaticCache(config=…, max_cache_len=…)), or call cache.reset() for a new conversation",
    )


def _capacity(cache: Any) -> int | None:
    """Positions of a static cache whose layers never slide; None for any other."""
    layers = getattr(cache, "layers", None)
    if not layers or not getattr(cache, "is_compileable", False):
        return None
    sizes = [getattr(layer, "max_cache_len", None) for layer in layers if not getattr(layer, "is_sliding", False)]
    known = [size for size in sizes if isinstance(size, int)]
    return min(known) if known else None

"""Sliding-window layers of a static cache made as long as its full layers, so that every decode step is alike.

transformers' own sliding layer counts in a Python integer and moves its whole window at each step: sizes, masks and the
graph itself depend on the count. A layer of the full length counts in a tensor; the model's masks hide what lies before
the window, and the attention kernel does not read what they hide.
"""

from __future__ import annotations

from typing import Any

import torch

from ktfx.placed_tensor import PlacedTensor

# On a cache that was looked at: asking again would cost every step of generate().
_MARK = "_ktfx_sliding_seen"


def lengthen_sliding_layers(cache: Any, attention_mask: Any = None) -> int:
    """Put plain static layers, of the length of the cache's full ones, in the place of its sliding ones; how many.

    cache: a transformers ``StaticCache``; what a sliding layer holds is kept, at the positions where it belongs. Any
    other cache is left as it is: one whose layers all slide (nobody knows the full length), with layers of linear
    attention, offloaded, or placed already.
    attention_mask: the mask of the call about to be made. One that is made already, (B, 1, T, L) or a mapping of such,
    was sized by the layers as they are, which then stay.
    """
    layers = getattr(cache, "layers", None)
    if not layers or getattr(cache, _MARK, False):
        return 0
    if isinstance(attention_mask, dict) or (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4):
        return 0
    object.__setattr__(cache, _MARK, True)
    length = _full_length(cache)
    if length is None:
        return 0
    from transformers.cache_utils import StaticSlidingWindowLayer

    sliding = [i for i, layer in enumerate(layers) if type(layer) is StaticSlidingWindowLayer]
    for index in sliding:
        layers[index] = _lengthened(layers[index], length)
    return len(sliding)


def _full_length(cache: Any) -> int | None:
    """The length of the cache's full layers; None where its sliding layers must stay."""
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    if getattr(cache, "offloading", False):
        return None
    lengths = set()
    for layer in cache.layers:
        if type(layer) not in (StaticLayer, StaticSlidingWindowLayer) or isinstance(layer.keys, PlacedTensor):
            return None
        if type(layer) is StaticLayer:
            lengths.add(layer.max_cache_len)
    return lengths.pop() if len(lengths) == 1 else None


@torch.no_grad()
def _lengthened(old: Any, length: int) -> Any:
    """A static layer that holds what the sliding one does: the last tokens; no later one looks further back."""
    from transformers.cache_utils import StaticLayer

    new = StaticLayer(max_cache_len=length)
    if old.is_initialized:
        count = old.cumulative_length_int
        held = min(count, old.max_cache_len)
        new.lazy_initialization(old.keys[:, :, :0], old.values[:, :, :0])
        new.keys[:, :, count - held : count] = old.keys[:, :, :held]
        new.values[:, :, count - held : count] = old.values[:, :, :held]
        new.cumulative_length.fill_(count)
    return new

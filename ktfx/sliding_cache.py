"""Sliding-window layers of a static cache made as long as its full layers, so that every decode step is alike.

transformers' own sliding layer counts in a Python integer and moves its whole window at each step: sizes, masks and the
graph itself depend on the count. A layer of the full length counts in a tensor; the model's masks hide what lies before
the window, and the attention kernel does not read what they hide.
"""

from __future__ import annotations

from typing import Any

import torch

# On a cache that was looked at: asking again would cost every step of generate().
_MARK = "_ktfx_sliding_seen"


def lengthen_sliding_layers(cache: Any, attention_mask: Any = None) -> int:
    """Put plain static layers in the place of a fresh cache's sliding ones; returns how many.

    cache: a transformers ``StaticCache`` into which nothing was written yet, whose other layers are full; any other is
    left as it is (all layers slide, so that nobody knows the full length; layers of linear attention; offloading).
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
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    sliding = [i for i, layer in enumerate(layers) if type(layer) is StaticSlidingWindowLayer]
    for index in sliding:
        old, new = layers[index], StaticLayer(max_cache_len=length)
        if old.is_initialized:
            new.lazy_initialization(old.keys[:, :, :0], old.values[:, :, :0])
        layers[index] = new
    return len(sliding)


def _full_length(cache: Any) -> int | None:
    """The length of the cache's full layers; None where its sliding layers must stay."""
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    if getattr(cache, "offloading", False):
        return None
    lengths = set()
    for layer in cache.layers:
        if type(layer) is StaticLayer:
            lengths.add(layer.max_cache_len)
        elif type(layer) is not StaticSlidingWindowLayer or layer.cumulative_length_int != 0:
            return None
    return lengths.pop() if len(lengths) == 1 else None

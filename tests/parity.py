"""The one comparison everything is held to: a model against its own eager run, logits and every cache tensor."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import ktfx
from ktfx.cache_argument import cache_keyword
from ktfx.placed_tensor import PlacedTensor
from ktfx.verify import relative_error

FLOAT32_TOLERANCE = 1e-4
BFLOAT16_TOLERANCE = 2e-2


@dataclass
class Trace:
    """logits of prefill and each decode step; the cache's tensors at the end by (layer, name); the greedy tokens."""

    logits: list[torch.Tensor]
    cache: dict[tuple[int, str], torch.Tensor]
    tokens: list[list[int]]


def static_cache(model: nn.Module, length: int) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=length)


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Keywords of a call with a cache, by the name that this version of transformers has for it."""
    return {cache_keyword(model.forward): cache, "use_cache": True}


def run_steps(
    model: nn.Module,
    ids: torch.Tensor,
    steps: int,
    cache: Any,
    attention_mask: torch.Tensor | None = None,
    forced: list[list[int]] | None = None,
) -> Trace:
    """Prefill ``ids`` (B, T), then ``steps`` greedy decode steps (or the ``forced`` tokens)."""
    logits: list[torch.Tensor] = []
    tokens: list[list[int]] = []
    mask = attention_mask
    with torch.no_grad():
        current = ids
        for step in range(steps + 1):
            kwargs: dict[str, Any] = {"input_ids": current, **with_cache(model, cache)}
            if mask is not None:
                kwargs["attention_mask"] = mask
            out = model(**kwargs)
            last = out.logits[:, -1].clone()
            logits.append(out.logits.clone())
            chosen = last.argmax(-1, keepdim=True) if forced is None else torch.tensor(forced[step])[:, None]
            tokens.append(chosen[:, 0].tolist())
            current = chosen
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return Trace(logits, cache_tensors(cache), tokens)


def cache_tensors(cache: Any) -> dict[tuple[int, str], torch.Tensor]:
    found: dict[tuple[int, str], torch.Tensor] = {}
    for index, layer in enumerate(getattr(cache, "layers", [])):
        for name, value in vars(layer).items():
            values = value if isinstance(value, list) else [value]
            for position, item in enumerate(values):
                if isinstance(item, torch.Tensor):
                    plain = item.fetch() if isinstance(item, PlacedTensor) else item
                    found[(index, f"{name}{position or ''}")] = plain.clone()
    return found


def compare(actual: Trace, expected: Trace, tolerance: float) -> float:
    """The largest relative error; asserts every one under the tolerance, tokens equal, same cache tensors."""
    worst = 0.0
    for step, (a, b) in enumerate(zip(actual.logits, expected.logits, strict=True)):
        error = relative_error(a, b)
        worst = max(worst, error)
        assert error <= tolerance, f"logits of step {step} differ by {error:.2e}"
    assert actual.cache.keys() == expected.cache.keys()
    for key, value in expected.cache.items():
        mine = last_of_window(actual.cache, key, value)
        if mine is None:
            continue
        error = relative_error(mine, value)
        worst = max(worst, error)
        assert error <= tolerance, f"cache layer {key[0]} {key[1]} differs by {error:.2e}"
    return worst


def last_of_window(
    cache: dict[tuple[int, str], torch.Tensor], key: tuple[int, str], expected: torch.Tensor
) -> torch.Tensor | None:
    """A cache tensor as the eager run holds it: of a layer that ktfx keeps whole, the last of its window.

    None for such a layer's count, which eager stops at the window.
    """
    layer, name = key
    whole, states = cache[key], cache.get((layer, "keys"))
    if name == "cumulative_length" and states is not None and int(whole) > int(expected):
        assert int(expected) <= states.shape[2]
        return None
    if name not in ("keys", "values") or whole.shape == expected.shape:
        return whole
    window = expected.shape[2]
    start = max(int(cache[(layer, "cumulative_length")]) - window, 0)
    return whole[:, :, start : start + window]


def check_parity(
    model: nn.Module,
    rules: Any,
    *,
    length: int = 7,
    steps: int = 32,
    batch: int = 1,
    tolerance: float = FLOAT32_TOLERANCE,
    poison: bool = True,
    **options: Any,
) -> tuple[Any, float]:
    """Eager against compiled, on the same prompt. ``poison``: after placing, the model's own copies are overwritten,
    so that anything that aliases a source instead of its copy shows."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 90, (batch, length), generator=generator)
    capacity = length + steps + 4
    expected = run_steps(model, ids, steps, static_cache(model, capacity))
    options = {"simulate": "cpu", "partition_backend": "eager", **options}
    ktfx.compile(model, rules, **options)
    try:
        actual = run_steps(model, ids, steps, static_cache(model, capacity), forced=expected.tokens)
        state = ktfx.state_of(model)
        worst = compare(actual, expected, tolerance)
        if poison:
            _poison(model, state)
            again = run_steps(model, ids, steps, static_cache(model, capacity), forced=expected.tokens)
            compare(again, expected, tolerance)
        assert actual.tokens == expected.tokens
        greedy = [step[:, -1].argmax(-1).tolist() for step in actual.logits]
        if tolerance <= FLOAT32_TOLERANCE:
            assert greedy == expected.tokens
        return state, worst
    finally:
        ktfx.restore(model)


def _poison(model: nn.Module, state: Any) -> None:
    """Overwrite, without a trace, every parameter whose only readers use copies."""
    in_place = {entry.names[0] for entry in state.store.entries() if not entry.owned}
    canonical = state.store.canonical
    saved: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if canonical(name) in in_place or not parameter.is_floating_point():
            continue
        saved[name] = copy.deepcopy(parameter.data)
        parameter.data.fill_(float("nan"))


HOST_EXPERTS = {"match": {"module": "experts"}, "replace": {"op": "experts.aten", "device": "host"}}
DEVICES = {"gpu0": "cuda:0", "gpu1": "cuda:1", "host": "cpu"}


def two_gpus_host(layers: int, op: str = "experts.aten") -> dict[str, Any]:
    """First half of the layers on gpu0, the rest on gpu1, every model's experts on the host."""
    half = max(1, layers // 2)
    return {
        "ktfx": 1,
        "devices": DEVICES,
        "default_device": "gpu0",
        "layers": {f"0-{half - 1}": "gpu0", f"{half}-{layers - 1}": "gpu1"},
        "rules": [{"match": {"module": "experts"}, "replace": {"op": op, "device": "host"}}],
    }

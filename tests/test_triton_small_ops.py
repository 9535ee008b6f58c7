"""Norms, rope, gated activations and the router: kernels against the ATen definitions in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import DEVICE, DTYPES, FEW, assert_close, needs_kernels, normal, poisoned

from ktfx.ops.activations import gated_mul_reference
from ktfx.ops.norms import KINDS, rms_norm_reference
from ktfx.ops.rope import STYLES, rope_reference
from ktfx.ops.router import route_reference

pytestmark = needs_kernels
EXAMPLES = 6 if FEW else 80


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    rows=st.integers(0, 9), D=st.integers(1, 200), kind=st.sampled_from(KINDS), dtype=st.sampled_from(DTYPES),
    add=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_rms_norm(rows: int, D: int, kind: str, dtype: torch.dtype, add: bool, seed: int) -> None:
    from ktfx.triton_kernels.norms import rms_norm

    x, w = normal(rows, D, seed=seed, dtype=dtype, scale=3.0), normal(D, seed=seed + 1, dtype=dtype)
    residual = normal(rows, D, seed=seed + 2, dtype=dtype) if add else None
    y, total = rms_norm(x, w, 1e-6, kind, residual, out=(poisoned(x), poisoned(x)))
    summed = x if residual is None else x + residual
    assert torch.equal(total, summed)
    assert_close(y, rms_norm_reference(summed.double(), w.double(), 1e-6, kind), dtype)


def test_norm_ops_take_strides_and_leading_dimensions() -> None:
    x, w = normal(2, 5, 3, 16).transpose(1, 2), normal(16, seed=1)
    assert_close(
        torch.ops.ktfx.rms_norm(x, w, 1e-5, "late"),
        rms_norm_reference(x.double(), w.double(), 1e-5, "late"),
        torch.float32,
    )
    y, total = torch.ops.ktfx.add_rms_norm(x, x, w, 1e-5, "gemma")
    assert torch.equal(total, 2 * x) and total.is_contiguous()
    assert_close(y, rms_norm_reference(2 * x.double(), w.double(), 1e-5, "gemma"), torch.float32)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    B=st.integers(1, 2), heads=st.integers(1, 5), S=st.integers(1, 4), pairs=st.integers(1, 20), rest=st.integers(0, 9),
    style=st.sampled_from(STYLES), dtype=st.sampled_from(DTYPES), one_table=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_rope(
    B: int, heads: int, S: int, pairs: int, rest: int, style: str, dtype: torch.dtype, one_table: bool, seed: int
) -> None:
    from ktfx.triton_kernels.rope import rope

    x = normal(B, S, heads, 2 * pairs + rest, seed=seed, dtype=dtype).transpose(1, 2)
    tables = normal(1 if one_table else B, S, 4 * pairs, seed=seed + 1, dtype=dtype)
    cos, sin = tables[..., :pairs], tables[..., 2 * pairs : 3 * pairs]
    out = rope(x, cos, sin, style, poisoned(x))
    assert_close(out, rope_reference(x.double(), cos.double(), sin.double(), style), dtype)
    assert torch.equal(torch.ops.ktfx.rope(x, cos, sin, style), out)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    B=st.integers(1, 2), heads=st.tuples(st.integers(1, 6), st.integers(1, 3)), S=st.integers(1, 3),
    pairs=st.integers(1, 20), rest=st.integers(0, 9), style=st.sampled_from(STYLES),
    kind=st.sampled_from([*KINDS, ""]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_norm_rope(
    B: int, heads: tuple[int, int], S: int, pairs: int, rest: int, style: str, kind: str, dtype: torch.dtype, seed: int
) -> None:
    from ktfx.triton_kernels.rope import norm_rope

    D = 2 * pairs + rest
    q, k = (normal(B, S, h, D, seed=seed + h, dtype=dtype, scale=3.0).transpose(1, 2) for h in heads)
    weights = [normal(D, seed=seed + i, dtype=dtype) for i in (7, 8)] if kind else []
    tables = normal(B, S, 2 * pairs, seed=seed + 1, dtype=dtype)
    cos, sin = tables[..., :pairs], tables[..., pairs:]
    made = norm_rope(q, k, cos, sin, style, weights, 1e-6, kind, (poisoned(q), poisoned(k)))
    for i, (x, y) in enumerate(zip((q, k), made, strict=True)):
        normed = rms_norm_reference(x.double(), weights[i].double(), 1e-6, kind) if kind else x.double()
        assert_close(y, rope_reference(normed, cos.double(), sin.double(), style), dtype)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    B=st.integers(1, 3), heads=st.tuples(st.integers(1, 9), st.integers(1, 9)), S=st.integers(1, 3),
    pairs=st.integers(1, 20), rest=st.integers(0, 9), DV=st.integers(1, 40), count=st.integers(0, 4),
    moves=st.booleans(), turn=st.booleans(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_cache_write(
    B: int, heads: tuple[int, int], S: int, pairs: int, rest: int, DV: int, count: int, moves: bool, turn: bool,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    """Rows count … count + S − 1 hold the new ones to the bit, the others what they held; with norm and rope or not."""
    from ktfx.triton_kernels.cache_write import cache_write
    from ktfx.triton_kernels.rope import CacheRows, norm_rope, norm_rope_write

    D, L = 2 * pairs + rest, count + S + seed % 3
    q, k = (normal(B, S, h, D, seed=seed + h, dtype=dtype).transpose(1, 2) for h in heads)
    v = normal(B, S, heads[1], DV, seed=seed + 20, dtype=dtype).transpose(1, 2)
    keys, values = (normal(B, heads[1], L, d, seed=seed + d, dtype=dtype) for d in (D, DV))
    at = torch.tensor(count, device=keys.device)
    expected = [keys.clone(), values.clone()]
    if turn:
        tables = normal(B, S, 2 * pairs, seed=seed + 1, dtype=dtype)
        weights = [normal(D, seed=seed + i, dtype=dtype) for i in (7, 8)] if rest else []
        args = (tables[..., :pairs], tables[..., pairs:], STYLES[seed % 3], weights, 1e-6, KINDS[seed % 3])
        q_made, k_made = norm_rope(q, k, *args)
        made = norm_rope_write(q, k, *args, CacheRows(keys, values, at, v, moves), poisoned(q))
        assert torch.equal(made, q_made)
    else:
        k_made = k
        cache_write(keys, values, at, k, v, moves)
    for cache, new, was in zip((keys, values), (k_made, v), expected, strict=True):
        was[:, :, count : count + S] = new
        assert torch.equal(cache, was)
    assert int(at) == count + S * moves


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    rows=st.integers(0, 5), D=st.integers(1, 70), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
    act=st.sampled_from(["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped"]), layout=st.sampled_from("acs"),
)  # fmt: skip
def test_gated_mul(rows: int, D: int, dtype: torch.dtype, seed: int, act: str, layout: str) -> None:
    from ktfx.triton_kernels.activations import gated_mul

    both = normal(rows, 2 * D, seed=seed, dtype=dtype, scale=4.0)
    if layout == "a":  # the halves of a merged projection
        gate, up = both.chunk(2, -1)
    elif layout == "c":
        gate, up = (t.contiguous() for t in both.chunk(2, -1))
    else:  # interleaved, as gpt-oss has them
        gate, up = both[:, 0::2], both[:, 1::2]
    act, kind = ("silu", "clamped") if act == "clamped" else (act, "mul")
    out = gated_mul(gate, up, act, kind, 1.7, 2.0, poisoned(gate))
    exact = gated_mul_reference(gate.double(), up.double(), act, kind, 1.7, 2.0)
    # Where all values are far below zero, gelu is a difference that float32 does not hold, in PyTorch's own too.
    little = exact.new_full((rows, 1), 1e-4)
    assert_close(torch.cat([out.double(), little], 1), torch.cat([exact, little], 1), dtype)


ROUTERS = {
    "qwen": {"top_k": 3},
    "gpt-oss": {"top_k": 4},
    "deepseek-v2": {"top_k": 2, "renormalise": False, "scale": 16.0, "groups": 4, "keep_groups": 2},
    "deepseek-v3": {
        "top_k": 4, "scoring": "sigmoid", "scale": 2.5, "groups": 4, "keep_groups": 2, "group_score": "top2",
        "eps": 1e-20,
    },
    # As transformers has it: with a bias this low, a zero would be chosen before the experts that were kept.
    "deepseek-v3 masked": {
        "top_k": 4, "scoring": "sigmoid", "groups": 4, "keep_groups": 2, "group_score": "top2", "eps": 1e-20,
        "masked": float("-inf"),
    },
    "odd groups": {"top_k": 3, "scoring": "sigmoid", "groups": 3, "keep_groups": 2, "group_score": "top2"},
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("E", [12, 24])
def test_router(name: str, E: int) -> None:
    options = ROUTERS[name]
    biased = options.get("scoring") == "sigmoid"
    logits = normal(7, 2 * E, seed=E)[:, :E]
    bias = normal(E, seed=1, scale=0.5) - 2.0 * ("masked" in options) if biased else None
    weights, ids = torch.ops.ktfx.route(logits, bias, **options)
    exact, expected = route_reference(logits.double(), None if bias is None else bias.double(), **options)
    assert torch.equal(ids, expected)
    assert_close(weights, exact, torch.float32)


def test_router_takes_bfloat16_ties_and_a_dtype() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.5], [3.0, 3.0, 3.0, 3.0]], device=DEVICE, dtype=torch.bfloat16)
    weights, ids = torch.ops.ktfx.route(logits, None, 3, dtype=torch.bfloat16)
    assert ids.tolist() == [[1, 2, 0], [0, 1, 2]]
    assert weights.dtype == torch.bfloat16
    assert_close(weights, route_reference(logits.double(), None, 3)[0], torch.bfloat16)
    assert torch.ops.ktfx.route(logits[:0], None, 3)[1].shape == (0, 3)

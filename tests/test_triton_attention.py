"""The decode attention kernels against the ATen definition in float64; the cache is poisoned where it is not valid."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import DEVICE, DTYPES, FEW, assert_close, needs_kernels, normal, poisoned

from ktfx.ops.attention import attention_decode_masked_reference, attention_decode_reference, mask_bounds

pytestmark = needs_kernels


def check(
    B: int, kv: int, group: int, D: int, DV: int, capacity: int, lengths: list[int], dtype: torch.dtype,
    parts: int | None, window: int = 0, sinks: bool = False, softcap: float = 0.0, block: int = 16, seed: int = 0,
) -> None:  # fmt: skip
    from ktfx.triton_kernels.attention_decode import attention_decode

    q = normal(B, 1, kv * group, D, seed=seed, dtype=dtype).transpose(1, 2)
    k = normal(B, capacity, kv, D, seed=seed + 1, dtype=dtype).transpose(1, 2)
    v = normal(B, kv, capacity, DV, seed=seed + 2, dtype=dtype)
    valid = torch.tensor(lengths, device=DEVICE)
    position = torch.arange(capacity, device=DEVICE)
    for cache in (k, v):  # what lies outside must not be read, or must not count
        cache.masked_fill_((position >= valid.view(-1, 1)).view(-1, 1, capacity, 1), float("nan"))
    sink = normal(kv * group, seed=seed + 3, dtype=dtype) if sinks else None
    scale = D**-0.5
    out = poisoned(torch.empty(B, kv * group, 1, DV, dtype=dtype, device=DEVICE))
    attention_decode(q, k, v, valid, scale, window, sink, softcap, out, parts, block)
    wide = [t.double() for t in (q, k, v)]
    exact = attention_decode_reference(
        *wide, valid, scale, window, None if sink is None else sink.double(), softcap
    )  # fmt: skip
    assert_close(out, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_queries_over_a_partly_filled_cache(dtype: torch.dtype) -> None:
    check(2, 2, 4, 32, 32, 70, [70, 33], dtype, parts=3)


def test_window_sinks_and_softcap() -> None:
    check(2, 1, 8, 16, 16, 90, [90, 5], torch.float32, parts=2, window=20, sinks=True)
    check(1, 2, 2, 16, 16, 40, [30], torch.float32, parts=2, softcap=3.0)


def test_lengths_of_zero_and_one_and_more_parts_than_entries() -> None:
    check(3, 1, 2, 16, 16, 40, [0, 1, 17], torch.float32, parts=4)
    check(2, 1, 2, 16, 16, 40, [0, 3], torch.float32, parts=4, sinks=True)


@settings(max_examples=5 if FEW else 60, deadline=None)
@given(
    B=st.integers(1, 2), kv=st.integers(1, 2), group=st.integers(1, 5), D=st.integers(1, 40), DV=st.integers(1, 40),
    capacity=st.integers(1, 70), parts=st.integers(1, 4), window=st.integers(0, 30), sinks=st.booleans(),
    dtype=st.sampled_from(DTYPES), data=st.data(),
)  # fmt: skip
def test_any_shape(
    B: int, kv: int, group: int, D: int, DV: int, capacity: int, parts: int, window: int, sinks: bool,
    dtype: torch.dtype, data: st.DataObject,
) -> None:  # fmt: skip
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=B, max_size=B))
    check(B, kv, group, D, DV, capacity, lengths, dtype, parts, window, sinks)


def test_the_op_chooses_its_parts_and_takes_one_length_for_all() -> None:
    q, k, v = normal(2, 4, 1, 16), normal(2, 2, 50, 16, seed=1), normal(2, 2, 50, 16, seed=2)
    length = torch.tensor([31], device=DEVICE, dtype=torch.int32)
    out = torch.ops.ktfx.attention_decode(q, k, v, length, 0.25)
    assert_close(out, attention_decode_reference(q.double(), k.double(), v.double(), length, 0.25), torch.float32)


def check_masked(
    B: int, kv: int, group: int, D: int, capacity: int, mask: torch.Tensor | None, dtype: torch.dtype,
    parts: int | None = None, block: int = 16, seed: int = 0, sinks: bool = False, softcap: float = 0.0,
    poison: bool = True,
) -> None:  # fmt: skip
    """poison: the cache is NaN outside the mask's bounds, where nothing may be read."""
    from ktfx.triton_kernels.attention_decode import attention_decode_masked

    q = normal(B, 1, kv * group, D, seed=seed, dtype=dtype).transpose(1, 2)
    k = normal(B, capacity, kv, D, seed=seed + 1, dtype=dtype).transpose(1, 2)
    v = normal(B, kv, capacity, D, seed=seed + 2, dtype=dtype)
    sink = normal(kv * group, seed=seed + 3, dtype=dtype) if sinks else None
    wide_mask = None if mask is None or mask.dtype == torch.bool else mask.double()
    exact = attention_decode_masked_reference(
        q.double(), k.double(), v.double(), mask if wide_mask is None else wide_mask, D**-0.5,
        None if sink is None else sink.double(), softcap,
    )  # fmt: skip
    bounds = None if mask is None else mask_bounds(mask)
    if bounds is not None and poison:
        position = torch.arange(capacity, device=DEVICE)
        outside = (position < bounds[:, :1]) | (position >= bounds[:, 1:])
        for cache in (k, v):
            cache.masked_fill_(outside.view(-1, 1, capacity, 1), float("nan"))
    out = poisoned(torch.empty(B, kv * group, 1, D, dtype=dtype, device=DEVICE))
    attention_decode_masked(q, k, v, mask, bounds, D**-0.5, sink, softcap, out, parts, block)
    assert_close(out, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_in_place_of_lengths(dtype: torch.dtype) -> None:
    position = torch.arange(70, device=DEVICE)
    valid = torch.tensor([70, 33], device=DEVICE).view(-1, 1, 1, 1)
    keep = (position < valid) & (position >= 7)  # left padding
    check_masked(2, 2, 4, 32, 70, keep, dtype, parts=3)
    check_masked(2, 2, 4, 32, 70, torch.zeros(keep.shape, device=DEVICE).masked_fill(~keep, float("-inf")), dtype)
    check_masked(2, 2, 1, 16, 70, keep[:1], dtype, parts=2)
    check_masked(1, 2, 3, 16, 70, None, dtype, sinks=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_outside_a_window_is_read(dtype: torch.dtype) -> None:
    """What gpt-oss makes: floats, the least of the dtype where it hides; sinks; left padding inside the window."""
    position = torch.arange(90, device=DEVICE)
    keep = ((position > 40) & (position <= 60)).view(1, 1, 1, -1).repeat(2, 1, 1, 1)
    keep[1, ..., :47] = False
    mask = torch.where(keep, torch.zeros((), dtype=dtype, device=DEVICE), torch.finfo(dtype).min)
    for parts in (1, 3):
        check_masked(2, 1, 4, 16, 90, mask, dtype, parts, sinks=True)
        check_masked(2, 1, 4, 16, 90, keep, dtype, parts, sinks=True)
    check_masked(1, 1, 4, 16, 90, mask[:1], dtype, 3, softcap=2.0)


def test_bounds_of_a_mask() -> None:
    keep = torch.zeros(3, 2, 1, 9, dtype=torch.bool, device=DEVICE)
    keep[0, 0, 0, 3], keep[0, 1, 0, 6], keep[1, 0, 0, :] = True, True, True
    assert mask_bounds(keep).tolist() == [[3, 7], [0, 9], [0, 9]]
    for hidden in (float("-inf"), torch.finfo(torch.float32).min):
        assert mask_bounds(torch.zeros(keep.shape, device=DEVICE).masked_fill(~keep, hidden)).tolist() == [
            [3, 7], [0, 9], [0, 9],
        ]  # fmt: skip
    # Floats that merely discourage are read.
    assert mask_bounds(torch.full((1, 1, 1, 4), -1e9, device=DEVICE)).tolist() == [[0, 4]]


def test_a_row_hidden_by_finite_floats_is_a_mean() -> None:
    """Every score is the least float then: softmax gives all entries the same weight, as eager attention does."""
    mask = torch.full((1, 1, 1, 40), torch.finfo(torch.float32).min, device=DEVICE)
    check_masked(1, 1, 2, 16, 40, mask, torch.float32, parts=2)


def test_a_mask_for_each_head_and_a_row_that_keeps_nothing() -> None:
    keep = torch.rand(2, 4, 1, 50, generator=torch.Generator().manual_seed(5)).to(DEVICE) > 0.6
    keep[1, 2] = False
    keep[:, :, :, 16:32] = False  # a whole block, skipped
    check_masked(2, 2, 2, 16, 50, keep, torch.float32, parts=2)


@settings(max_examples=5 if FEW else 60, deadline=None)
@given(
    B=st.integers(1, 2), kv=st.integers(1, 2), group=st.integers(1, 5), D=st.integers(1, 40),
    capacity=st.integers(1, 70), parts=st.integers(1, 4), share=st.floats(0, 1), added=st.booleans(),
    sinks=st.booleans(), softcap=st.sampled_from([0.0, 3.0]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_mask(
    B: int, kv: int, group: int, D: int, capacity: int, parts: int, share: float, added: bool, sinks: bool,
    softcap: float, dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    mask = (torch.rand(B, 1, 1, capacity, generator=torch.Generator().manual_seed(seed)) < share).to(DEVICE)
    if added:
        mask = torch.where(mask, normal(B, 1, 1, capacity, seed=seed), float("-inf"))
    check_masked(B, kv, group, D, capacity, mask, dtype, parts, sinks=sinks, softcap=softcap)


def test_sdpa_is_what_the_masked_op_computes() -> None:
    q, k, v = normal(2, 4, 1, 16), normal(2, 2, 50, 16, seed=1), normal(2, 2, 50, 16, seed=2)
    keep = torch.arange(50, device=DEVICE).view(1, 1, 1, -1) < 31
    out = torch.ops.ktfx.attention_decode_masked(q, k, v, keep, 0.25)
    exact = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), keep, scale=0.25, enable_gqa=True
    )  # fmt: skip
    assert_close(out, exact, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("D", [64, 128, 192, 576])
def test_real_sizes(D: int) -> None:
    check(
        2,
        4 if D < 576 else 1,
        8,
        D,
        min(D, 512),
        3000,
        [2900, 17],
        torch.bfloat16,
        parts=None,
        block=32 if D > 256 else 64,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("window", [128, 1024, 20000])
def test_real_windows(D: int, window: int) -> None:
    """gpt-oss's and Gemma's sizes; the cache is NaN outside the window, and many parts have nothing to do."""
    position = torch.arange(20000, device=DEVICE)
    keep = ((position > 15000 - window) & (position <= 15000)).view(1, 1, 1, -1)
    mask = torch.where(keep, torch.zeros((), dtype=torch.bfloat16, device=DEVICE), torch.finfo(torch.bfloat16).min)
    for one in (mask, keep):
        check_masked(2, 2, 8, D, 20000, one, torch.bfloat16, block=64, sinks=True)

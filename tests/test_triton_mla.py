"""The MLA decode kernels against the ATen definition in float64; the cache is poisoned outside the mask's bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import DEVICE, DTYPES, INTERPRETED, assert_close, needs_kernels, normal, poisoned

from ktfx.ops.attention import mask_bounds
from ktfx.ops.mla import mla_decode_reference

pytestmark = needs_kernels


def check(
    B: int, H: int, R: int, P: int, capacity: int, mask: torch.Tensor | None, dtype: torch.dtype,
    parts: int | None = None, block_heads: int | None = None, block: int | None = 16, seed: int = 0,
) -> None:  # fmt: skip
    from ktfx.triton_kernels.mla_decode import mla_decode

    q_latent = normal(H, B, R, seed=seed, dtype=dtype).transpose(0, 1).unsqueeze(2)  # as a product by heads leaves it
    q_rope = normal(B, H, 1, P + 3, seed=seed + 1, dtype=dtype)[..., 3:]
    latent, k_rope = normal(B, 1, capacity, R, seed=seed + 2, dtype=dtype), normal(B, 1, capacity, P, dtype=dtype)
    bounds = None if mask is None else mask_bounds(mask)
    scale = (R + P) ** -0.5
    exact_mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    exact = mla_decode_reference(
        q_latent.double(), q_rope.double(), latent.double(), k_rope.double(), exact_mask, scale
    )
    if bounds is not None:
        position = torch.arange(capacity, device=DEVICE)
        outside = (position < bounds[:, :1]) | (position >= bounds[:, 1:])
        for cache in (latent, k_rope):
            cache.masked_fill_(outside.view(-1, 1, capacity, 1), float("nan"))
    out = poisoned(torch.empty(B, H, 1, R, dtype=dtype, device=DEVICE))
    mla_decode(q_latent, q_rope, latent, k_rope, mask, bounds, scale, out, parts, block_heads, block)
    assert_close(out, exact, dtype)


def kept(lengths: list[int], capacity: int, first: int = 0) -> torch.Tensor:
    position = torch.arange(capacity, device=DEVICE)
    valid = torch.tensor(lengths, device=DEVICE).view(-1, 1, 1, 1)
    return (position < valid) & (position >= first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_share_a_partly_filled_cache(dtype: torch.dtype) -> None:
    keep = kept([70, 33], 70, first=7)  # left padding
    check(2, 20, 32, 16, 70, keep, dtype, parts=3)
    check(2, 20, 32, 16, 70, torch.zeros(keep.shape, device=DEVICE).masked_fill(~keep, float("-inf")), dtype)
    check(2, 5, 32, 16, 70, keep[:1], dtype, parts=2)


def test_no_mask_a_mask_for_each_head_and_rows_that_keep_nothing() -> None:
    check(1, 3, 24, 8, 40, None, torch.float32, parts=2)
    keep = torch.rand(2, 20, 1, 50, generator=torch.Generator().manual_seed(5)).to(DEVICE) > 0.6
    keep[1, 2] = False
    check(2, 20, 16, 8, 50, keep, torch.float32, parts=2)
    check(2, 4, 16, 8, 40, kept([0, 3], 40), torch.float32, parts=4)


def test_more_heads_in_a_program() -> None:
    check(1, 70, 32, 16, 40, kept([33], 40), torch.float32, parts=2, block_heads=64)


@settings(max_examples=5 if INTERPRETED else 60, deadline=None)
@given(
    B=st.integers(1, 2), H=st.integers(1, 20), R=st.integers(1, 40), P=st.integers(1, 20),
    capacity=st.integers(1, 70), parts=st.integers(1, 4), share=st.floats(0, 1), added=st.booleans(),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(
    B: int, H: int, R: int, P: int, capacity: int, parts: int, share: float, added: bool, dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    mask = (torch.rand(B, 1, 1, capacity, generator=torch.Generator().manual_seed(seed)) < share).to(DEVICE)
    if added:
        mask = torch.where(mask, normal(B, 1, 1, capacity, seed=seed), float("-inf"))
    check(B, H, R, P, capacity, mask, dtype, parts, seed=seed)


def test_the_op_chooses_its_split_and_finds_bounds() -> None:
    q, qr = normal(2, 4, 1, 32), normal(2, 4, 1, 16, seed=1)
    c, kr = normal(2, 1, 150, 32, seed=2), normal(2, 1, 150, 16, seed=3)
    keep = kept([131, 20], 150)
    out = torch.ops.ktfx.mla_decode(q, qr, c, kr, keep, 0.2)
    exact = mla_decode_reference(q.double(), qr.double(), c.double(), kr.double(), keep, 0.2)
    assert_close(out, exact, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("B", "H", "block_heads"), [(1, 16, None), (2, 128, None), (2, 128, 16), (2, 128, 64)])
def test_real_sizes(B: int, H: int, block_heads: int | None) -> None:
    check(B, H, 512, 64, 3000, kept([2900, 17][:B], 3000), torch.bfloat16, None, block_heads, None)

"""x as integers for weights of 4 and 8 bits: what the planes hold, what becomes of odd values, one product by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import FEW, needs_kernels, normal

pytestmark = needs_kernels


FORMATS = ["int4", "int4zp", "int8", "mxfp4"]


def read_back(x: torch.Tensor, fmt: str) -> torch.Tensor:
    """x as its integers for a format's weights say, (T, blocks · 32)."""
    from ktfx.triton_kernels.integer_rows import integer_inputs

    made = integer_inputs(x, fmt)
    parts = 1 if fmt == "int8" else 2
    planes = made.planes.view(torch.int8).view(x.shape[0], 2, parts, made.blocks, 32 // parts).transpose(2, 3).int()
    high, low = planes.reshape(x.shape[0], 2, made.blocks, 32).unbind(1)
    whole = high * 256 + low
    if fmt == "mxfp4":  # byte (half · 4 + word) · 4 + (i % 2) · 2 + (i ≥ 16) holds value i
        i = torch.arange(32, device=x.device)
        whole = whole[:, :, ((i // 2 % 2) * 4 + i // 4 % 4) * 4 + (i % 2) * 2 + i // 16]
    assert torch.equal(whole.sum(2).float(), made.scales[:, 1])
    return (whole.double() * made.scales[:, 0, :, None].double()).flatten(1)


@settings(max_examples=8 if FEW else 60, deadline=None)
@given(
    T=st.integers(1, 4), K=st.integers(1, 700), fmt=st.sampled_from(FORMATS), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]), scale=st.sampled_from([1e-6, 1.0, 3e4]),
)  # fmt: skip
def test_integers_are_near_the_values(T: int, K: int, fmt: str, seed: int, dtype: torch.dtype, scale: float) -> None:
    x = normal(T, K + 3, seed=seed, dtype=torch.float32, scale=scale).clamp(-6e4, 6e4).to(dtype)[:, :K]
    back = read_back(x, fmt)
    padded = torch.nn.functional.pad(x.double(), (0, back.shape[1] - K))
    largest = padded.view(T, -1, 32).abs().amax(2, keepdim=True)
    error = (back - padded).view(T, -1, 32).abs()
    assert bool((error <= largest * 0.51 / 32639 + 1e-32).all())


def test_zeros_stay_zeros_and_what_is_not_finite_spreads_over_its_block() -> None:
    x = torch.zeros(2, 96, dtype=torch.bfloat16, device=normal(1).device)
    x[0, 40], x[1, 70] = float("nan"), float("-inf")
    back = read_back(x, "int4")
    lost = back.isnan().view(2, 3, 32)
    assert bool(lost[0, 1].all()) and bool(lost[1, 2].all()) and int(lost.sum()) == 64
    assert float(back.nan_to_num(0.0).abs().sum()) == 0.0


@pytest.mark.parametrize("weights", FORMATS)
def test_a_product_is_as_near_as_the_inputs_dtype_allows(weights: str) -> None:
    """Against float64 over the same weights, before the result is rounded: 2⁻¹⁶ a value, not bfloat16's 2⁻⁹."""
    from ktfx.triton_kernels.matmul import stored_weight

    from ktfx.ops.linear import LinearSpec, linear_kernel

    spec, device = LinearSpec(256, 24, weights), normal(1).device
    kernel = linear_kernel("triton")
    packed = kernel.pack(spec, normal(24, 256, seed=3, dtype=torch.bfloat16), device)
    x = normal(2, 256, seed=4, dtype=torch.bfloat16)
    assert stored_weight(weights, packed).integers(x)
    exact = x.double() @ kernel.dequantised(spec, packed).double().t()
    back = read_back(x, weights)
    wide = back[:, :256] @ kernel.dequantised(spec, packed).double().t()
    assert float((wide - exact).norm() / exact.norm()) < 3e-5

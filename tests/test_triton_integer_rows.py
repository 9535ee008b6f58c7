"""x as integers for weights of 4 and 8 bits, made before and by programs themselves: what they are worth, what
becomes of odd values, one product by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import FEW, needs_kernels, normal

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from ktfx.triton_kernels.integer_rows import integer_inputs  # noqa: E402
from ktfx.triton_kernels.made_integers import extra_bits, input_words, run_pairs, run_scale  # noqa: E402

pytestmark = needs_kernels


FORMATS = ["int4", "int4zp", "int8", "mxfp4"]


@triton.jit
def _made_kernel(x_ptr, pairs_ptr, worth_ptr, K, ldx, runs, FMT: tl.constexpr, RUNS: tl.constexpr):
    """A row's integers and their worth as ``made_sums`` has them: (T, runs, words of weights, 2) pairs of int16."""
    PARTS: tl.constexpr = 1 if FMT == "int8" else 2
    XW: tl.constexpr = 8 * PARTS
    HALF: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    t, run, c = tl.program_id(0), tl.arange(0, RUNS), tl.arange(0, 4 * RUNS)
    at = x_ptr.to(tl.pointer_type(tl.int32)) + (tl.zeros((1, 1, 1), tl.int32) + t * ldx // 2)
    words = input_words(at, c, 0, K, 0, XW) + input_words(at, c, 0, K, 1, XW)
    if PARTS == 2:
        words = words + input_words(at, c, 0, K, 2, XW) + input_words(at, c, 0, K, 3, XW)
    factor, worth = run_scale(words, extra_bits(FMT), HALF)
    to = pairs_ptr + (t * runs + run[None, None, :]) * XW
    for part in tl.static_range(PARTS):
        for i in tl.static_range(4):
            first, second = run_pairs(words, factor, part, i, FMT, HALF)
            tl.store(to + 8 * part + 2 * i, first, mask=run[None, None, :] < runs)
            tl.store(to + 8 * part + 2 * i + 1, second, mask=run[None, None, :] < runs)
    tl.store(worth_ptr + t * runs + run[None, None, :], worth, mask=run[None, None, :] < runs)


def made_back(x: torch.Tensor, fmt: str) -> torch.Tensor:
    """x, rows of whole eights, as the integers that a program makes of it say, (T, runs · values of a run)."""
    run = 16 if fmt == "int8" else 32
    T, runs = x.shape[0], -(-x.shape[1] // run)
    pairs = torch.full((T, runs, run // 2), -1, dtype=torch.int32, device=x.device)
    worth = torch.full((T, runs), -1.0, device=x.device)
    _made_kernel[(T,)](
        x, pairs, worth, x.shape[1], x.stride(0), runs, FMT=fmt, RUNS=triton.next_power_of_2(runs), num_warps=1
    )
    whole = pairs.view(torch.int16).view(T, runs, run)
    if fmt == "mxfp4":  # part p, word w, pair s: values i = 4w + 2p + s and i + 16
        i = torch.arange(32, device=x.device)
        whole = whole[:, :, i // 2 % 2 * 16 + i // 4 % 4 * 4 + i % 2 * 2 + i // 16]
    return (whole.double() * (worth[:, :, None].double() * {"int8": 1, "mxfp4": 2}.get(fmt, 16))).flatten(1)


def read_back(x: torch.Tensor, fmt: str) -> torch.Tensor:
    """x as its integers for a format's weights say, (T, blocks · 32)."""
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


@settings(max_examples=8 if FEW else 60, deadline=None)
@given(
    T=st.integers(1, 3), eights=st.integers(1, 80), fmt=st.sampled_from(FORMATS), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]), scale=st.sampled_from([1e-6, 1.0, 3e4]),
)  # fmt: skip
def test_integers_made_by_programs_are_as_near(
    T: int, eights: int, fmt: str, seed: int, dtype: torch.dtype, scale: float
) -> None:
    """To 2⁻¹⁵ of a run's largest; exactly, where a value's own bits reach no further than that."""
    K, run = 8 * eights, 16 if fmt == "int8" else 32
    x = normal(T, K + 8, seed=seed, dtype=torch.float32, scale=scale).clamp(-6e4, 6e4).to(dtype)[:, :K]
    back = made_back(x, fmt)
    padded = torch.nn.functional.pad(x.double(), (0, back.shape[1] - K)).view(T, -1, run)
    error, largest = (back.view(T, -1, run) - padded).abs(), padded.abs().amax(2, keepdim=True)
    assert bool((error <= largest * 2.0**-15 + (2.0**-29 if dtype == torch.float16 else 1e-35)).all())
    bits = 7 if dtype == torch.bfloat16 else 4
    exact = (padded.abs() >= largest * 2.0**-bits) & (largest > 1e-4)
    assert bool((error[exact] == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("back", [read_back, made_back])
def test_zeros_stay_zeros_and_what_is_not_finite_spreads_over_its_block(
    back: Callable[[torch.Tensor, str], torch.Tensor], dtype: torch.dtype
) -> None:
    x = torch.zeros(2, 96, dtype=dtype, device=normal(1).device)
    x[0, 40], x[1, 70] = float("nan"), float("-inf")
    values = back(x, "int4")
    lost = values.isnan().view(2, 3, 32)
    assert bool(lost[0, 1].all()) and bool(lost[1, 2].all()) and int(lost.sum()) == 64
    assert float(values.nan_to_num(0.0).abs().sum()) == 0.0


@pytest.mark.parametrize(("back", "T"), [(made_back, 1), (read_back, 2)], ids=["made in the kernel", "made before"])
@pytest.mark.parametrize("weights", FORMATS)
def test_a_product_is_as_near_as_the_inputs_dtype_allows(
    weights: str, back: Callable[[torch.Tensor, str], torch.Tensor], T: int
) -> None:
    """Against float64 over the same weights, before the result is rounded: 2⁻¹⁵ a value, not bfloat16's 2⁻⁹."""
    from ktfx.triton_kernels.matmul import stored_weight

    from ktfx.ops.linear import LinearSpec, linear_kernel

    spec, device = LinearSpec(256, 24, weights), normal(1).device
    kernel = linear_kernel("triton")
    packed = kernel.pack(spec, normal(24, 256, seed=3, dtype=torch.bfloat16), device)
    x = normal(T, 256, seed=4, dtype=torch.bfloat16)
    assert stored_weight(weights, packed).integers(x)
    dense = kernel.dequantised(spec, packed).double().t()
    exact = x.double() @ dense
    wide = back(x, weights)[:, :256] @ dense
    assert float((wide - exact).norm() / exact.norm()) < 3e-5
    out = kernel.forward(spec, x, packed, None).double()
    assert float((out - exact).norm() / exact.norm()) < 3e-3

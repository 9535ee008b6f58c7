"""linear.cpu: the native kernel against float64 over the weight it keeps, every instruction set, and the ATen path."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ktfx.errors import HostCallError, KtfxWarning, WeightError
from ktfx.ops import experts_native, linear_cpu, linear_native, load_ops
from ktfx.ops.linear import LinearSpec, linear_kernel, linear_quant

load_ops()
CPU = torch.device("cpu")
KERNEL = linear_kernel("cpu")
FORMATS = ["model", "int8", "int4", "int4-g32", "int4-g128", "int4zp", "fp8", "mxfp4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 1e-3}
native = pytest.mark.skipif(not linear_native.available(), reason="the native kernels are not built")


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    experts_native.set_threads(0, 0)
    experts_native.set_isa(experts_native.isas()[0])


def check(spec: LinearSpec, rows: int, dtype: torch.dtype, bias: bool, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = (torch.randn(spec.out_features, spec.in_features, generator=g) * 0.1).to(dtype)
    x = torch.randn(rows, spec.in_features, generator=g).to(dtype)
    b = torch.randn(spec.out_features, generator=g).to(dtype) if bias else None
    packed = KERNEL.pack(spec, weight, CPU)
    assert [(m.shape, m.dtype) for m in KERNEL.packed_meta(spec, dtype)] == [(tuple(t.shape), t.dtype) for t in packed]
    kept = KERNEL.dequantised(spec, packed).double()
    got = linear_quant(x, packed, b, "cpu", spec.encode())
    want = x.double() @ kept.t() + (0 if b is None else b.double())
    assert got.shape == want.shape and got.dtype == dtype
    # A sum that cancels keeps the rounding of its terms: what such products come to on average counts too.
    usual = x.double().norm(dim=1).outer(kept.norm(dim=1)) / spec.in_features**0.5
    size = max(float(want.norm()), float(usual.norm()))
    assert float((got.double() - want).norm()) <= TOLERANCE[dtype] * size + 1e-6


@native
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_and_prefill(weights: str, dtype: torch.dtype) -> None:
    for rows in (1, 4, 16, 100):
        check(LinearSpec(200, 72, weights), rows, dtype, bias=True)


@native
@pytest.mark.parametrize("isa", ["amx", "amx-emulated"])
def test_amx_multiplies_int8_weights_as_they_are_stored(isa: str, threads: None) -> None:
    """Whole steps of 64 inputs as halves of int16; a row that is not finite spoils itself alone."""
    if isa not in experts_native.isas():
        pytest.skip(f"this machine has no {isa}")
    experts_native.set_isa(isa)
    for inputs, rows in ((64, 4), (192, 17), (4224, 100)):
        check(LinearSpec(inputs, 70, "int8"), rows, torch.bfloat16, bias=True)
    spec = LinearSpec(128, 48, "int8")
    packed = KERNEL.pack(spec, torch.randn(48, 128).bfloat16(), CPU)
    x = torch.randn(20, 128).bfloat16()
    want = linear_quant(x, packed, None, "cpu", spec.encode())
    x[7, 127] = torch.nan
    got = linear_quant(x, packed, None, "cpu", spec.encode())
    assert got[7].isnan().all() and torch.equal(got[:7], want[:7]) and torch.equal(got[8:], want[8:])


@native
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 120), n=st.integers(1, 150), k=st.integers(1, 700), weights=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(rows: int, n: int, k: int, weights: str, dtype: torch.dtype, bias: bool, seed: int) -> None:
    check(LinearSpec(k, n, weights), rows, dtype, bias, seed)


@native
@pytest.mark.parametrize("isa", experts_native.isas() if linear_native.available() else [])
def test_every_instruction_set(isa: str, threads: None) -> None:
    experts_native.set_isa(isa)
    for weights in ("model", "int8", "int4", "fp8", "mxfp4"):
        for rows in (1, 7, 40):
            check(LinearSpec(130, 50, weights), rows, torch.bfloat16, bias=True)


@native
@pytest.mark.parametrize("weights", ["model", "int8", "int4", "fp8"])
def test_threads_and_shares_do_not_change_a_bit(weights: str, threads: None) -> None:
    spec = LinearSpec(256, 300, weights)
    x = torch.randn(20, 256)
    packed = KERNEL.pack(spec, torch.randn(300, 256), CPU)
    results = []
    for count, shares in ((1, 1), (2, 1), (2, 2), (4, 2)):
        experts_native.set_threads(count, shares)
        results.append(linear_quant(x, packed, None, "cpu", spec.encode()))
    assert all(torch.equal(r, results[0]) for r in results[1:])


@native
def test_the_weight_is_the_one_of_the_other_kernels() -> None:
    """A GPU, simulated or real, and the host compute with the same numbers."""
    weight = torch.randn(40, 96)
    for weights in FORMATS:
        spec = LinearSpec(96, 40, weights)
        other = linear_kernel("triton")
        theirs = other.dequantised(spec, other.pack(spec, weight, CPU))
        assert torch.equal(KERNEL.dequantised(spec, KERNEL.pack(spec, weight, CPU)).float(), theirs.float())


@native
def test_int8_activations_are_asked_for() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(6, 256), torch.randn(64, 256)
    errors = []
    for activations in ("model", "int8"):
        spec = LinearSpec(256, 64, "int4", activations)
        packed = KERNEL.pack(spec, weight, CPU)
        want = x.double() @ KERNEL.dequantised(spec, packed).double().t()
        got = linear_quant(x, packed, None, "cpu", spec.encode()).double()
        errors.append(float((got - want).norm() / want.norm()))
    assert errors[0] < 1e-4 < errors[1] < 2e-2
    assert "not int8" in str(linear_kernel("triton").unsupported(spec, torch.float32, CPU))


@native
def test_leading_dimensions_strides_and_no_rows() -> None:
    torch.manual_seed(0)
    spec = LinearSpec(48, 24, "int8")
    packed = KERNEL.pack(spec, torch.randn(24, 48), CPU)
    x = torch.randn(2, 3, 96)[..., :48]
    want = x @ KERNEL.dequantised(spec, packed).t()
    torch.testing.assert_close(linear_quant(x, packed, None, "cpu", spec.encode()), want, atol=2e-3, rtol=1e-3)
    assert linear_quant(x[:0], packed, None, "cpu", spec.encode()).shape == (0, 3, 24)
    moved = [packed[0].clone(), packed[1]]  # a copy need not start on a cache line
    torch.testing.assert_close(linear_quant(x, moved, None, "cpu", spec.encode()), want, atol=2e-3, rtol=1e-3)


@native
def test_refusals() -> None:
    spec = LinearSpec(48, 24, "int8")
    packed = KERNEL.pack(spec, torch.randn(24, 48), CPU)
    with pytest.raises(HostCallError, match=r"torch.float64"):
        linear_quant(torch.randn(2, 48).double(), packed, None, "cpu", spec.encode())
    with pytest.raises(WeightError, match="not this spec's"):
        linear_quant(torch.randn(2, 48), packed, None, "cpu", LinearSpec(48, 24, "int4").encode())
    with pytest.raises(WeightError, match="NaN or inf"):
        KERNEL.pack(spec, torch.full((24, 48), float("nan")), CPU)
    assert "host" in str(KERNEL.unsupported(spec, torch.float32, torch.device("cuda:0")))


@pytest.mark.parametrize("weights", FORMATS)
def test_without_the_library(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_native, "available", lambda: False)
    linear_cpu._warn_once.cache_clear()
    spec = LinearSpec(96, 40, weights)
    with pytest.warns(KtfxWarning, match="linear.cpu runs on ATen"):
        KERNEL.pack(spec, torch.randn(40, 96), CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (1, 33):
            check(spec, rows, torch.float32, bias=True)

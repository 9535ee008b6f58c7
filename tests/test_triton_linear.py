"""The linear kernels against float64 over the weight they really compute with, and the op on CPU tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import DEVICE, DTYPES, FEW, assert_close, needs_kernels, normal, poisoned

from ktfx.formats import parse_format
from ktfx.ops.linear import LinearSpec, linear_kernel

pytestmark = needs_kernels

FORMATS = ["model", "int8", "int4", "int4-g32", "int4-g128", "int4zp", "fp8", "mxfp4"]


def check(
    spec: LinearSpec, M: int, dtype: torch.dtype, rows: bool, split: int = 1, bias: bool = False, seed: int = 0
) -> None:
    from ktfx.triton_kernels.linear import LinearConfig, linear

    kernel = linear_kernel("triton")
    packed = kernel.pack(spec, normal(spec.out_features, spec.in_features, seed=seed, dtype=dtype), DEVICE)
    assert [(tuple(t.shape), t.dtype) for t in packed] == [(m.shape, m.dtype) for m in kernel.packed_meta(spec, dtype)]
    x = normal(M, spec.in_features, seed=seed + 1, dtype=dtype)
    b = normal(spec.out_features, seed=seed + 2, dtype=dtype) if bias else None
    exact = x.double() @ kernel.dequantised(spec, packed).to(dtype).double().t()
    exact = exact if b is None else exact + b.double()
    _, group = parse_format(spec.weights)
    step = max(group, 64) if rows else max(64, group if group < 128 else 64)
    config = LinearConfig(rows, R=32, BM=(4, 1, 2, 2)[M % 4] if rows else 16, BK=step, SPLIT=split)
    out = poisoned(torch.empty(M, spec.out_features, dtype=dtype, device=DEVICE))
    assert linear(x, packed, b, spec.weights, spec.out_features, config, out) is out
    assert_close(out, exact, dtype)


@pytest.mark.parametrize("way", ["rows", "tiles", "split"])
@pytest.mark.parametrize("weights", FORMATS)
def test_every_format(weights: str, way: str) -> None:
    check(LinearSpec(200, 70, weights), 3, torch.bfloat16, way == "rows", 3 if way == "split" else 1, bias=True)


@pytest.mark.parametrize("weights", ["int4", "int4zp", "mxfp4"])
def test_scales_that_begin_between_words(weights: str) -> None:
    """Parts of a larger tensor may lie so; kernels read scales by words where they can."""
    from ktfx.triton_kernels.linear import LinearConfig, linear

    spec, kernel = LinearSpec(128, 40, weights), linear_kernel("triton")
    packed = kernel.pack(spec, normal(40, 128, dtype=torch.bfloat16), DEVICE)
    moved = [torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape) for t in packed[1:]]
    assert any(t.data_ptr() % 4 for t in moved)
    x = normal(3, 128, seed=1, dtype=torch.bfloat16)
    out = linear(x, [packed[0], *moved], None, weights, 40, LinearConfig(False, BK=64))
    assert_close(out, x.double() @ kernel.dequantised(spec, packed).to(x.dtype).double().t(), x.dtype)


@pytest.mark.parametrize("scales", ["usual", "tiny", "huge"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_byte_of_fp8_under_scales_of_every_size(dtype: torch.dtype, scales: str) -> None:
    """Subnormal codes and both zeros among them, blocks that end early, and blocks that are zero by their scale."""
    from ktfx.triton_kernels.linear import LinearConfig, linear

    if dtype == torch.float16 and scales != "usual":
        pytest.skip("float16 holds no such weights")
    N, K, M = 150, 202, 5
    generator = torch.Generator().manual_seed(3)
    codes = torch.arange(N * K).mul(7).remainder(256).to(torch.uint8).view(N, K)
    codes[codes % 128 == 127] = 0x80  # NaN
    factor = {"usual": 1e-3, "tiny": 2.0**-52, "huge": 2.0**62}[scales]
    blocks = (torch.rand(2, 2, generator=generator) + 0.5) * factor
    blocks[1, 0] = 0.0
    packed = [codes.view(torch.float8_e4m3fn).to(DEVICE), blocks.to(DEVICE)]
    wide = blocks.double().repeat_interleave(128, 0).repeat_interleave(128, 1)[:N, :K]
    x = normal(M, K, seed=1, dtype=dtype)
    exact = x.double() @ (codes.view(torch.float8_e4m3fn).double() * wide).to(dtype).double().t().to(DEVICE)
    out = poisoned(torch.empty(M, N, dtype=dtype, device=DEVICE))
    linear(x, packed, None, "fp8", N, LinearConfig(False, BK=64), out)
    assert_close(out.double() / factor, exact / factor, dtype)


@pytest.mark.parametrize("way", ["rows", "split"])
@pytest.mark.parametrize("weights", ["model", "int8", "int4", "fp8", "mxfp4"])
def test_float32_is_exact(weights: str, way: str) -> None:
    check(LinearSpec(128, 40, weights), 2, torch.float32, way == "rows", 2)


@settings(max_examples=6 if FEW else 60, deadline=None)
@given(
    M=st.integers(1, 40), n=st.integers(1, 80), k=st.integers(1, 150), rows=st.booleans(), split=st.integers(1, 3),
    weights=st.sampled_from(FORMATS), dtype=st.sampled_from(DTYPES), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(
    M: int, n: int, k: int, rows: bool, split: int, weights: str, dtype: torch.dtype, bias: bool, seed: int
) -> None:
    check(LinearSpec(k, n, weights), M, dtype, rows and M <= 4, split, bias, seed)


def test_the_op_keeps_leading_dimensions_and_takes_strides() -> None:
    spec = LinearSpec(48, 24, "int4-g32")
    kernel = linear_kernel("triton")
    packed = kernel.pack(spec, normal(24, 48), DEVICE)
    x = normal(2, 3, 96, seed=1)[..., :48]
    out = torch.ops.ktfx.linear_quant(x, packed, None, "triton", spec.encode())
    assert out.shape == (2, 3, 24)
    assert_close(out, x.double() @ kernel.dequantised(spec, packed).double().t(), torch.float32)
    assert torch.ops.ktfx.linear_quant(x[:0], packed, None, "triton", spec.encode()).shape == (0, 3, 24)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("M", [1, 3, 16, 100, 300])
@pytest.mark.parametrize("weights", FORMATS)
def test_own_choice_of_configuration(weights: str, M: int) -> None:
    spec = LinearSpec(2048, 1000, weights)
    kernel = linear_kernel("triton")
    packed = kernel.pack(spec, normal(1000, 2048, dtype=torch.bfloat16), DEVICE)
    x = normal(M, 2048, seed=1, dtype=torch.bfloat16)
    exact = x.double() @ kernel.dequantised(spec, packed).bfloat16().double().t()
    assert_close(kernel.forward(spec, x, packed, None), exact, torch.bfloat16)


@pytest.mark.parametrize("weights", ["model", "int4", "int8", "fp8"])
@pytest.mark.parametrize("parts", [1, 2])
def test_tiles_keep_fewer_steps_ahead_where_shared_memory_is_small(weights, parts, monkeypatch):
    """A step takes BK values of BM inputs and of parts · BN stored rows; Hopper has 227 KiB a program, others 99."""
    from ktfx.triton_kernels import matmul

    from ktfx.formats import quantize

    w = quantize(torch.ones(256, 256, dtype=torch.bfloat16), weights)
    weight = matmul.stored_weight(weights, w.tensors())
    bits = {"model": 16, "int4": 4}.get(weights, 8)
    for BM in (16, 128):
        stages = []
        for limit in (232_448, 101_376, 40_000):
            monkeypatch.setattr(matmul, "shared_memory", lambda device, limit=limit: limit)
            shape = matmul.tile_shape(weight, torch.bfloat16, BM, parts)
            step = shape.BK * (2 * BM + parts * shape.BN * bits / 8)
            assert shape.num_stages == 1 or shape.num_stages * step <= limit
            stages.append(shape.num_stages)
        assert stages == sorted(stages, reverse=True) and stages[0] >= 3

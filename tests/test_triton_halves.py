"""Inputs in two halves of eight bits, and experts and linear layers of eight bits that are multiplied as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import DEVICE, FEW, INTERPRETED, assert_close, needs_kernels, normal, poisoned, relative

import ktfx.ops.experts_triton  # noqa: F401  (registers the kernel)
from ktfx.ops.experts import ExpertsSpec, experts_kernel, reference_experts
from ktfx.ops.linear import LinearSpec, linear_kernel

pytestmark = needs_kernels

# What is lost of a value, of its row's largest.
LOSS = {"fp8": 2.0**-17, "int8": 0.52 / 32639}


def read_back(x: torch.Tensor, fmt: str) -> torch.Tensor:
    from ktfx.triton_kernels.input_halves import halved_inputs

    found = halved_inputs(x, fmt)
    high, low = found.halves.double()
    return (high * (256 if fmt == "int8" else 1) + low) * found.scales.double()[:, None]


def able() -> None:
    from ktfx.triton_kernels.launch import takes_descriptors

    if not takes_descriptors(torch.device(DEVICE)):
        pytest.skip("no descriptors before Hopper")


@pytest.mark.parametrize("fmt", ["fp8", "int8"])
@settings(max_examples=6 if FEW else 60, deadline=None)
@given(T=st.integers(1, 5), K=st.integers(1, 300), seed=st.integers(0, 99), size=st.integers(-60, 60))
def test_both_halves_are_the_value(fmt: str, T: int, K: int, seed: int, size: int) -> None:
    able()
    x = (normal(T, K, seed=seed) * 2.0**size).bfloat16()
    error = (read_back(x, fmt) - x.double()).abs().amax(1)
    assert (error <= LOSS[fmt] * x.double().abs().amax(1)).all()


def test_fp8_halves_are_exact_for_values_near_their_largest() -> None:
    """Every bfloat16 mantissa, over ten binades."""
    able()
    mantissa = torch.arange(128, 256, device=DEVICE, dtype=torch.float32)
    x = (mantissa[None, :] * 2.0 ** torch.arange(-9, 1, device=DEVICE)[:, None]).reshape(1, -1).bfloat16()
    x = torch.cat((x, -x), 1)
    assert torch.equal(read_back(x, "fp8"), x.double())


@pytest.mark.parametrize("fmt", ["fp8", "int8"])
def test_zeros_stay_zeros_and_what_is_not_finite_spreads_over_its_row(fmt: str) -> None:
    able()
    x = normal(5, 48, dtype=torch.bfloat16)
    x[1] = 0.0
    x[2, 7], x[3, 0] = float("inf"), float("nan")
    x[4] = 1e-38
    back = read_back(x, fmt)
    assert (back[1] == 0).all() and back[2:4].isnan().all() and back[[0, 1, 4]].isfinite().all()


@pytest.mark.parametrize("weights", ["fp8", "int8"])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"gate": "clamped", "alpha": 1.5, "limit": 0.5, "has_bias": True, "transposed": True, "interleaved": True},
        {"gate": "none", "activation": "relu2", "has_bias": True},
    ],
    ids=["gated", "gpt-oss", "no-gate"],
)
def test_experts_as_they_are_stored(extra: dict[str, Any], weights: str) -> None:
    """H and I are no whole tiles, so tiles read past an expert: expert 3, all NaN, follows 2 and gets no token."""
    from ktfx.triton_kernels import experts

    able()
    E, H, inter, dtype = 5, 144, 80, torch.bfloat16
    spec = ExpertsSpec(E, H, inter, weights=weights, **extra)
    kernel, rows = experts_kernel("triton"), spec.up_rows
    up, down = normal(E, rows, H, seed=1, dtype=dtype, scale=0.1), normal(E, H, inter, seed=2, dtype=dtype, scale=0.1)
    made = {"gate_up_bias": normal(E, rows, seed=3, dtype=dtype), "down_bias": normal(E, H, seed=4, dtype=dtype)}
    for name, weight in (("gate_up", up), ("down", down)):
        made[name] = weight.transpose(1, 2).contiguous() if spec.transposed else weight
    packed = kernel.pack(spec, made, DEVICE)
    exact_weights = {k: v.double() for k, v in kernel.dequantised(spec, packed).items()}
    for tensor in packed:
        # fp8's codes and scales; int8 itself has no NaN.
        tensor[3] = float("nan") if tensor.dtype.is_floating_point else 127
    T = 20 if INTERPRETED else 300
    x = normal(T, H, dtype=dtype)
    ids = torch.tensor([[2, 0], [4, 2], [2, 1], [9, 2]], device=DEVICE).repeat(T // 4, 1)
    share = torch.rand(T, 2, device=DEVICE)
    known = torch.where(ids < E, share, 0.0).double()
    exact = reference_experts(spec, x.double(), ids.clamp(max=4), known, exact_weights)
    block = 16 if INTERPRETED else 64
    first = experts.TilesConfig(block, 128 // spec.up_parts, 128, 2, 4, 3, 16, halves=True)
    second = experts.TilesConfig(block, 128, 128, 2, 4, 3, 16, halves=True)
    out = poisoned(x)
    experts.routed_experts(spec, x, ids, share, packed, pairs=False, configs=(first, second), out=out)
    assert_close(out, exact, dtype)


@pytest.mark.parametrize("weights", ["fp8", "int8"])
def test_experts_err_no_more_than_with_float_weights(weights: str) -> None:
    """An outlier takes most of the range: what is left for the other values must still do."""
    from ktfx.triton_kernels import experts

    able()
    spec = ExpertsSpec(2, 256, 128, weights=weights)
    kernel = experts_kernel("triton")
    tensors = {"gate_up": normal(2, 256, 256, seed=1, scale=0.1), "down": normal(2, 256, 128, seed=2, scale=0.1)}
    packed = kernel.pack(spec, {k: v.bfloat16() for k, v in tensors.items()}, DEVICE)
    x = normal(24, 256, dtype=torch.bfloat16)
    x[:, 5] *= 500
    ids, share = torch.zeros(24, 1, dtype=torch.int64, device=DEVICE), torch.ones(24, 1, device=DEVICE)
    plain = kernel.dequantised(spec, packed)
    exact = reference_experts(spec, x.double(), ids, share.double(), {k: v.double() for k, v in plain.items()})
    rounded = reference_experts(spec, x, ids, share, {k: v.bfloat16() for k, v in plain.items()})
    config = (experts.TilesConfig(16 if INTERPRETED else 64, 64, 128, 8, 4, 3, halves=True),) * 2
    out = experts.routed_experts(spec, x, ids, share, packed, pairs=False, configs=config)
    assert relative(out, exact) <= 1.5 * relative(rounded, exact)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("weights", ["fp8", "int8"])
@pytest.mark.parametrize(("M", "N", "K"), [(37, 200, 272), (5, 64, 640), (1, 1, 16)])
def test_linears_as_they_are_stored(weights: str, M: int, N: int, K: int, split: int) -> None:
    from ktfx.triton_kernels.linear import LinearConfig, linear

    able()
    kernel, spec = linear_kernel("triton"), LinearSpec(K, N, weights)
    packed = kernel.pack(spec, normal(N, K, dtype=torch.bfloat16), DEVICE)
    x = normal(M, 2 * K, seed=1, dtype=torch.bfloat16)[:, :K]
    bias = normal(N, seed=2, dtype=torch.bfloat16)
    exact = x.double() @ kernel.dequantised(spec, packed).double().t() + bias.double()
    config = LinearConfig(False, BM=32, BN=64, BK=128, SPLIT=split, num_stages=2, halves=True)
    out = poisoned(torch.empty(M, N, dtype=torch.bfloat16, device=DEVICE))
    assert_close(linear(x, packed, bias, weights, N, config, out), exact, torch.bfloat16)


@pytest.mark.parametrize("weights", ["fp8", "int8", "int4", "model"])
@pytest.mark.parametrize("K", [128, 136, 144])
def test_which_weights_are_multiplied_so(weights: str, K: int) -> None:
    from ktfx.triton_kernels.linear import linear_config
    from ktfx.triton_kernels.matmul import stored_weight

    able()
    packed = linear_kernel("triton").pack(LinearSpec(K, 32, weights), normal(32, K, dtype=torch.bfloat16), DEVICE)
    weight = stored_weight(weights, packed)
    eight, aligned = weights in ("fp8", "int8"), K % 16 == 0
    assert weight.takes_halves(torch.bfloat16) == (eight and aligned)
    assert weight.takes_halves(torch.float16) == (weights == "int8" and aligned)
    assert not weight.takes_halves(torch.float32)
    assert linear_config(weight, 64, 32, K, torch.bfloat16).halves == (eight and aligned)
    assert not linear_config(weight, 16, 32, K, torch.bfloat16).halves

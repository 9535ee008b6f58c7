"""Checkpoints that come quantised: every kernel computes with exactly the numbers of the format's own formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_files import words

from ktfx.errors import WeightError
from ktfx.formats import QuantizedWeight, dequantize, format_name, from_fp8_blocks, from_mxfp4_blocks, parse_format
from ktfx.ops import load_ops
from ktfx.ops.linear import LinearSpec, linear_kernel, linear_quant
from ktfx.quantised_checkpoints import (
    AWQ_ORDER,
    import_awq,
    import_compressed_tensors,
    import_gptq,
    in_model_order,
)

CPU = torch.device("cpu")


def random_parts(K: int, N: int, group: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes (K, N), zeros (G, N), scales (G, N) in float16."""
    g = torch.Generator().manual_seed(seed)
    G = -(-K // group)
    codes, zeros = torch.randint(0, 16, (K, N), generator=g), torch.randint(1, 16, (G, N), generator=g)
    return codes, zeros, (torch.rand(G, N, generator=g) * 0.05 + 0.001).half()


def exactly(weight: QuantizedWeight, want_NK: torch.Tensor) -> None:
    """The format's reference and every kernel's own layout give ``want``, to the bit."""
    load_ops()
    assert torch.equal(dequantize(weight), want_NK.float())
    spec = LinearSpec(weight.shape[1], weight.shape[0], format_name(parse_format(weight.format)[0], weight.group))
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    for name in ("reference", "triton", "cpu"):
        kernel = linear_kernel(name)
        packed = kernel.pack(spec, weight, CPU)
        assert torch.equal(kernel.dequantised(spec, packed).float(), want_NK.float()), name
        got = linear_quant(x, packed, None, name, spec.encode())
        exact = x.double() @ want_NK.double().t()
        assert float((got.double() - exact).norm() / exact.norm()) < 1e-4, name  # the host's kernel rounds x to int16


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_gptq(group: int) -> None:
    codes, zeros, scales = random_parts(256, 40, group)
    got = import_gptq(words(codes, 0), words(zeros - 1, 1), scales)
    want = scales.float()[torch.arange(256) // group] * (codes - zeros[torch.arange(256) // group]).float()
    assert got.order is None and got.weight.format == "int4zp" and got.weight.group == min(group, 128)
    exactly(got.weight, want.t())
    v2 = import_gptq(words(codes, 0), words(zeros, 1), scales, zero_offset=0)
    exactly(v2.weight, want.t())


def test_a_zero_point_of_sixteen() -> None:
    """GPTQ stores zero − 1 in four bits, so that a zero may be 16."""
    codes, zeros, scales = random_parts(64, 16, 64)
    zeros[0, 3] = 16
    got = import_gptq(words(codes, 0), words(zeros - 1, 1), scales)
    exactly(got.weight, (scales.float() * (codes - zeros).float()).t())


def test_symmetric_gptq_needs_no_zero_points() -> None:
    codes, zeros, scales = random_parts(128, 24, 64)
    got = import_gptq(words(codes, 0), words(torch.full_like(zeros, 7), 1), scales).weight
    assert (got.format, got.zeros) == ("int4", None)
    exactly(got, (scales.float()[torch.arange(128) // 64] * (codes - 8).float()).t())


def test_act_order() -> None:
    codes, zeros, scales = random_parts(128, 24, 32)
    g_idx = (torch.arange(128) // 32)[torch.randperm(128, generator=torch.Generator().manual_seed(1))].to(torch.int32)
    got = import_gptq(words(codes, 0), words(zeros - 1, 1), scales, g_idx)
    want = (scales.float()[g_idx.long()] * (codes - zeros[g_idx.long()]).float()).t()
    assert got.order is not None
    assert torch.equal(in_model_order(got, dequantize(got.weight)), want)
    x = torch.randn(2, 128, dtype=torch.float64)
    assert torch.allclose(x[:, got.order] @ dequantize(got.weight).double().t(), x @ want.double().t())
    plain = import_gptq(words(codes, 0), words(zeros - 1, 1), scales, (torch.arange(128) // 32).int())
    assert plain.order is None


def test_awq() -> None:
    codes, zeros, scales = random_parts(192, 48, 64)
    got = import_awq(words(codes, 1, AWQ_ORDER), words(zeros, 1, AWQ_ORDER), scales)
    at = torch.arange(192) // 64
    exactly(got.weight, (scales.float()[at] * (codes - zeros[at]).float()).t())


@pytest.mark.parametrize("zero", ["none", "int8", "packed"])
@pytest.mark.parametrize("group", [32, 128, 0])
def test_compressed_tensors(group: int, zero: str) -> None:
    N, K = 20, 256
    g = torch.Generator().manual_seed(2)
    G = K // group if group else 1
    q = torch.randint(-8, 8, (N, K), generator=g)
    zeros = torch.randint(-8, 8, (N, G), generator=g) if zero != "none" else torch.zeros(N, G, dtype=torch.long)
    scales = (torch.rand(N, G, generator=g) * 0.05 + 0.001).bfloat16()
    stored = {"none": None, "int8": zeros.to(torch.int8), "packed": words(zeros + 8, 0)}[zero]
    got = import_compressed_tensors(words(q + 8, 1), scales, stored, torch.tensor([N, K]))
    at = torch.arange(K) // (group or K)
    assert got.weight.format == ("int4" if zero == "none" else "int4zp")
    exactly(got.weight, scales.float()[:, at] * (q - zeros[:, at]).float())


@settings(max_examples=25, deadline=None)
@given(N=st.integers(1, 30), words_K=st.integers(1, 20), seed=st.integers(0, 99))
def test_a_scale_a_row_with_any_number_of_inputs(N: int, words_K: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    K = words_K * 8 - int(torch.randint(0, 8, (), generator=g))
    q = torch.randint(-8, 8, (N, K), generator=g)
    scales = torch.rand(N, 1, generator=g)
    got = import_compressed_tensors(words(q + 8, 1), scales, None, (N, K)).weight
    assert torch.equal(dequantize(got), scales * q.float())


@pytest.mark.parametrize("shape", [(256, 384), (200, 130)])
def test_deepseek_fp8(shape: tuple[int, int]) -> None:
    N, K = shape
    g = torch.Generator().manual_seed(3)
    weight = (torch.randn(N, K, generator=g) * 100).to(torch.float8_e4m3fn)
    scale_inv = torch.rand(-(-N // 128), -(-K // 128), generator=g) * 1e-3
    want = weight.float() * scale_inv.repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)[:, :K]
    got = from_fp8_blocks(weight, scale_inv)
    exactly(got, want)
    for name in ("reference", "triton"):
        kept = linear_kernel(name).pack(LinearSpec(K, N, "fp8"), got, CPU)
        assert torch.equal(kept[0].view(torch.uint8), weight.view(torch.uint8)) and torch.equal(kept[1], scale_inv)


def test_deepseek_fp8_as_transformers_dequantises_it() -> None:
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    weight = (torch.randn(256, 384) * 100).to(torch.float8_e4m3fn)
    scale_inv = torch.rand(2, 3) * 1e-3
    theirs = module.Fp8Dequantize(None)._dequantize_one(weight, scale_inv)
    assert torch.equal(dequantize(from_fp8_blocks(weight, scale_inv)), theirs.float())


def test_gpt_oss_as_transformers_dequantises_it() -> None:
    """transformers gives (E, K, N): its experts are transposed."""
    module = pytest.importorskip("transformers.integrations.mxfp4")
    g = torch.Generator().manual_seed(4)
    blocks = torch.randint(0, 256, (3, 48, 4, 16), dtype=torch.uint8, generator=g)
    scales = torch.randint(118, 132, (3, 48, 4), dtype=torch.uint8, generator=g)
    theirs = module.convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.float32)
    got = from_mxfp4_blocks(blocks, scales)
    assert torch.equal(dequantize(got), theirs.transpose(1, 2))
    one = QuantizedWeight("mxfp4", got.shape[1:], got.data[0], got.scales[0], None, 32)  # type: ignore[index]
    exactly(one, theirs[0].t())


def test_what_cannot_be_read() -> None:
    codes, zeros, scales = random_parts(96, 16, 48)
    with pytest.raises(WeightError, match="groups have 48 inputs"):
        import_gptq(words(codes, 0), words(zeros - 1, 1), scales)
    codes, zeros, scales = random_parts(64, 16, 32)
    packed, packed_zeros = words(codes, 0), words(zeros - 1, 1)
    with pytest.raises(WeightError, match=r"qweight .* is torch.int64|qweight of the GPTQ layer is torch.int64"):
        import_gptq(packed.long(), packed_zeros, scales)
    with pytest.raises(WeightError, match="do not fit together"):
        import_gptq(packed, packed_zeros, scales[:, :8])
    with pytest.raises(WeightError, match="unequal size"):
        import_gptq(packed, packed_zeros, scales, torch.tensor([0] * 40 + [1] * 24))
    with pytest.raises(WeightError, match="do not fit together"):
        import_awq(packed, packed_zeros, scales)
    with pytest.raises(WeightError, match="quantised already, as int4zp"):
        spec = LinearSpec(64, 16, "fp8")
        linear_kernel("reference").pack(spec, import_gptq(packed, packed_zeros, scales).weight, CPU)

"""ktfx.formats: every format's round trip, layout, search and errors, against values worked out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ktfx import formats
from ktfx.errors import WeightError
from ktfx.formats import dequantize, from_tensors, parse_format, quantize, relative_error, storage

QUANTISED = ["int8", "int4", "int4-g32", "int4-g128", "int4zp", "int4zp-g32", "fp8", "mxfp4"]
# Normal weights, rounded to nearest: what each format must stay under.
BOUND = {"int8": 0.011, "int4": 0.15, "int4zp": 0.12, "fp8": 0.032, "mxfp4": 0.17}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", QUANTISED)
def test_error_is_small_and_search_never_hurts(name: str, dtype: torch.dtype) -> None:
    w = normal(3, 40, 256, dtype=dtype)
    form, _ = parse_format(name)
    plain, searched = quantize(w, name), quantize(w, name, search=True)
    assert 0 < relative_error(w, plain) < BOUND[form.name]
    assert relative_error(w, searched) <= relative_error(w, plain) * (1 + 1e-6)
    if form.name.startswith("int4"):
        assert relative_error(w, searched) < 0.97 * relative_error(w, plain)


@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (2, 130, 33), (2, 3, 7, 100)])
@pytest.mark.parametrize("name", QUANTISED)
def test_awkward_shapes_are_padded_and_storage_says_so_beforehand(name: str, shape: tuple[int, ...]) -> None:
    w = normal(*shape, dtype=torch.bfloat16)
    q = quantize(w, name)
    assert [(tuple(t.shape), t.dtype) for t in q.tensors()] == storage(name, shape, w.dtype)
    back = dequantize(q, torch.float64)
    assert back.shape == w.shape
    # No value is further off than half a step of the largest value in the weight (mxfp4's top step is a quarter).
    assert float((back - w.double()).abs().max()) <= float(w.abs().max()) * 0.26
    again = from_tensors(name, shape, q.tensors())
    assert torch.equal(dequantize(again), dequantize(q))


@pytest.mark.parametrize("name", ["int8", "int4", "int4-g32", "fp8", "mxfp4"])
def test_rounding_twice_changes_nothing(name: str) -> None:
    w = dequantize(quantize(normal(130, 256), name))
    assert relative_error(w, quantize(w, name)) < 1e-6


@pytest.mark.parametrize("name", QUANTISED)
def test_zeros_stay_zeros(name: str) -> None:
    zeros = torch.zeros(4, 64)
    for search in (False, True):
        assert torch.equal(dequantize(quantize(zeros, name, search=search)), zeros)


def test_every_code_of_int4_and_mxfp4() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)[None]
    int4 = formats.QuantizedWeight("int4", (1, 32), formats.pack_nibbles(codes), torch.tensor([[0.5]]), None, 32)
    assert dequantize(int4)[0, :16].tolist() == [(c - 8) * 0.5 for c in range(16)]
    exponents = torch.tensor([[128]], dtype=torch.uint8)
    mx = formats.QuantizedWeight("mxfp4", (1, 32), formats.pack_nibbles(codes), exponents, None, 32)
    assert dequantize(mx)[0, :16].tolist() == [
        2 * v for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)
    ]


def test_nibble_layout() -> None:
    codes = torch.zeros(1, 64, dtype=torch.uint8)
    codes[0, 0], codes[0, 16], codes[0, 33], codes[0, 63] = 3, 12, 5, 9
    packed = formats.pack_nibbles(codes)
    assert packed.shape == (1, 32)
    assert (packed[0, 0], packed[0, 17], packed[0, 31]) == (3 | 12 << 4, 5, 9 << 4)
    assert torch.equal(formats.unpack_nibbles(packed), codes)


def test_mxfp4_ties_go_to_the_even_mantissa() -> None:
    row = torch.zeros(1, 32)
    row[0, :8] = torch.tensor([4.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, -5.0])
    assert dequantize(quantize(row, "mxfp4"))[0, :8].tolist() == [4.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, -4.0]


def test_gpt_oss_blocks_keep_their_bits() -> None:
    codes = torch.randint(0, 16, (2, 3, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    pairs = codes.view(2, 3, 2, 16, 2)
    blocks = pairs[..., 0] | (pairs[..., 1] << 4)
    scales = torch.randint(120, 130, (2, 3, 2), dtype=torch.uint8)
    q = formats.from_mxfp4_blocks(blocks, scales)
    assert q.shape == (2, 3, 64)
    assert torch.equal(formats.unpack_nibbles(q.data), codes)
    table = torch.tensor([*formats.E2M1, *(-v for v in formats.E2M1)])
    expected = table[codes.long()] * torch.exp2(scales.float() - 127).repeat_interleave(32, -1)
    assert torch.equal(dequantize(q), expected)
    with pytest.raises(WeightError, match="not an mxfp4 weight"):
        formats.from_mxfp4_blocks(blocks, scales[..., :1])


def test_deepseek_blocks_keep_their_bits() -> None:
    w = normal(200, 300)
    made = quantize(w, "fp8")
    q = formats.from_fp8_blocks(made.data, made.scales)
    assert torch.equal(dequantize(q), dequantize(made))
    assert float(dequantize(q)[129, 257]) == float(made.data[129, 257].float() * made.scales[1, 2])
    with pytest.raises(WeightError, match=r"\(2, 3\)"):
        formats.from_fp8_blocks(made.data, made.scales[:1])


def test_strides_do_not_matter() -> None:
    w = normal(2, 96, 40).transpose(1, 2)
    for name in QUANTISED:
        assert torch.equal(dequantize(quantize(w, name)), dequantize(quantize(w.contiguous(), name)))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000), n=st.integers(1, 9), k=st.integers(1, 140), scale=st.sampled_from([1e-6, 1.0, 1e4]),
    name=st.sampled_from(QUANTISED),
)  # fmt: skip
def test_error_per_group_is_bounded_by_its_step(seed: int, n: int, k: int, scale: float, name: str) -> None:
    w = normal(n, k, seed=seed) * scale
    form, group = parse_format(name)
    back = dequantize(quantize(w, name))
    span = {"int8": k, "fp8": 128}.get(form.name, group)
    step = {"int8": 0.51 / 127, "int4": 1.01 / 8, "int4zp": 1.02 / 15, "fp8": 0.04, "mxfp4": 0.26}[form.name]
    for start in range(0, k, span):
        part = w[:, start : start + span].abs()
        top = part.max() if form.name == "fp8" else part.amax(1, keepdim=True)
        low = 2.0 if form.name == "int4zp" else 1.0  # its range is from the least to the greatest value
        assert bool(((back - w)[:, start : start + span].abs() <= top * step * low + 1e-30).all())


def test_errors_name_the_nearest_and_the_mend() -> None:
    with pytest.raises(WeightError, match="did you mean 'int4'"):
        quantize(normal(2, 32), "int44")
    with pytest.raises(WeightError, match="32, 64, 128"):
        quantize(normal(2, 32), "int4-g48")
    with pytest.raises(WeightError, match="no group of 64"):
        parse_format("int8-g64")
    with pytest.raises(WeightError, match="-g<size>"):
        parse_format("int4-64")
    with pytest.raises(WeightError, match="floating point"):
        quantize(torch.zeros(4, 4, dtype=torch.int8), "int8")
    bad = normal(2, 64)
    bad[1, 3] = float("nan")
    with pytest.raises(WeightError, match="NaN"):
        quantize(bad, "int4")

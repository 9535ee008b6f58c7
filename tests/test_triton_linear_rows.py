"""linear_rows: one launch over several weights of one input, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import DTYPES, FEW, assert_close, needs_kernels, normal, poisoned

import ktfx.ops.linear_rows  # noqa: F401  (registers the op)
from ktfx.errors import KtfxError
from ktfx.ops.activations import gated_mul_reference
from ktfx.ops.experts import ACTIVATIONS
from ktfx.ops.norms import KINDS, rms_norm_reference

pytestmark = needs_kernels


@settings(max_examples=6 if FEW else 120, deadline=None)
@given(
    M=st.integers(0, 2), K=st.integers(1, 150), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES), bias=st.booleans(), R=st.sampled_from([1, 2, 4]), BK=st.sampled_from([16, 64, 256]),
    strided=st.booleans(), wide=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_values(
    M: int, K: int, sizes: list[int], dtype: torch.dtype, bias: bool, R: int, BK: int, strided: bool, wide: bool,
    seed: int,
) -> None:  # fmt: skip
    from ktfx.triton_kernels.linear_rows import RowsConfig, linear_rows

    x = normal(M, 2 * K, seed=seed, dtype=dtype)[:, ::2] if strided else normal(M, K, seed=seed, dtype=dtype)
    weights = [normal(n, K, seed=seed + i + 1, dtype=dtype, scale=K**-0.5) for i, n in enumerate(sizes)]
    biases = [normal(n, seed=seed + i + 9, dtype=dtype) for i, n in enumerate(sizes)] if bias else []
    own = torch.float32 if wide else dtype
    out = [poisoned(x.new_empty(M, n, dtype=own)) for n in sizes]
    made = linear_rows(x, weights, biases, wide, out=out, config=RowsConfig(R, BK, 4))
    for i, (y, w) in enumerate(zip(made, weights, strict=True)):
        assert y is out[i]
        assert_close(y, F.linear(x.double(), w.double(), biases[i].double() if bias else None), own)


@settings(max_examples=6 if FEW else 120, deadline=None)
@given(
    M=st.integers(1, 2), K=st.integers(1, 150), sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES), kind=st.sampled_from(KINDS), add=st.booleans(), R=st.sampled_from([1, 2, 4]),
    BK=st.sampled_from([16, 64, 256]), wide=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_with_the_norm_before(
    M: int, K: int, sizes: list[int], dtype: torch.dtype, kind: str, add: bool, R: int, BK: int, wide: bool, seed: int
) -> None:
    from ktfx.triton_kernels.linear_rows import RowsConfig, norm_linear_rows

    x, residual = (normal(M, K, seed=seed + i, dtype=dtype) for i in (0, 20))
    norm = normal(K, seed=seed + 21, dtype=dtype) + 1
    weights = [normal(n, K, seed=seed + i + 1, dtype=dtype, scale=K**-0.5) for i, n in enumerate(sizes)]
    own = torch.float32 if wide else dtype
    out = [poisoned(t) for t in (x, x)[: 1 + add]] + [poisoned(x.new_empty(M, n, dtype=own)) for n in sizes]
    config = RowsConfig(R, BK, 4)
    made = norm_linear_rows(x, residual if add else None, norm, 1e-6, kind, weights, [], wide, out=out, config=config)
    total = x + residual if add else x
    if add:
        assert torch.equal(made[1], total)
    y = rms_norm_reference(total, norm, 1e-6, kind)
    assert_close(made[0], y.double(), dtype)
    for result, w in zip(made[1 + add :], weights, strict=True):
        assert_close(result, F.linear(made[0].double(), w.double()), own)


@settings(max_examples=6 if FEW else 120, deadline=None)
@given(
    M=st.integers(1, 2), K=st.integers(1, 150), N=st.integers(1, 40), dtype=st.sampled_from(DTYPES),
    act=st.sampled_from(sorted(ACTIVATIONS)), kind=st.sampled_from(["", *KINDS]), add=st.booleans(), bias=st.booleans(),
    R=st.sampled_from([1, 2, 4, 8]), BK=st.sampled_from([16, 64, 256]), seed=st.integers(0, 99),
)  # fmt: skip
def test_gate_and_up(
    M: int, K: int, N: int, dtype: torch.dtype, act: str, kind: str, add: bool, bias: bool, R: int, BK: int, seed: int
) -> None:
    """One result of two weights; with the norm before, the normed input and its sum too."""
    from ktfx.triton_kernels.linear_rows import RowsConfig, linear_rows, norm_linear_rows

    x, residual = (normal(M, K, seed=seed + i, dtype=dtype) for i in (0, 20))
    weights = [normal(N, K, seed=seed + i + 1, dtype=dtype, scale=K**-0.5) for i in range(2)]
    biases = [normal(N, seed=seed + i + 9, dtype=dtype) for i in range(2)] if bias else []
    out, config = [poisoned(x.new_empty(M, N))], RowsConfig(R, BK, 4)
    if kind:
        norm, wanted = normal(K, seed=seed + 21, dtype=dtype) + 1, residual if add else None
        out = [poisoned(x.clone()) for _ in range(1 + add)] + out
        made = norm_linear_rows(x, wanted, norm, 1e-6, kind, weights, biases, act=act, out=out, config=config)
        x = made[0]
        assert len(made) == 2 + add
    else:
        made = linear_rows(x, weights, biases, act=act, out=out, config=config)
        assert len(made) == 1
    given: list[torch.Tensor | None] = [*biases] or [None, None]
    gate, up = (
        F.linear(x.double(), w.double(), None if b is None else b.double()).to(dtype).double()
        for w, b in zip(weights, given, strict=True)
    )
    # A gelu far below zero is what is left of 1 − 1: few digits of float32 that two ways to compute it share.
    times = 100.0 if act.startswith("gelu") and dtype == torch.float32 else 1.0
    assert_close(made[-1], gated_mul_reference(gate, up, act), dtype, times)


@settings(max_examples=6 if FEW else 120, deadline=None)
@given(
    M=st.integers(0, 2), K=st.integers(1, 150), N=st.integers(1, 40), dtype=st.sampled_from(DTYPES),
    bias=st.booleans(), shared=st.booleans(), R=st.sampled_from([1, 2, 4]), BK=st.sampled_from([16, 64, 256]),
    strided=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_added_to_another(
    M: int, K: int, N: int, dtype: torch.dtype, bias: bool, shared: bool, R: int, BK: int, strided: bool, seed: int
) -> None:
    from ktfx.triton_kernels.linear_rows import RowsConfig, linear_rows_add

    x, w = normal(M, K, seed=seed, dtype=dtype), normal(N, K, seed=seed + 1, dtype=dtype, scale=K**-0.5)
    b = normal(N, seed=seed + 2, dtype=dtype) if bias else None
    addend = normal(M, 2 * N, seed=seed + 3, dtype=dtype)[:, ::2] if strided else normal(M, N, seed=seed, dtype=dtype)
    share = normal(M, 1, seed=seed + 4, dtype=dtype) if shared else None
    out = poisoned(x.new_empty(M, N))
    made = linear_rows_add(x, w, b, addend, share, out=out, config=RowsConfig(R, BK, 4))
    assert made is out
    y = F.linear(x.double(), w.double(), None if b is None else b.double()).to(dtype).double()
    assert_close(made, addend.double() + (y if share is None else y * share.double().sigmoid()), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_rounded_as_sums_of_separate_kernels_are(dtype: torch.dtype) -> None:
    x, w, addend = normal(1, 96, dtype=dtype), normal(33, 96, seed=1, dtype=dtype), normal(1, 33, seed=2, dtype=dtype)
    (apart,) = torch.ops.ktfx.linear_rows(x, [w], [])
    assert torch.equal(torch.ops.ktfx.linear_rows_add(x, w, None, addend), addend + apart)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_op_picks_a_configuration_and_keeps_leading_dimensions(dtype: torch.dtype) -> None:
    x = normal(1, 2, 96, dtype=dtype)
    weights = [normal(n, 96, seed=n, dtype=dtype, scale=0.1) for n in (33, 7)]
    made = torch.ops.ktfx.linear_rows(x, weights, [])
    assert [y.shape for y in made] == [(1, 2, 33), (1, 2, 7)] and all(y.is_contiguous() for y in made)
    for y, w in zip(made, weights, strict=True):
        assert_close(y, F.linear(x.double(), w.double()), dtype)


def test_more_rows_than_the_kernel_is_for() -> None:
    x, w = normal(3, 16), normal(5, 16, seed=1)
    assert_close(torch.ops.ktfx.linear_rows(x, [w], [])[0], F.linear(x.double(), w.double()), torch.float32)


def test_weights_that_do_not_fit() -> None:
    x = normal(1, 16)
    for weights, biases in (([], []), ([normal(4, 8)], []), ([normal(4, 16)] * 2, [normal(4)])):
        with pytest.raises(KtfxError, match="linear_rows got"):
            torch.ops.ktfx.linear_rows(x, weights, biases)


def test_gates_and_sums_that_do_not_fit() -> None:
    x, w = normal(1, 16), normal(4, 16)
    with pytest.raises(KtfxError, match="no activation 'swish'"):
        torch.ops.ktfx.linear_rows(x, [w, w], [], act="swish")
    for weights, wide in (([w], False), ([w, normal(5, 16)], False), ([w, w], True)):
        with pytest.raises(KtfxError, match="linear_rows got act='silu'"):
            torch.ops.ktfx.linear_rows(x, weights, [], wide, "silu")
    for addend, share in ((normal(1, 5), None), (normal(2, 4), None), (normal(1, 4), normal(1, 2))):
        with pytest.raises(KtfxError, match="linear_rows_add got"):
            torch.ops.ktfx.linear_rows_add(x, w, None, addend, share)

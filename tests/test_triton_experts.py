"""The experts' Triton kernels, both paths, every format, against float64 over the weights they really compute with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import DEVICE, DTYPES, FEW, INTERPRETED, assert_close, needs_kernels, normal, poisoned

import ktfx.ops.experts_triton  # noqa: F401  (registers the kernel)
from ktfx.formats import parse_format
from ktfx.ops.experts import ExpertsSpec, experts_kernel, reference_experts

pytestmark = needs_kernels

FORMATS = ["model", "int8", "int4", "int4-g32", "int4-g128", "int4zp", "fp8", "mxfp4"]


def make(spec: ExpertsSpec, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    E, H, inter = spec.num_experts, spec.hidden, spec.intermediate
    rows = spec.up_rows
    shapes = {"gate_up": (E, rows, H), "down": (E, H, inter), "gate_up_bias": (E, rows), "down_bias": (E, H)}
    tensors = {k: normal(*s, seed=seed + i, dtype=dtype, scale=0.2) for i, (k, s) in enumerate(shapes.items())}
    if spec.transposed:
        tensors |= {k: tensors[k].transpose(1, 2).contiguous() for k in ("gate_up", "down")}
    return tensors


def exactly(spec: ExpertsSpec, packed: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.double() for k, v in experts_kernel("triton").dequantised(spec, packed).items()}


def routing(T: int, E: int, K: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    return ids.to(DEVICE), torch.rand(T, K, generator=generator).to(DEVICE)


def configs(spec: ExpertsSpec, pairs: bool, block: int) -> tuple[Any, Any]:
    """Few, large programs: the interpreter takes about a millisecond an operation."""
    from ktfx.triton_kernels.experts import PairsConfig, TilesConfig

    form, group = parse_format(spec.weights)
    if pairs:
        return (PairsConfig(64, max(group, 64), 4),) * 2
    bk = 64 if form.name in ("model", "int8", "fp8") or group != 128 else 128
    return (TilesConfig(block, 64, bk, 2, 4, 2),) * 2


def check(
    spec: ExpertsSpec, T: int, K: int, dtype: torch.dtype, pairs: bool, seed: int = 0, block: int = 16
) -> torch.Tensor:
    from ktfx.triton_kernels import experts

    kernel = experts_kernel("triton")
    assert kernel.unsupported(spec, dtype, DEVICE) is None
    packed = kernel.pack(spec, make(spec, dtype, seed), DEVICE)
    assert [(tuple(t.shape), t.dtype) for t in packed] == [(m.shape, m.dtype) for m in kernel.packed_meta(spec, dtype)]
    x = normal(T, spec.hidden, seed=seed + 9, dtype=dtype)
    ids, weights = routing(T, spec.num_experts, K, seed)
    plain = {k: v.to(dtype).double() for k, v in kernel.dequantised(spec, packed).items()}
    exact = reference_experts(spec, x.double(), ids, weights.double(), plain)
    out = poisoned(x)
    chosen = configs(spec, pairs, block) if INTERPRETED else None
    result = experts.routed_experts(spec, x, ids, weights, packed, pairs=pairs, configs=chosen, out=out)
    assert result is out
    assert_close(out, exact, dtype)
    return out


@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "tiles"])
@pytest.mark.parametrize("weights", FORMATS)
def test_every_format_at_awkward_sizes(weights: str, pairs: bool) -> None:
    spec = ExpertsSpec(5, 100, 72, weights=weights)
    check(spec, T=1 if FEW else 3, K=2 if FEW else 3, dtype=torch.bfloat16, pairs=pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["int8", "int4", "int4zp", "mxfp4"])
def test_pairs_whose_integers_are_made_in_the_kernels_and_before(weights: str, dtype: torch.dtype) -> None:
    from ktfx.triton_kernels.experts import MADE_FOR_MXFP4

    spec = ExpertsSpec(7, 96, 64, weights=weights)
    for T in (MADE_FOR_MXFP4, MADE_FOR_MXFP4 + 1):
        check(spec, T=T, K=2, dtype=dtype, pairs=True)


@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "tiles"])
@pytest.mark.parametrize("weights", ["model", "int8", "int4", "fp8", "mxfp4"])
def test_float32_is_exact(weights: str, pairs: bool) -> None:
    check(ExpertsSpec(3, 64, 48, weights=weights), T=2, K=2, dtype=torch.float32, pairs=pairs)


@pytest.mark.parametrize("dtype", DTYPES[1:2] if FEW else DTYPES)
@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "tiles"])
@pytest.mark.parametrize(
    "extra",
    [
        {"gate": "clamped", "alpha": 1.5, "limit": 0.5, "has_bias": True, "transposed": True, "interleaved": True},
        {"gate": "none", "activation": "relu2", "has_bias": True},
        {"activation": "gelu"},
        {"activation": "gelu_tanh"},
    ],
    ids=["gpt-oss", "no-gate", "gelu", "gelu_tanh"],
)
def test_layouts_gates_and_activations(extra: dict[str, Any], pairs: bool, dtype: torch.dtype) -> None:
    check(ExpertsSpec(4, 40, 32, **extra), T=2, K=2, dtype=dtype, pairs=pairs)


def test_experts_with_many_tiles_and_experts_with_none() -> None:
    spec = ExpertsSpec(6, 32, 16)
    from ktfx.triton_kernels import experts

    kernel = experts_kernel("triton")
    packed = kernel.pack(spec, make(spec, torch.float32), DEVICE)
    x = normal(40, 32)
    ids = torch.tensor([[4, 1]] * 37 + [[1, 0]] * 3, device=DEVICE, dtype=torch.int32)  # 2, 3 and 5 get nothing
    weights = torch.rand(40, 2, device=DEVICE)
    out = poisoned(x)
    experts.routed_experts(spec, x, ids, weights, packed, pairs=False, out=out)
    exact = reference_experts(
        spec, x.double(), ids, weights.double(), {k: v.double() for k, v in kernel.dequantised(spec, packed).items()}
    )
    assert_close(out, exact, torch.float32)


@pytest.mark.parametrize("weights", ["model", "int4"])
def test_an_experts_last_rows_take_half_a_tile_where_they_fit(weights: str) -> None:
    from ktfx.triton_kernels import experts

    spec = ExpertsSpec(4, 64, 32, weights=weights)
    kernel = experts_kernel("triton")
    packed = kernel.pack(spec, make(spec, torch.bfloat16), DEVICE)
    x = normal(60, 64, dtype=torch.bfloat16)
    ids = torch.tensor([0] * 37 + [1] * 16 + [2] * 7, device=DEVICE)[:, None]  # 32 + 5, 16 and 7 rows; 3 gets nothing
    share = torch.rand(60, 1, device=DEVICE)
    plain = {k: v.to(torch.bfloat16).double() for k, v in kernel.dequantised(spec, packed).items()}
    out = poisoned(x)
    experts.routed_experts(spec, x, ids, share, packed, pairs=False, configs=configs(spec, False, 32), out=out)
    assert_close(out, reference_experts(spec, x.double(), ids, share.double(), plain), torch.bfloat16)


@pytest.mark.parametrize("weights", ["model", "int8", "int4", "mxfp4", "fp8"])
def test_tiles_that_take_some_more_pairs(weights: str) -> None:
    """37 = 32 + 5 rows in one tile, 70 = 48 + 22 in two, 32 and 7 as ever; gates, biases and all."""
    from ktfx.triton_kernels import experts

    spec = ExpertsSpec(4, 64, 32, weights=weights, gate="clamped", has_bias=True)
    kernel = experts_kernel("triton")
    packed = kernel.pack(spec, make(spec, torch.bfloat16), DEVICE)
    counts = {0: 37, 1: 70, 2: 32, 3: 7}
    ids = torch.cat([torch.full((n,), e) for e, n in counts.items()])
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))].to(DEVICE)[:, None]
    x, share = normal(len(ids), 64, dtype=torch.bfloat16), torch.rand(len(ids), 1, device=DEVICE)
    plain = {k: v.to(torch.bfloat16).double() for k, v in kernel.dequantised(spec, packed).items()}
    out = poisoned(x)
    chosen = tuple(replace(c, MORE=16) for c in configs(spec, False, 32))
    experts.routed_experts(spec, x, ids, share, packed, pairs=False, configs=chosen, out=out)
    assert_close(out, reference_experts(spec, x.double(), ids, share.double(), plain), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"gate": "clamped", "alpha": 1.5, "limit": 0.5, "has_bias": True, "transposed": True, "interleaved": True},
        {"gate": "none", "activation": "relu2", "has_bias": True},
    ],
    ids=["gated", "gpt-oss", "no-gate"],
)
def test_plain_weights_by_descriptors(extra: dict[str, Any], dtype: torch.dtype) -> None:
    """H and I are no whole tiles, so tiles read past an expert: expert 3, all NaN, follows 2 and gets no token."""
    from ktfx.triton_kernels import experts
    from ktfx.triton_kernels.launch import takes_descriptors

    if not takes_descriptors(torch.device(DEVICE)):
        pytest.skip("no descriptors before Hopper")
    spec = ExpertsSpec(5, 192, 64, **extra)
    kernel = experts_kernel("triton")
    packed = kernel.pack(spec, make(spec, dtype), DEVICE)
    exact_weights = {k: v.nan_to_num() for k, v in exactly(spec, packed).items()}
    for tensor in packed:
        tensor[3] = float("nan")
    T = 40 if INTERPRETED else 300
    x = normal(T, spec.hidden, dtype=dtype)
    ids = torch.tensor([[2, 0], [4, 2], [2, 1], [9, 2]], device=DEVICE).repeat(T // 4, 1)
    weights = torch.rand(T, 2, device=DEVICE)
    known = torch.where(ids < 5, weights, 0.0).double()
    exact = reference_experts(spec, x.double(), ids.clamp(max=4), known, exact_weights)
    block = 32 if INTERPRETED else 128
    up = experts.TilesConfig(block, 256 // spec.up_parts, 64, 2, 8, 3, tma=True)
    down = experts.TilesConfig(block, 128, 64, 2, 8, 3, tma=True)
    assert all(experts.weight_of(spec, packed, i).takes_tma(dtype) for i in (0, 1))
    out = poisoned(x)
    experts.routed_experts(spec, x, ids, weights, packed, pairs=False, configs=(up, down), out=out)
    assert_close(out, exact, dtype)


@pytest.mark.parametrize(("hidden", "intermediate"), [(192, 64), (200, 64), (192, 72)])
def test_descriptors_need_whole_steps(hidden: int, intermediate: int) -> None:
    from ktfx.triton_kernels import experts
    from ktfx.triton_kernels.launch import takes_descriptors

    spec = ExpertsSpec(4, hidden, intermediate)
    packed = experts_kernel("triton").pack(spec, make(spec, torch.bfloat16), DEVICE)
    takes = [experts.weight_of(spec, packed, i).takes_tma(torch.bfloat16) for i in (0, 1)]
    serves = takes_descriptors(torch.device(DEVICE))
    assert takes == [serves and hidden % 64 == 0, serves and intermediate % 64 == 0]
    assert not experts.weight_of(spec, packed, 0).takes_tma(torch.float32)
    assert [c.tma for c in experts.tiles_choice(spec, packed, 128, torch.bfloat16)] == takes


@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "tiles"])
def test_ids_out_of_range_contribute_nothing(pairs: bool) -> None:
    from ktfx.triton_kernels import experts

    spec = ExpertsSpec(3, 32, 16)
    kernel = experts_kernel("triton")
    packed = kernel.pack(spec, make(spec, torch.float32), DEVICE)
    x = normal(2, 32)
    ids = torch.tensor([[1, -1], [3, 2]], device=DEVICE)
    weights = torch.rand(2, 2, device=DEVICE)
    out = experts.routed_experts(spec, x, ids, weights, packed, pairs=pairs, out=poisoned(x))
    kept = weights.double() * ((ids >= 0) & (ids < 3))
    exact = reference_experts(
        spec, x.double(), ids.clamp(0, 2), kept, {k: v.double() for k, v in kernel.dequantised(spec, packed).items()}
    )
    assert_close(out, exact, torch.float32)


def test_no_tokens() -> None:
    spec = ExpertsSpec(3, 32, 16)
    kernel = experts_kernel("triton")
    packed = kernel.pack(spec, make(spec, torch.float32), DEVICE)
    ids, weights = torch.zeros(0, 2, dtype=torch.int64, device=DEVICE), torch.zeros(0, 2, device=DEVICE)
    assert kernel.forward(spec, normal(0, 32), ids, weights, packed).shape == (0, 32)


def test_strided_inputs_and_the_op() -> None:
    spec = ExpertsSpec(4, 32, 16)
    kernel = experts_kernel("triton")
    packed = kernel.pack(spec, make(spec, torch.float32), DEVICE)
    x = normal(32, 3).t()
    ids, weights = routing(3, 4, 2)
    wide = torch.stack((ids, ids), -1)[..., 0]
    out = torch.ops.ktfx.routed_experts(x, wide, weights.half(), packed, "triton", spec.encode())
    exact = reference_experts(
        spec,
        x.double(),
        ids,
        weights.half().double(),
        {k: v.double() for k, v in kernel.dequantised(spec, packed).items()},
    )
    assert_close(out, exact, torch.float32)


@settings(max_examples=4 if FEW else 60, deadline=None)
@given(
    T=st.integers(1, 20), E=st.integers(1, 9), h=st.integers(1, 70), i=st.integers(1, 70), seed=st.integers(0, 99),
    weights=st.sampled_from(FORMATS), dtype=st.sampled_from(DTYPES), data=st.data(),
)  # fmt: skip
def test_any_shape(
    T: int, E: int, h: int, i: int, seed: int, weights: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    K = data.draw(st.integers(1, min(E, 3)))
    pairs = T <= 4 and data.draw(st.booleans())
    check(ExpertsSpec(E, h, i, weights=weights), T, K, dtype, pairs, seed)


@pytest.mark.parametrize("shape", [(1, 1, 1), (40, 7, 16), (300, 5, 16), (530, 130, 32)], ids=str)
@pytest.mark.parametrize("more", [0, 16])
def test_grouping_sorts_stably_and_covers_every_pair_once(shape: tuple[int, int, int], more: int) -> None:
    from ktfx.triton_kernels.grouping import group_pairs

    S, E, block = shape
    ids = torch.randint(0, E, (S, 1), generator=torch.Generator().manual_seed(S)).to(DEVICE)
    grouped = group_pairs(ids, E, block, more)
    assert torch.equal(grouped.order.long().cpu(), ids[:, 0].cpu().sort(stable=True).indices)
    covered = []
    for expert, first, count in grouped.tiles.tolist():
        assert 0 <= count <= block + more
        covered += range(first, first + count)
        assert all(int(ids[int(p), 0]) == expert for p in grouped.order[first : first + count])
    assert covered == list(range(S))
    used = sum(count > 0 for _, _, count in grouped.tiles.tolist())
    assert used == sum(-(-n // (block + more)) for n in ids.flatten().bincount().tolist())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("T", [1, 3, 16, 100])
@pytest.mark.parametrize("weights", FORMATS)
def test_real_sizes(weights: str, T: int) -> None:
    check(ExpertsSpec(32, 1024, 512, weights=weights), T, 4, torch.bfloat16, pairs=T < 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("T", [1, 16, 300])
def test_cuda_graph_replays_with_other_routing(T: int) -> None:
    spec = ExpertsSpec(16, 256, 128)
    kernel = experts_kernel("triton")
    packed = kernel.pack(spec, make(spec, torch.bfloat16), DEVICE)
    x = normal(T, 256, dtype=torch.bfloat16)
    ids, weights = routing(T, 16, 4)
    kernel.forward(spec, x, ids, weights, packed)  # compile outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel.forward(spec, x, ids, weights, packed)
    ids.fill_(3)
    ids[:, 1:] = torch.arange(4, 7, device=DEVICE)
    out.fill_(float("nan"))
    graph.replay()
    plain = {k: v.double() for k, v in kernel.dequantised(spec, packed).items()}
    assert_close(out, reference_experts(spec, x.double(), ids, weights.double(), plain), torch.bfloat16)

"""``experts.cpu`` as the program calls it: against the reference, over layouts, dtypes, activations and routings."""

import itertools

import pytest
import torch

from ktfx.errors import HostCallError
from ktfx.ops.experts import ExpertsSpec, plain_layout, reference_experts, routed_experts
from ktfx.ops.experts_cpu import CPU_KERNEL, aten_experts

GATES = [
    ("mul", "silu"),
    ("mul", "gelu"),
    ("mul", "gelu_tanh"),
    ("clamped", "silu"),
    ("none", "relu2"),
    ("none", "none"),
]


def model_tensors(spec, dtype, seed=0):
    """Random tensors as the model of this spec would hold them."""
    g = torch.Generator().manual_seed(seed)
    E, H, inter = spec.num_experts, spec.hidden, spec.intermediate
    rows = inter if spec.gate == "none" else 2 * inter
    shapes = {"gate_up": (E, rows, H), "down": (E, H, inter)}
    if spec.transposed:
        shapes = {name: (s[0], s[2], s[1]) for name, s in shapes.items()}
    if spec.has_bias:
        shapes |= {"gate_up_bias": (E, rows), "down_bias": (E, H)}
    return {name: (torch.randn(s, generator=g) * 0.2).to(dtype) for name, s in shapes.items()}


def call(spec, dtype, T, K, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, spec.hidden, generator=g).to(dtype)
    ids = torch.rand(T, spec.num_experts, generator=g).argsort(dim=1)[:, :K]
    return x, ids, torch.rand(T, K, generator=g)


def assert_near(got, want, tolerance):
    error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("gate,activation", GATES)
@pytest.mark.parametrize("transposed,interleaved,has_bias", list(itertools.product([False, True], repeat=3)))
def test_layouts_and_activations_equal_the_reference(gate, activation, transposed, interleaved, has_bias):
    spec = ExpertsSpec(6, 40, 24, activation, gate, transposed=transposed, interleaved=interleaved, has_bias=has_bias)
    tensors = model_tensors(spec, torch.float32)
    x, ids, weights = call(spec, torch.float32, 7, 3)
    packed = CPU_KERNEL.pack(spec, tensors, torch.device("cpu"))
    got = routed_experts(x, ids, weights, packed, "cpu", spec.encode())
    assert_near(got, reference_experts(spec, x, ids, weights, plain_layout(spec, tensors)), 1e-5)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_dtypes(dtype, tolerance, tokens):
    spec = ExpertsSpec(5, 33, 17)
    tensors = model_tensors(spec, dtype)
    x, ids, weights = call(spec, dtype, tokens, 2)
    packed = CPU_KERNEL.pack(spec, tensors, torch.device("cpu"))
    got = CPU_KERNEL.forward(spec, x, ids, weights, packed)
    assert got.dtype == dtype and got.shape == x.shape
    exact = {name: t.float() for name, t in tensors.items()}
    assert_near(got, reference_experts(spec, x.float(), ids, weights, exact), tolerance)


def test_all_tokens_on_one_expert_and_an_expert_twice():
    spec = ExpertsSpec(4, 16, 8)
    tensors = model_tensors(spec, torch.float32)
    x, _, weights = call(spec, torch.float32, 9, 2)
    ids = torch.full((9, 2), 3)
    want = reference_experts(spec, x, ids, weights, tensors)
    assert_near(
        CPU_KERNEL.forward(spec, x, ids, weights, CPU_KERNEL.pack(spec, tensors, torch.device("cpu"))), want, 1e-5
    )
    assert_near(aten_experts(spec, x, ids, weights, list(tensors.values())), want, 1e-5)


@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1])
def test_an_id_out_of_range_is_an_error(bad):
    spec = ExpertsSpec(4, 16, 8)
    tensors = model_tensors(spec, torch.float32)
    x, ids, weights = call(spec, torch.float32, 3, 2)
    ids[1, 1] = bad
    packed = CPU_KERNEL.pack(spec, tensors, torch.device("cpu"))
    with pytest.raises(HostCallError, match=str(bad)):
        CPU_KERNEL.forward(spec, x, ids, weights, packed)


def test_packed_meta_says_what_pack_makes():
    for has_bias in (False, True):
        spec = ExpertsSpec(3, 20, 12, has_bias=has_bias, interleaved=True)
        packed = CPU_KERNEL.pack(spec, model_tensors(spec, torch.bfloat16), torch.device("cpu"))
        metas = CPU_KERNEL.packed_meta(spec, torch.bfloat16)
        assert [(tuple(p.shape), p.dtype) for p in packed] == [(m.shape, m.dtype) for m in metas]

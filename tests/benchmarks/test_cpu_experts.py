"""pytest-benchmark over the CPU experts: ``pytest tests/benchmarks/test_cpu_experts.py --benchmark-only``.

Small enough to follow a change over time; the table of contenders is cpu_experts_table.py. Nothing here asserts a time.
"""

import pytest
import torch

from ktfx.cpu_kernels import library
from ktfx.ops import experts_native as native
from ktfx.ops.experts import ExpertsSpec, reference_experts

if library.load().library is None:
    pytest.skip(f"no native kernels: {library.load().reason}", allow_module_level=True)
pytest.importorskip("pytest_benchmark")

SPEC = dict(num_experts=16, hidden=2048, intermediate=768)  # 16 of Qwen3-30B-A3B's experts


@pytest.fixture(scope="module")
def tensors():
    g = torch.Generator().manual_seed(0)
    return {
        "gate_up": (torch.randn(16, 1536, 2048, generator=g) * 0.02).bfloat16(),
        "down": (torch.randn(16, 2048, 768, generator=g) * 0.02).bfloat16(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 16, 128])
@pytest.mark.parametrize("weights", ["model", "int8", "int4", "fp8", "mxfp4"])
def test_call(benchmark, tensors, weights, tokens):
    spec = ExpertsSpec(**SPEC, weights=weights)
    packed = native.pack(spec, tensors)
    x = torch.randn(tokens, 2048).bfloat16()
    ids = torch.rand(tokens, 16).argsort(dim=1)[:, :8].contiguous()
    routing = torch.rand(tokens, 8)
    got = benchmark.pedantic(native.forward, (spec, x, ids, routing, packed), rounds=5, warmup_rounds=1)
    want = reference_experts(spec, x[:1].float(), ids[:1], routing[:1], native.dequantised(spec, packed))
    assert (got[:1] - want).norm() / want.norm() < 6e-3


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["model", "int4"])
def test_pack(benchmark, tensors, weights):
    spec = ExpertsSpec(**SPEC, weights=weights)
    packed = benchmark.pedantic(native.pack, (spec, tensors), rounds=3)
    assert packed[0].shape[0] == 16

"""experts.triton without a GPU: the reference over the same weights, its packing, and its refusals."""

from __future__ import annotations

import sys

import pytest
import torch

from ktfx.errors import KtfxError, WeightError
from ktfx.ops import triton_loader
from ktfx.ops.experts import ExpertsSpec, experts_kernel, plain_layout, reference_experts, routed_experts
from ktfx.ops.experts_triton import pack, unsupported

CPU = torch.device("cpu")


def tensors(spec: ExpertsSpec, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    E, H, inter = spec.num_experts, spec.hidden, spec.intermediate
    shapes = {"gate_up": (E, 2 * inter, H), "down": (E, H, inter), "gate_up_bias": (E, 2 * inter), "down_bias": (E, H)}
    made = {k: (torch.randn(s, generator=generator) * 0.2).to(dtype) for k, s in shapes.items()}
    if spec.transposed:
        made |= {k: made[k].transpose(1, 2).contiguous() for k in ("gate_up", "down")}
    return made


@pytest.mark.parametrize("weights", ["model", "int8", "int4", "int4-g32", "int4zp", "fp8", "mxfp4"])
def test_cpu_tensors_take_the_reference_over_the_format_s_numbers(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    spec = ExpertsSpec(4, 64, 48, weights=weights, gate="clamped", has_bias=True, transposed=True, interleaved=True)
    kernel = experts_kernel("triton")
    packed = kernel.pack(spec, tensors(spec), CPU)
    assert [(tuple(t.shape), t.dtype) for t in packed] == [
        (m.shape, m.dtype) for m in kernel.packed_meta(spec, torch.float32)
    ]
    x, ids, w = torch.randn(3, 64), torch.tensor([[0, 1], [2, 0], [3, 1]]), torch.rand(3, 2)
    out = routed_experts(x, ids, w, packed, "triton", spec.encode())
    assert torch.equal(out, reference_experts(spec, x, ids, w, kernel.dequantised(spec, packed)))
    original = reference_experts(spec, x, ids, w, plain_layout(spec, tensors(spec)))
    error = float((out - original).norm() / original.norm())
    assert error < 1e-6 if weights == "model" else 1e-4 < error < 0.3


def test_packing_copies() -> None:
    spec = ExpertsSpec(2, 32, 16)
    source = tensors(spec)
    packed = pack(spec, source, CPU)
    source["gate_up"].zero_()
    assert float(packed[0].abs().sum()) > 0


def test_a_layout_that_does_not_fit_is_named() -> None:
    spec = ExpertsSpec(2, 32, 16)
    with pytest.raises(WeightError, match=r"down has shape \(2, 16, 32\)"):
        pack(spec, tensors(spec) | {"down": torch.zeros(2, 16, 32)}, CPU)


def test_refusals_are_words() -> None:
    spec = ExpertsSpec(2, 32, 16)
    assert unsupported(spec, torch.bfloat16, CPU) is None
    assert "float64" in str(unsupported(spec, torch.float64, CPU))
    assert "int5" in str(unsupported(ExpertsSpec(2, 32, 16, weights="int5"), torch.bfloat16, CPU))
    assert "int8" in str(unsupported(ExpertsSpec(2, 32, 16, activations="int8"), torch.bfloat16, CPU))


def test_without_triton_a_kernel_says_how_to_mend_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(KtfxError, match=r"pip install 'ktfx\[triton\]'"):
        triton_loader.kernels("experts")


def test_the_fake_takes_symbolic_sizes() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    spec = ExpertsSpec(4, 64, 48)
    packed = pack(spec, tensors(spec), CPU)

    def call(x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor, *packed: torch.Tensor) -> torch.Tensor:
        return routed_experts(x, ids, w, list(packed), "triton", spec.encode()) + 1

    def inputs(T: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(T, 64), torch.randint(0, 4, (T, 2)), torch.rand(T, 2), *packed

    traced = make_fx(call, tracing_mode="symbolic")(*inputs(5))
    assert isinstance(
        next(n for n in traced.graph.nodes if n.op == "output").args[0].meta["val"].shape[0], torch.SymInt
    )
    other = inputs(7)
    assert torch.equal(traced(*other), call(*other))

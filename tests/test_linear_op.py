"""ktfx::linear_quant without a GPU: reference, packing, refusals, symbolic sizes."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ktfx.errors import KtfxError, PlacementError, WeightError
from ktfx.ops import load_ops
from ktfx.ops.linear import LinearSpec, linear_kernel, linear_kernel_names, linear_quant

CPU = torch.device("cpu")


@pytest.mark.parametrize("weights", ["model", "int8", "int4", "int4zp-g32", "fp8", "mxfp4"])
@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_cpu_tensors(kernel: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    spec = LinearSpec(96, 40, weights)
    w, x, b = torch.randn(40, 96), torch.randn(2, 5, 96), torch.randn(40)
    packed = linear_kernel(kernel).pack(spec, w, CPU)
    out = linear_quant(x, packed, b, kernel, spec.encode())
    exact = x.double() @ linear_kernel(kernel).dequantised(spec, packed).double().t() + b.double()
    assert torch.allclose(out.double(), exact, atol=1e-4)
    error = float((out - (x @ w.t() + b)).norm() / out.norm())
    assert error < 1e-6 if weights == "model" else 1e-4 < error < 0.2


def test_fake_with_symbolic_sizes() -> None:
    spec = LinearSpec(64, 24, "int8")
    packed = linear_kernel("triton").pack(spec, torch.randn(24, 64), CPU)

    def call(x: torch.Tensor, *packed: torch.Tensor) -> torch.Tensor:
        return linear_quant(x, list(packed), None, "triton", spec.encode())

    traced = make_fx(call, tracing_mode="symbolic")(torch.randn(2, 5, 64), *packed)
    x = torch.randn(3, 7, 64)
    assert torch.equal(traced(x, *packed), call(x, *packed))


def test_errors() -> None:
    load_ops()
    assert {"cpu", "reference", "triton"} <= set(linear_kernel_names())
    with pytest.raises(PlacementError, match="cpu, reference, triton"):
        linear_kernel("marlin")
    spec = LinearSpec(64, 24)
    with pytest.raises(WeightError, match=r"\(out, in\) = \(24, 64\)"):
        linear_kernel("triton").pack(spec, torch.randn(64, 24), CPU)
    with pytest.raises(KtfxError, match="63 features"):
        linear_quant(torch.randn(2, 63), [torch.randn(24, 64)], None, "triton", spec.encode())
    assert "int3" in str(linear_kernel("triton").unsupported(LinearSpec(1, 1, "int3"), torch.float32, CPU))

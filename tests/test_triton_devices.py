"""Kernels run on the device of their tensors, whichever device is current."""

from __future__ import annotations

import pytest
import torch
from triton_cases import INTERPRETED, assert_close, needs_kernels, normal

import ktfx.ops.experts_triton
import ktfx.ops.norms  # noqa: F401  (the imports register the ops)
from ktfx.ops.experts import ExpertsSpec, experts_kernel, reference_experts
from ktfx.ops.linear import LinearSpec, linear_kernel

pytestmark = needs_kernels


def test_the_first_tensor_names_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from ktfx.triton_kernels.launch import on_its_device

    entered: list[torch.device] = []

    class Tensor(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda", 1)

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *_: object) -> None:
            entered.append(torch.device("cpu"))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Guard)

    @on_its_device
    def launcher(scale: float, x: torch.Tensor, y: torch.Tensor) -> list[torch.device]:
        return list(entered)

    assert launcher(1.0, Tensor(), torch.zeros(1)) == [torch.device("cuda", 1)]
    assert entered[-1] == torch.device("cpu")
    entered.clear()
    assert launcher(1.0, torch.zeros(1), Tensor()) == []


@pytest.mark.multigpu
@pytest.mark.skipif(INTERPRETED or torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("T", [1, 7])
def test_another_device_than_the_current_one(T: int) -> None:
    """Slow work queued on cuda:1 must come before the kernel that reads its result."""
    spec = ExpertsSpec(8, 32, 24)
    kernel, linear = experts_kernel("triton"), linear_kernel("triton")
    generator = torch.Generator().manual_seed(0)
    plain = {
        "gate_up": torch.randn(8, 48, 32, generator=generator),
        "down": torch.randn(8, 32, 24, generator=generator),
    }
    packed = kernel.pack(spec, plain, torch.device("cuda:1"))
    square = linear.pack(LinearSpec(32, 32), torch.eye(32), torch.device("cuda:1"))
    x0 = normal(T, 32).to("cuda:1")
    ids = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(T)]).to("cuda:1")
    weights = torch.rand(T, 2, generator=generator).to("cuda:1")
    exact = reference_experts(
        spec, x0.double(), ids, weights.double(), {k: v.double().to("cuda:1") for k, v in plain.items()}
    )
    busy = torch.randn(4096, 4096, device="cuda:1")
    with torch.cuda.device(0):
        torch.zeros(1, device="cuda:0").to("cuda:1")  # peer access, without which the old mistake would fault
        for _ in range(20):
            x = torch.full_like(x0, float("nan"))
            busy @ busy
            x.copy_(x0)
            x = linear.forward(LinearSpec(32, 32), x, square, None)
            out = kernel.forward(spec, x, ids, weights, packed)
            assert_close(out, exact, torch.float32)
        assert torch.cuda.current_device() == 0

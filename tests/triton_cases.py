"""What the tests of Triton kernels share: where they run (CUDA or the interpreter), poison, error measures."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Of generated cases: in the interpreter, and where a tool makes every launch slow (compute-sanitizer).
FEW = INTERPRETED or os.environ.get("KTFX_FEW_EXAMPLES") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

# Without either, tests/test_triton_interpreter.py runs these files in a process of their own: the interpreter must be
# chosen before triton is first imported, and the rest of the suite needs the compiler.
needs_kernels = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs CUDA, or TRITON_INTERPRET=1 from the start"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of ‖out − exact‖ / ‖exact‖, exact in float64 over inputs of the dtype; half precision rounds between the matmuls.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Normal values on the device of this run."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)


def poisoned(t: torch.Tensor) -> torch.Tensor:
    """An output like t whose every element is NaN (or the least integer) until it is written."""
    if t.is_floating_point():
        return torch.full_like(t, float("nan"), memory_format=torch.contiguous_format)
    return torch.full_like(t, torch.iinfo(t.dtype).min, memory_format=torch.contiguous_format)


def relative(out: torch.Tensor, exact: torch.Tensor) -> float:
    """‖out − exact‖ / ‖exact‖ in float64; NaN if anything is."""
    out, exact = out.double(), exact.double()
    norm = float(exact.norm())
    return float((out - exact).norm()) / norm if norm else float(out.norm())


def assert_close(out: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, times: float = 1.0) -> None:
    assert out.shape == exact.shape
    error = relative(out, exact)
    assert error <= TOLERANCE[dtype] * times, f"relative error {error:.2e} in {dtype}"

"""act(gate)·up and its relatives, from two tensors or the two halves of one. See ``ktfx.ops.activations``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.dequant import gated, narrow
from ktfx.triton_kernels.launch import cdiv, on_its_device


@triton.jit
def _gated_kernel(
    gate_ptr, up_ptr, y_ptr, total, D, gate_row, up_row, alpha, limit,
    ACT: tl.constexpr, GATE: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, d = at // D, at % D
    gate = tl.load(gate_ptr + row * gate_row + d * STEP, mask=at < total, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + d * STEP, mask=at < total, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, narrow(gated(gate, up, ACT, GATE, alpha, limit), y_ptr.dtype.element_ty), mask=at < total)


@on_its_device
def gated_mul(
    gate: torch.Tensor, up: torch.Tensor, act: str, kind: str, alpha: float, limit: float, out: torch.Tensor
) -> torch.Tensor:
    """gate, up (…, D) of one shape; copied only where their rows are not evenly spaced; out contiguous."""
    D = out.shape[-1]
    flat = [t.reshape(-1, D) for t in (gate, up)]
    if flat[0].stride(1) != flat[1].stride(1):
        flat = [t.contiguous() for t in flat]
    total = out.numel()
    if total:
        _gated_kernel[(cdiv(total, 1024),)](
            flat[0], flat[1], out, total, D, flat[0].stride(0), flat[1].stride(0), alpha, limit,
            ACT=act, GATE=kind, STEP=flat[0].stride(1), BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return out

"""RMS norm of rows in one pass, alone or with the residual added before it. Kinds: see ``ktfx.ops.norms``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.dependent_launch import dependent, wait_for_previous
from ktfx.triton_kernels.dequant import narrow
from ktfx.triton_kernels.launch import cdiv, on_its_device, pow2


@triton.jit
def normed(x, r, w, KIND: tl.constexpr, DT: tl.constexpr):
    """What an RMS norm of the kind writes for x, in DT; x, w: float32, r: the row's 1 / root mean square."""
    y = x * r
    if KIND == "llama":
        y = narrow(y, DT).to(tl.float32) * w
    elif KIND == "gemma":
        y = y * (1.0 + w)
    else:
        tl.static_assert(KIND == "late")
        y = y * w
    return narrow(y, DT)


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, w_ptr, y_ptr, sum_ptr, rows, D, eps,
    KIND: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, DP: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    wait_for_previous(DEPENDENT)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    at = row[:, None] * D + d[None, :]
    there = (row < rows)[:, None] & (d < D)[None, :]
    DT: tl.constexpr = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
    if ADD:
        x = narrow(x + tl.load(residual_ptr + at, mask=there, other=0.0).to(tl.float32), DT)
        tl.store(sum_ptr + at, x, mask=there)
        x = x.to(tl.float32)
    w = tl.load(w_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    r = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    tl.store(y_ptr + at, normed(x, r, w, KIND, DT), mask=there)


@on_its_device
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    kind: str,
    residual: torch.Tensor | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Over the last dimension: (normed, x + residual); without a residual the second is x itself. Any leading shape."""
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    D = x.shape[-1]
    rows = x.numel() // D if D else 0
    y = torch.empty_like(x) if out is None else out[0]
    total = x if residual is None else (torch.empty_like(x) if out is None else out[1])
    if rows:
        DP = pow2(D)
        # Short rows (q and k norms) share a program; a long one has it alone.
        per = max(1, min(1024 // DP, pow2(cdiv(rows, 256))))
        _rms_norm_kernel[(cdiv(rows, per),)](
            x, x if residual is None else residual, weight, y, total, rows, D, eps,
            KIND=kind, ADD=residual is not None, ROWS=per, DP=DP, num_warps=min(16, max(1, per * DP // 512)),
            **dependent(x.device),
        )  # fmt: skip
    return y, total

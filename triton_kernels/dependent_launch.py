"""Programmatic dependent launch: a kernel of a decode step begins while the kernel before it still drains.

On Hopper and later a launch may be marked so that it starts as soon as every program of the kernel before it has called
``launch_dependents``; it then waits, in the kernel, for that kernel's end. A decode step is a chain of kernels of a few
microseconds, so the launch, the first instructions and the first reads of weights (which no earlier kernel writes)
hide behind the end of the kernel before. CUDA's programming guide, "Programmatic Dependent Launch", gives the rules.

The rules kept here, by every kernel that is launched with ``dependent(device)``:

* nothing that an earlier kernel may have written is read, and nothing is written, before ``wait_for_previous``;
* every program calls it, so that the end of a kernel implies the end of all kernels before it;
* what is read or prefetched before that is parameters, or was written by a kernel that has surely ended: the kernel
  before begins its dependents only after its own wait, so whatever came before *it* has ended;
* a kernel may call ``let_next_begin`` before its wait if the next one reads, before *its* wait, parameters and what the
  kernel before this one waited for (``_pairs_down_kernel`` behind the inputs' integers: the choice of experts).

``KTFX_DEPENDENT_LAUNCH=0`` turns it off, to compare.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.launch import interpreted
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# What a prefetch instruction fetches at least.
LINE_BYTES = tl.constexpr(128)


@triton.jit
def wait_for_previous(DEPENDENT: tl.constexpr):
    """Until the kernels before this one have ended and what they wrote can be seen; then lets the next one begin."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def let_next_begin(DEPENDENT: tl.constexpr):
    """Lets the next kernel begin while this one still waits for the one before."""
    if DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def prefetch_rows(w_ptr, row, K, ldw, LINES: tl.constexpr):
    """Ask for rows of a weight to be brought to L2. row: (R,) existing rows, LINES: lines of 128 bytes that hold K."""
    step: tl.constexpr = LINE_BYTES * 8 // w_ptr.dtype.element_ty.primitive_bitwidth
    k = tl.minimum(tl.arange(0, LINES) * step, K - 1)
    at = (w_ptr + row[:, None] * ldw + k[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def prefetch_part(ptr, e, size, part, LINES: tl.constexpr):
    """Ask for lines part·LINES to (part + 1)·LINES of the ``size`` bytes of entry e to be brought to L2."""
    line = part * LINES + tl.minimum(tl.arange(0, triton.next_power_of_2(LINES)), LINES - 1)
    at = ptr.to(tl.int64) + e * size + tl.minimum(line * LINE_BYTES, size - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


def dependent(device: torch.device) -> dict[str, Any]:
    """Launch arguments of a kernel that keeps the rules above; none where the GPU or the environment has it off."""
    return {"DEPENDENT": True, "launch_pdl": True} if _supported(device) else {}


@lru_cache
def _supported(device: torch.device) -> bool:
    if device.type != "cuda" or interpreted() or os.environ.get("KTFX_DEPENDENT_LAUNCH") == "0":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)

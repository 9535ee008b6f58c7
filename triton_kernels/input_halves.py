"""16-bit inputs as two halves of eight bits, and their products with eight-bit weights as they are stored.

fp8: a bfloat16 has eight significant bits, e4m3 has four. Scaled by a power of two, a value rounded to e4m3 and what
that leaves of it, which has at most four significant bits again, are both e4m3: their sum is the value itself, down to
2⁻¹⁷ of its row's largest.
int8: a row becomes int16 with one scale (exact to 2⁻¹⁶ of its largest), x = 256·high + low.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.dequant import product
from ktfx.triton_kernels.integer_rows import LARGEST, int16_bytes
from ktfx.triton_kernels.launch import on_its_device, pow2

# What halves are for a weight's format, and what tensor cores take the weight as.
EIGHT_BITS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True)
class HalvedInputs:
    """halves: (2, T, K), all high ones before the low ones, float8 e4m3 or int8; scales: float32 (T,)."""

    halves: torch.Tensor
    scales: torch.Tensor


@triton.jit
def rounded_to_e4m3(v):
    """float32 of at most 448 rounded to a value that e4m3 has.

    In numbers of its own: Triton 3.6 reads a register that nobody wrote where a conversion to e4m3 is taken back.
    """
    bits = v.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(v) < 0.015625, tl.floor(v * 512.0 + 0.5) * 0.001953125, normal)


@triton.jit
def _halve_kernel(x_ptr, halves_ptr, scales_ptr, T, K, ldx, FMT: tl.constexpr, KP: tl.constexpr):
    t, k = tl.program_id(0).to(tl.int64), tl.arange(0, KP)
    x = tl.load(x_ptr + t * ldx + k, mask=k < K, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), 0)
    if FMT == "fp8":
        # The power of two that brings the largest between 128 and 256, of e4m3's 448.
        exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 8)
        v = x * ((261 - exponent) << 23).to(tl.float32, bitcast=True)
        whole = rounded_to_e4m3(v)
        high, low = whole.to(tl.float8e4nv), rounded_to_e4m3(v - whole).to(tl.float8e4nv)
        scale = ((exponent - 7) << 23).to(tl.float32, bitcast=True)
    else:
        largest = tl.maximum(largest, 1e-30)
        _, high, low = int16_bytes(x, 1.0 / largest * LARGEST)
        scale = largest / LARGEST
    tl.store(halves_ptr + t * K + k, high, mask=k < K)
    tl.store(halves_ptr + (t + T) * K + k, low, mask=k < K)
    # An infinity or NaN makes its whole row NaN; a maximum alone might drop it.
    tl.store(scales_ptr + t, scale + tl.sum(x * 0.0, 0))


@on_its_device
def halved_inputs(x: torch.Tensor, fmt: str) -> HalvedInputs:
    """x (T, K), neighbours along K, for weights of a format, ``fp8`` or ``int8``."""
    T, K = x.shape
    halves = torch.empty(2, T, K, dtype=EIGHT_BITS[fmt], device=x.device)
    scales = torch.empty(T, dtype=torch.float32, device=x.device)
    KP = pow2(K)
    _halve_kernel[(T,)](x, halves, scales, T, K, x.stride(0), FMT=fmt, KP=KP, num_warps=min(8, max(1, KP // 512)))
    return HalvedInputs(halves, scales)


def stored_view(data: torch.Tensor, fmt: str) -> torch.Tensor:
    """A weight's bytes in the type that tensor cores multiply."""
    return data.view(EIGHT_BITS[fmt])


@triton.jit
def both_halves(t, M: tl.constexpr):
    """(N, 2·M), first what belongs to the high halves of M inputs, then to the low ones: the two, (N, M) each."""
    return tl.split(t.reshape(t.shape[0], 2, M).permute(0, 2, 1))


@triton.jit
def add_products(acc, w, x, scale, FMT: tl.constexpr):
    """The sums so far plus those of one step, w (N, BK) times both halves of M inputs, x (BK, 2·M).

    fp8: acc (N, M) in float32. Hopper adds products of eight-bit floats with few more bits than those have: no longer
    than within a block of scales, which have to be multiplied then anyway. int8: acc (N, 2·M) in int32.
    """
    if FMT == "fp8":
        high, low = both_halves(product(w, x, tl.zeros((w.shape[0], x.shape[1]), tl.float32)), acc.shape[1])
        acc += (high + low) * scale[:, None]
    else:
        acc = product(w, x, acc)
    return acc


@triton.jit
def no_products(N: tl.constexpr, M: tl.constexpr, FMT: tl.constexpr):
    return tl.zeros((N, M), tl.float32) if FMT == "fp8" else tl.zeros((N, 2 * M), tl.int32)


@triton.jit
def worth(acc, x_scale, M: tl.constexpr, FMT: tl.constexpr):
    """What the sums are worth, (N, M) in float32; int8's own scale is left to the caller."""
    if FMT == "int8":
        high, low = both_halves(acc, M)
        acc = high.to(tl.float32) * 256.0 + low.to(tl.float32)
    return acc * x_scale[None, :]

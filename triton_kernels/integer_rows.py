"""Weight rows of 4 and 8 bits times one vector, in integers: ``multiply_rows`` for int4, int4zp, int8 and mxfp4.

x becomes int16 with one scale per block of 32 values (exact to 2⁻¹⁶ of the block's largest, finer than bfloat16 or
float16 hold it), stored as two planes of bytes. A word of weights is then four bytes after one mask, and one ``dp4a``
an instruction multiplies four by four: about one instruction a weight, where unpacking to float32 takes five to seven
and keeps a GPU from reading at full speed. Sums of a block are exact in int32 and in float32.

x = 256·high + low in memory: of all blocks the first 16 high bytes, then the other 16, then the low bytes in the same
way, so that neighbouring threads read neighbouring words. The bytes of a word meet those of a weight word as its values
lie there (``ktfx.formats``): in order for int8 and for int4's low and high nibbles; for mxfp4, whose nibbles go through
a table four at a time, as PAIRED says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.dependent_launch import dependent, wait_for_previous
from ktfx.triton_kernels.dequant import INTERPRETED, load_group_scale
from ktfx.triton_kernels.launch import cdiv, on_its_device

BLOCK = 32
_BLOCK = tl.constexpr(BLOCK)
# 127 · 256 + 127: the largest number of which both bytes are signed and neither is -128.
_LARGEST = tl.constexpr(32639.0)


@dataclass(frozen=True)
class IntegerInputs:
    """planes: int32 (T, 4, B, 4); scales: float32 (T, 2, B), each block's scale and the sum of its integers."""

    planes: torch.Tensor
    scales: torch.Tensor

    @property
    def blocks(self) -> int:
        return self.planes.shape[2]


@triton.jit
def _quantise_kernel(
    x_ptr, planes_ptr, scales_ptr, K, blocks, ldx, PAIRED: tl.constexpr, BLOCKS: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    wait_for_previous(DEPENDENT)
    t, b, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS), tl.arange(0, _BLOCK)
    k = b[:, None] * _BLOCK + i[None, :]
    x = tl.load(x_ptr + t * ldx + k, mask=k < K, other=0.0).to(tl.float32)
    # An infinity or NaN makes its whole block NaN; a maximum alone might drop it.
    largest = tl.maximum(tl.max(tl.abs(x), 1), 1e-30) + tl.sum(x * 0.0, 1)
    q = tl.floor(x * (1.0 / largest * _LARGEST)[:, None] + 0.5).to(tl.int32)
    high = (q + 128) >> 8
    low = q - high * 256
    place = ((i // 2 % 2) * 4 + i // 4 % 4) * 4 + (i % 2) * 2 + i // 16 if PAIRED else i
    there = (b < blocks)[:, None] & (i >= 0)[None, :]
    at = ((t * 4 + place[None, :] // 16) * blocks + b[:, None]) * 16 + place[None, :] % 16
    tl.store(planes_ptr + at, high.to(tl.int8), mask=there)
    tl.store(planes_ptr + at + blocks * 32, low.to(tl.int8), mask=there)
    to = scales_ptr + t * 2 * blocks + b
    tl.store(to, largest / _LARGEST, mask=b < blocks)
    tl.store(to + blocks, tl.sum(q, 1).to(tl.float32), mask=b < blocks)


@on_its_device
def integer_inputs(x: torch.Tensor, paired: bool) -> IntegerInputs:
    """x (T, K), neighbours along K, as integers. paired: for mxfp4 weights."""
    T, K = x.shape
    blocks = cdiv(K, BLOCK)
    planes = torch.empty(T, 4, blocks, 4, dtype=torch.int32, device=x.device)
    scales = torch.empty(T, 2, blocks, dtype=torch.float32, device=x.device)
    _quantise_kernel[(T, cdiv(blocks, 8))](
        x, planes.view(torch.int8), scales, K, blocks, x.stride(0), PAIRED=paired, BLOCKS=8, num_warps=1,
        **dependent(x.device),
    )  # fmt: skip
    return IntegerInputs(planes, scales)


@triton.jit
def dp4a(w, x, acc, SIGNED: tl.constexpr):
    """acc + Σ of four products of bytes; x's are signed, w's as SIGNED says. All int32."""
    if INTERPRETED:
        for i in tl.static_range(4):
            byte = (w << (24 - 8 * i)) >> 24
            if not SIGNED:
                byte = byte & 255
            acc += byte * ((x << (24 - 8 * i)) >> 24)
    elif SIGNED:
        acc = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, x, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        acc = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, x, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    return acc


@triton.jit
def doubled_e2m1(w):
    """The e2m1 values of the four lowest nibbles, times two, as signed bytes.

    ``prmt`` looks up four bytes by the low three bits of each nibble, in a table of the values and one of their
    negatives; by all four bits of a nibble it also tells the sign (a selector's top bit repeats the byte's sign).
    """
    if INTERPRETED:
        out = tl.zeros_like(w)
        for i in tl.static_range(4):
            bits = (w >> (4 * i)) & 7
            value = tl.where(bits < 4, bits, tl.where(bits == 7, 12, 2 * bits - 4))
            out = out | ((tl.where(((w >> (4 * i)) & 8) != 0, -value, value) & 255) << (8 * i))
    else:
        out = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 which, plus, minus, sign;
            and.b32 which, $1, 0x7777;
            prmt.b32 plus, 0x03020100, 0x0c080604, which;
            prmt.b32 minus, 0xfdfeff00, 0xf4f8fafc, which;
            prmt.b32 sign, 0x80808080, 0x80808080, $1;
            and.b32 sign, sign, 0x01010101;
            mul.lo.u32 sign, sign, 255;
            lop3.b32 $0, minus, plus, sign, 0xe4;
            }
            """,
            "=r,r", [w], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return out


@triton.jit
def multiply_integers(
    acc, w_ptr, s_ptr, z_ptr, row, srow, ok, planes_ptr, scales_ptr, xrow, k0, blocks, ldw, lds,
    FMT: tl.constexpr, G: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc (L, R, parts) += w[row, k0:k0+BK] · x, still apart by runs of 16 bytes of weights: BK/32 of them, int8 BK/16.

    row, srow, ok: (L, R), weight rows, scale rows and which exist; xrow: (L or 1,), rows of x times ``blocks``, the
    blocks in a row. Needs rows of whole 16-byte runs.
    """
    NB: tl.constexpr = BK // 16 if FMT == "int8" else BK // 32
    b, c = tl.arange(0, NB), tl.arange(0, 4)
    run = (k0 // 4 if FMT == "int8" else k0 // 8) + b * 4
    block = k0 // 32 + (b // 2 if FMT == "int8" else b)
    # By whole runs, so that a thread reads its four words at once.
    known = (run * 4 < ldw) & (block < blocks)
    exists = ok[:, :, None] & known[None, None, :]
    at_w = row[:, :, None, None] * (ldw // 4) + (run[:, None] + c[None, :])[None, None, :, :]
    # All loads first: they are issued in this order, and only then is one waited for.
    w = tl.load(w_ptr.to(tl.pointer_type(tl.int32)) + at_w, mask=exists[:, :, :, None], other=0)
    if FMT != "int8":
        g = srow[:, :, None] * lds + (block // (G // 32))[None, None, :]
        scale = load_group_scale(s_ptr, g, exists, FMT)
        if FMT == "int4zp":
            offset = tl.load(z_ptr + g, mask=exists, other=0).to(tl.float32)
    xblock = xrow[:, None] * 2 + block[None, :]
    in_x = tl.zeros_like(xblock) + block[None, :] < blocks
    x_scale = tl.load(scales_ptr + xblock, mask=in_x, other=0.0)[:, None, :]
    x_sum = tl.load(scales_ptr + xblock + blocks, mask=in_x, other=0.0)[:, None, :]
    there, half = in_x[:, :, None], blocks * 4
    at = (xrow[:, None] * 4 + block[None, :])[:, :, None] * 4 + c[None, None, :]
    zero = tl.zeros(w.shape, tl.int32)
    if FMT == "int8":
        at += (b % 2)[None, :, None] * half
        x_high = tl.load(planes_ptr + at, mask=there, other=0)[:, None, :, :]
        x_low = tl.load(planes_ptr + at + 2 * half, mask=there, other=0)[:, None, :, :]
        high, low = dp4a(w, x_high, zero, True), dp4a(w, x_low, zero, True)
    else:
        x_high = tl.load(planes_ptr + at, mask=there, other=0)[:, None, :, :]
        x_high_2 = tl.load(planes_ptr + at + half, mask=there, other=0)[:, None, :, :]
        x_low = tl.load(planes_ptr + at + 2 * half, mask=there, other=0)[:, None, :, :]
        x_low_2 = tl.load(planes_ptr + at + 3 * half, mask=there, other=0)[:, None, :, :]
        SIGNED: tl.constexpr = FMT == "mxfp4"
        if SIGNED:
            first, second = doubled_e2m1(w), doubled_e2m1(w >> 16)
        else:
            first, second = w & 0x0F0F0F0F, (w >> 4) & 0x0F0F0F0F
        high = dp4a(second, x_high_2, dp4a(first, x_high, zero, SIGNED), SIGNED)
        low = dp4a(second, x_low_2, dp4a(first, x_low, zero, SIGNED), SIGNED)
    dot = tl.sum(high * 256 + low, 3).to(tl.float32)
    if FMT == "int8":
        acc += dot * x_scale
    elif FMT == "mxfp4":
        acc += dot * (scale * 0.5 * x_scale)
    elif FMT == "int4zp":
        acc += (dot - offset * x_sum) * (scale * x_scale)
    else:
        acc += (dot - 8.0 * x_sum) * (scale * x_scale)
    return acc

"""Integers of x, made by a kernel before, and their products with bytes of weights of 4 and 8 bits.

x becomes int16 with one scale per block of 32 values (exact to 2⁻¹⁶ of the block's largest, finer than bfloat16 or
float16 hold it), stored as bytes: x = 256·high + low. A word of weights is then four bytes after one mask, and one
``dp4a`` an instruction multiplies four by four. Sums of a block are exact in int32 and in float32.

The bytes lie in planes, each with one word for each word of weights, so that a thread reads both alike and nothing
moves between threads: for int8 the high bytes and the low ones; for 4 bits, where a word holds eight weights, the high
bytes of the four that are unpacked first, of the other four, then the low bytes in the same way. Which four come first
is the format's (``ktfx.formats``): the low nibbles for int4, the low half of a word for mxfp4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.dependent_launch import dependent, let_next_begin, wait_for_previous
from ktfx.triton_kernels.dequant import INTERPRETED
from ktfx.triton_kernels.launch import cdiv, on_its_device

BLOCK = 32
_BLOCK = tl.constexpr(BLOCK)
# 127 · 256 + 127: the largest number of which both bytes are signed and neither is -128.
LARGEST = tl.constexpr(32639.0)


@dataclass(frozen=True)
class IntegerInputs:
    """planes: int32 (T, 16·B); scales: float32 (T, 2, B), each block's scale and the sum of its integers."""

    planes: torch.Tensor
    scales: torch.Tensor

    @property
    def blocks(self) -> int:
        return self.scales.shape[2]


@triton.jit
def int16_bytes(x, factor):
    """x · factor, at most ``LARGEST``, as integers: whole (int32), and their high and low bytes, 256·high + low."""
    q = tl.floor(x * factor + 0.5).to(tl.int32)
    high = (q + 128) >> 8
    return q, high.to(tl.int8), (q - high * 256).to(tl.int8)


@triton.jit
def _quantise_kernel(
    x_ptr, planes_ptr, scales_ptr, K, blocks, ldx, FMT: tl.constexpr, BLOCKS: tl.constexpr,
    EARLY: tl.constexpr = False, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    if EARLY:
        let_next_begin(DEPENDENT)
    wait_for_previous(DEPENDENT)
    t, b, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS), tl.arange(0, _BLOCK)
    k = b[:, None] * _BLOCK + i[None, :]
    x = tl.load(x_ptr + t * ldx + k, mask=k < K, other=0.0).to(tl.float32)
    # An infinity or NaN makes its whole block NaN; a maximum alone might drop it.
    largest = tl.maximum(tl.max(tl.abs(x), 1), 1e-30) + tl.sum(x * 0.0, 1)
    q, high, low = int16_bytes(x, (1.0 / largest * LARGEST)[:, None])
    # Bytes of a block that one plane holds, and the place of value i among both planes' of the block.
    RUN: tl.constexpr = 32 if FMT == "int8" else 16
    place = ((i // 2 % 2) * 4 + i // 4 % 4) * 4 + (i % 2) * 2 + i // 16 if FMT == "mxfp4" else i
    there = (b < blocks)[:, None] & (i >= 0)[None, :]
    at = t * blocks * 64 + (place // RUN)[None, :] * blocks * RUN + b[:, None] * RUN + (place % RUN)[None, :]
    tl.store(planes_ptr + at, high, mask=there)
    tl.store(planes_ptr + at + blocks * 32, low, mask=there)
    to = scales_ptr + t * 2 * blocks + b
    tl.store(to, largest / LARGEST, mask=b < blocks)
    tl.store(to + blocks, tl.sum(q, 1).to(tl.float32), mask=b < blocks)


@on_its_device
def integer_inputs(x: torch.Tensor, fmt: str, early: bool = False) -> IntegerInputs:
    """x (T, K), neighbours along K, as integers for weights of a format.

    early: the kernel launched next may begin at once (``dependent_launch``): before its wait it reads nothing but
    parameters and what the kernel before this one waited for.
    """
    T, K = x.shape
    blocks = cdiv(K, BLOCK)
    planes = torch.empty(T, 16 * blocks, dtype=torch.int32, device=x.device)
    scales = torch.empty(T, 2, blocks, dtype=torch.float32, device=x.device)
    _quantise_kernel[(T, cdiv(blocks, 8))](
        x, planes.view(torch.int8), scales, K, blocks, x.stride(0), FMT=fmt, BLOCKS=8, EARLY=early, num_warps=1,
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
def unknown_zero():
    """0 that the compiler cannot know: constants added to it stay in registers.

    A look-up in two constants has room for one of them; the other was moved to a register again for each look-up.
    """
    if INTERPRETED:
        zero = 0
    else:
        # A lane's own bit among 32, halved.
        zero = tl.inline_asm_elementwise(
            "{ .reg .b32 own; mov.u32 own, %lanemask_eq; popc.b32 own, own; shr.u32 $0, own, 1; }",
            "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return zero


# The first halves of the two tables of ``e2m1_look_up``.
PLUS = tl.constexpr(0x0F0E0D0C)
MINUS = tl.constexpr(0x090A0B0C)


@triton.constexpr_function
def e2m1_look_up() -> str:
    return (
        "{ .reg .b32 plus, minus; xor.b32 minus, $1, 0x8888; prmt.b32 plus, $2, 0x18141210, $1;"
        " prmt.b32 minus, $3, 0x00040608, minus; or.b32 $0, plus, minus; }"
    )


@triton.jit
def doubled_e2m1(w, zero):
    """The e2m1 values of the four lowest nibbles, times two and plus 12, as bytes from 0 to 24. zero: unknown_zero().

    ``prmt`` looks up four bytes by the low three bits of each nibble. A nibble's top bit, the sign, asks it for the
    sign of the byte found instead, which is 0 for all of these: so a table of the positive values, and by the other
    signs one of the negative ones, give 0 where they are not meant.
    """
    if INTERPRETED:
        out = tl.zeros_like(w)
        for i in tl.static_range(4):
            bits = (w >> (4 * i)) & 7
            value = tl.where(bits < 4, bits, tl.where(bits == 7, 12, 2 * bits - 4))
            out = out | ((12 + tl.where(((w >> (4 * i)) & 8) != 0, -value, value)) << (8 * i))
    else:
        out = tl.inline_asm_elementwise(
            e2m1_look_up(), "=r,r,r,r", [w, PLUS + zero, MINUS + zero], dtype=tl.int32, is_pure=True, pack=1
        )
    return out


@triton.jit
def words_of_runs(t):
    """(L, R, 4·runs) words, a run of four in one thread, to the first, second, third and fourth words, (L, R, runs)."""
    even, odd = tl.split(t.reshape(t.shape[0], t.shape[1], t.shape[2] // 4, 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def bytes_of(w, zero, PART: tl.constexpr, FMT: tl.constexpr):
    """The four weights that part 0 or 1 of a word holds, as bytes: int8's signed, others from 0 on (``least``)."""
    if FMT == "int8":
        four = w
    elif FMT == "mxfp4":
        four = doubled_e2m1(w >> (16 * PART), zero)
    else:
        four = (w >> (4 * PART)) & 0x0F0F0F0F
    return four


@triton.jit
def ready_sums(ws, acc, planes_ptr, scales_ptr, xrow, word, block, blocks, FMT: tl.constexpr):
    """Sums of bytes of weights (``bytes_of``) times integers of x, their scales, and for 4 bits the integers' sums."""
    PARTS: tl.constexpr = 1 if FMT == "int8" else 2
    plane = blocks * (4 * 2 // PARTS)
    at = planes_ptr + xrow[:, None, None] * 16 + word[None, None, :]
    # All loads first: they are issued in this order, and only then is one waited for.
    there = tl.zeros_like(at.to(tl.int64)) + word[None, None, :] < plane
    x_high = tl.load(at, mask=there, other=0)
    x_low = tl.load(at + PARTS * plane, mask=there, other=0)
    if PARTS == 2:
        x_high_2 = tl.load(at + plane, mask=there, other=0)
        x_low_2 = tl.load(at + 3 * plane, mask=there, other=0)
    x_at = block[:, None] + xrow[None, :] * 2
    in_x = tl.zeros_like(x_at) + block[:, None] < blocks
    x_scale = tl.trans(tl.load(scales_ptr + x_at, mask=in_x, other=0.0))[:, None, :]
    x_sum = x_scale
    if PARTS == 2:
        x_sum = tl.trans(tl.load(scales_ptr + x_at + blocks, mask=in_x, other=0.0))[:, None, :]
    highs, lows = words_of_runs(x_high), words_of_runs(x_low)
    if PARTS == 2:
        highs, lows = highs + words_of_runs(x_high_2), lows + words_of_runs(x_low_2)
    zero = unknown_zero() if FMT == "mxfp4" else 0
    high = tl.zeros(acc.shape, tl.int32)
    low = tl.zeros(acc.shape, tl.int32)
    for part in tl.static_range(PARTS):
        for i in tl.static_range(4):
            four = bytes_of(ws[i], zero, part, FMT)
            high = dp4a(four, highs[4 * part + i], high, FMT == "int8")
            low = dp4a(four, lows[4 * part + i], low, FMT == "int8")
    return (high * 256 + low).to(tl.float32), x_scale, x_sum

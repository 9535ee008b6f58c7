"""Integers of x that a program makes for itself, and their products with bytes of weights of 4 and 8 bits.

For few x, where a kernel before, as in ``integer_rows``, costs more than it saves. A thread has runs of 16 bytes of
weights, 32 values of 4 bits or 16 of 8, and makes integers of its runs of x while its weights are on the way: four
instructions a value, for all the rows of weights that it has. A run becomes int16 with one scale, the power of two that
brings its largest between 2¹⁴ and 2¹⁵: a bfloat16 down to 2⁻⁷ of its run's largest is exact so, and the rest to 2⁻¹⁵ of
that. ``dp2a`` multiplies two of them by two bytes. Sums of a run are exact in int32 and in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from ktfx.triton_kernels.dequant import INTERPRETED
from ktfx.triton_kernels.integer_rows import bytes_of, unknown_zero, words_of_runs


@triton.constexpr_function
def dp2a_code(high: bool, signed: bool) -> str:
    return f"dp2a.{'hi' if high else 'lo'}.s32.{'s32' if signed else 'u32'} $0, $1, $2, $3;"


@triton.jit
def dp2a(x, w, acc, HIGH: tl.constexpr, SIGNED: tl.constexpr):
    """acc + two int16 of x times the two low bytes of w or, HIGH, the other two; bytes are SIGNED or not. int32."""
    if INTERPRETED:
        for i in tl.static_range(2):
            byte = (w << (24 - 8 * i - 16 * HIGH)) >> 24
            acc += ((x << (16 - 16 * i)) >> 16) * (byte if SIGNED else byte & 255)
    else:
        acc = tl.inline_asm_elementwise(
            dp2a_code(HIGH, SIGNED), "=r,r,r,r", [x, w, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    return acc


@triton.constexpr_function
def extra_bits(fmt: str) -> int:
    """Bits by which the bytes that stand for weights are worth more than the weights."""
    return {"int8": 0, "mxfp4": 1}.get(fmt, 4)


@triton.jit
def scale_of(exponent, lost, SHIFT: tl.constexpr):
    """exponent: float32's, of a run's largest. (what to multiply values by, what an integer is worth less SHIFT bits).

    lost: where there is an infinity or NaN, which makes its whole run NaN.
    """
    factor = ((2 * 127 + 14 - exponent) << 23).to(tl.float32, bitcast=True)
    return factor, tl.where(lost, 0x7FC00000, (exponent - 14 - SHIFT) << 23).to(tl.float32, bitcast=True)


# 1.5 · 2²³: a float32 of this and a little has the nearest integer of that little in its low bits.
MAGIC = tl.constexpr(12582912.0)


# 0x88888888 and 0xF0F0F0F0.
EIGHTS = tl.constexpr(-2004318072)
HIGH_NIBBLES = tl.constexpr(-252645136)


@triton.jit
def signed_bytes_of(w, zero, PART: tl.constexpr, FMT: tl.constexpr):
    """``bytes_of``, but int4's less 8 and times 16, which need no sums of x. zero: unknown_zero()."""
    if FMT == "int8" or FMT == "mxfp4":
        four = bytes_of(w, zero, PART, FMT)
    else:
        # One instruction, which has room for one constant.
        four = ((w if PART else w << 4) ^ (EIGHTS + zero)) & HIGH_NIBBLES
    return four


@triton.constexpr_function
def abs_max_code(half: bool) -> str:
    """The larger of two pairs of values each, in absolute value; NaN if one is."""
    kind = "f16x2" if half else "bf16x2"
    return f"{{ .reg .b32 a; abs.{kind} a, $1; max.NaN.{kind} $0, a, $2; }}"


@triton.jit
def abs_max(w, most, HALF: tl.constexpr):
    """w, most (int32): pairs of 16-bit floats, most's without signs; the larger ones' bits without signs, as pairs."""
    if INTERPRETED:
        low = tl.maximum(w & 0x7FFF, most & 0x7FFF)
        most = low | (tl.maximum((w >> 16) & 0x7FFF, most >> 16) << 16)
    else:
        most = tl.inline_asm_elementwise(abs_max_code(HALF), "=r,r,r", [w, most], dtype=tl.int32, is_pure=True, pack=1)
    return most


@triton.jit
def run_scale(words, SHIFT: tl.constexpr, HALF: tl.constexpr):
    """``scale_of`` for runs of x, all whose words (int32, two 16-bit floats each) are given."""
    BITS: tl.constexpr = 10 if HALF else 7
    BIAS: tl.constexpr = 15 if HALF else 127
    LEAST: tl.constexpr = 1 if HALF else 15 + SHIFT
    most = words[0] & 0x7FFF7FFF
    for i in tl.static_range(1, len(words)):
        most = abs_max(words[i], most, HALF)
    exponent = tl.maximum(most & 0xFFFF, most >> 16) >> BITS
    return scale_of(tl.maximum(exponent, LEAST) + (127 - BIAS), exponent == 2 * BIAS + 1, SHIFT)


@triton.constexpr_function
def int16_code(half: bool, alternate: bool) -> str:
    """Two words of two 16-bit floats each to two of two integers, by way of 1.5 · 2²³ (0f4B400000)."""
    values = (2, "p", "q"), (3, "r", "s")
    if half:
        widen = "".join(
            f"mov.b32 {{l, h}}, ${word}; cvt.f32.f16 {first}, l; cvt.f32.f16 {second}, h; "
            for word, first, second in values
        )
    else:
        widen = "".join(
            f"shl.b32 {first}, ${word}, 16; and.b32 {second}, ${word}, 0xffff0000; " for word, first, second in values
        )
    add = "".join(f"fma.rn.f32 {v}, {v}, $4, 0f4B400000; " for v in "pqrs")
    pack = "prmt.b32 $0, p, {}, 0x5410; prmt.b32 $1, {}, s, 0x5410;".format(*(("r", "q") if alternate else ("q", "r")))
    return "{ .reg .b16 l, h; .reg .b32 p, q, r, s; " + widen + add + pack + " }"


@triton.jit
def int16_of(word, factor, SECOND: tl.constexpr, HALF: tl.constexpr):
    """The first or second 16-bit float of a word, times factor, to the nearest integer."""
    if HALF:
        x = ((word >> (16 if SECOND else 0)) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif SECOND:
        x = (word & -65536).to(tl.float32, bitcast=True)
    else:
        x = (word << 16).to(tl.float32, bitcast=True)
    return (x * factor + MAGIC).to(tl.int32, bitcast=True)


@triton.jit
def int16_pairs(a, b, factor, HALF: tl.constexpr, ALTERNATE: tl.constexpr):
    """Four values, of words a and b (int32, two 16-bit floats each), times factor, as two words of two int16.

    In order, or, ALTERNATE, each word with one of a and one of b.
    """
    if INTERPRETED:
        p, q = int16_of(a, factor, False, HALF), int16_of(a, factor, True, HALF)
        r, s = int16_of(b, factor, False, HALF), int16_of(b, factor, True, HALF)
        if ALTERNATE:
            q, r = r, q
        first, second = (p & 0xFFFF) | (q << 16), (r & 0xFFFF) | (s << 16)
    else:
        first, second = tl.inline_asm_elementwise(
            int16_code(HALF, ALTERNATE), "=r,=r,r,r,f", [a, b, factor], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    return first, second


@triton.jit
def input_words(at, c, k0, K, J: tl.constexpr, XW: tl.constexpr):
    """Words 4·J to 4·J + 3 of each run of XW words of x, (B, 1, runs). at: (B, 1, 1), rows; c: words of weights."""
    there = tl.zeros_like(c) + k0 + c // 4 * (2 * XW) + 8 * J < K
    x = tl.load(at + (k0 // 2 + c + c // 4 * (XW - 4) + 4 * J)[None, None, :], mask=there[None, None, :], other=0)
    return words_of_runs(x)


@triton.jit
def run_pairs(words, factor, PART: tl.constexpr, N: tl.constexpr, FMT: tl.constexpr, HALF: tl.constexpr):
    """Of runs of x, two words of two int16 each, for the four weights that part PART of word N holds."""
    if FMT == "mxfp4":
        first, second = int16_pairs(words[2 * N + PART], words[8 + 2 * N + PART], factor, HALF, True)
    else:
        first, second = int16_pairs(words[8 * PART + 2 * N], words[8 * PART + 2 * N + 1], factor, HALF, False)
    return first, second


@triton.jit
def made_sums(ws, acc, x_ptr, xrow, c, k0, K, FMT: tl.constexpr):
    """Sums of ``signed_bytes_of`` weights times integers of x, what these are worth, and their sums where needed."""
    PARTS: tl.constexpr = 1 if FMT == "int8" else 2
    XW: tl.constexpr = 8 * PARTS
    HALF: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    SUMS: tl.constexpr = FMT == "int4zp" or FMT == "mxfp4"
    SIGNED: tl.constexpr = FMT != "mxfp4"
    at = x_ptr.to(tl.pointer_type(tl.int32)) + (xrow // 2)[:, None, None]
    words = input_words(at, c, k0, K, 0, XW) + input_words(at, c, k0, K, 1, XW)
    if PARTS == 2:
        words = words + input_words(at, c, k0, K, 2, XW) + input_words(at, c, k0, K, 3, XW)
    factor, worth = run_scale(words, extra_bits(FMT), HALF)
    zero = 0 if FMT == "int8" else unknown_zero()
    dot = tl.zeros(acc.shape, tl.int32)
    ones = tl.full(factor.shape, 0x0101, tl.int32)
    x_sum = tl.zeros_like(ones)
    for part in tl.static_range(PARTS):
        for i in tl.static_range(4):
            first, second = run_pairs(words, factor, part, i, FMT, HALF)
            four = signed_bytes_of(ws[i], zero, part, FMT)
            dot = dp2a(second, four, dp2a(first, four, dot, False, SIGNED), True, SIGNED)
            if SUMS:
                x_sum = dp2a(second, ones, dp2a(first, ones, x_sum, False, True), False, True)
    return dot.to(tl.float32), worth, x_sum.to(tl.float32)

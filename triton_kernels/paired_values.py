"""Stored values of 4 and 8 bits to bfloat16 or float16 for tensor cores, two bytes at a time.

Unpacking runs on the ordinary units beside the tensor cores' products, so instructions a value decide how fast a
quantised tile is: about two here, by operations on two 16-bit numbers at once, where the way through float32
(``dequant``) takes six. Values come in the layout that tensor cores take their left operand in, from shared memory to
registers without a way back: Triton moves a chain of operations there if all work element by element, inline assembly
has one operand and one result, and its leaves are loads. That is why scales travel in the upper half of the word with
their bytes, and why the two results of a word are written as two operations.
"""

from __future__ import annotations

import triton
import triton.language as tl
from ktfx.triton_kernels.dequant import INTERPRETED, e2m1, narrow


@triton.jit
def e8m0_bits(exponent):
    """int32 exponents of bias 127 to the bits of bfloat16 powers of two."""
    return tl.where(exponent == 0, 0x0040, exponent << 7)


@triton.jit
def half_of(bits, DT: tl.constexpr):
    """The 16-bit number in the low half of an int32, as float32."""
    return (bits & 65535).to(tl.int16).to(DT, bitcast=True).to(tl.float32)


@triton.constexpr_function
def pair_asm(steps: str, second: bool) -> str:
    """PTX that works on two 16-bit numbers at once and returns the first or the second.

    One operand and one result, since only such operations move to the layout that tensor cores take their operand in;
    what the two results have in common ptxas computes once.
    """
    ends = "{rest, $0}" if second else "{$0, rest}"
    names = "word, bytes, value, less, scale, ends, fronts, minus, zero"
    return f"{{ .reg .b32 {names}; .reg .b16 rest; {steps} mov.b32 {ends}, value; }}"


@triton.constexpr_function
def nibble_steps(half: bool, high: bool, zeros: bool) -> str:
    base, eight = ("0x64006400", "0x64086408") if half else ("0x43004300", "0x43084308")
    eights = f"mov.b32 word, $1; mov.b32 less, {eight};"
    of_group = f"mov.b64 {{word, less}}, $1; or.b32 less, less, {base};"
    shift = "shr.u32 bytes, bytes, 4;" if high else ""
    # Compute capability 8 has only bfloat16's fused form: b - 1·a and a·s - 0 are what sub and mul would give.
    finish = (
        "sub.f16x2 value, value, less; mul.f16x2 value, value, scale;"
        if half
        else "mov.b32 minus, 0xbf80bf80; mov.b32 zero, 0x80008000;"
        " fma.rn.bf16x2 value, less, minus, value; fma.rn.bf16x2 value, value, scale, zero;"
    )
    return (
        f"{of_group if zeros else eights} prmt.b32 scale, word, 0, 0x3232; prmt.b32 bytes, word, 0, 0x4140; {shift}"
        f" lop3.b32 value, bytes, 0x000f000f, {base}, 0xea; {finish}"
    )


@triton.jit
def nibble(w, DT: tl.constexpr, ZEROS: tl.constexpr, HIGH: tl.constexpr, SECOND: tl.constexpr):
    """The low or HIGH nibble of one of two bytes, less 8 or the zero point, times the scale: bfloat16 or float16.

    w: the bytes in the low 16 bits, above them the scale's bits; with ZEROS int64, above those the zero point in both
    halves, else int32. A nibble or-ed into the mantissa of 2⁷ (float16: 2¹⁰) is 2⁷ + nibble, and the difference to the
    zero point in the same form is exact; only the product is rounded. About two instructions a value.
    """
    if INTERPRETED:
        zero = ((w >> 32) & 255).to(tl.float32) if ZEROS else 8.0
        value = ((w >> (8 * SECOND + 4 * HIGH)) & 15).to(tl.float32) - zero
        value = narrow(value * half_of(w >> 16, DT), DT)
    else:
        HALF: tl.constexpr = tl.float16 == DT
        bits = tl.inline_asm_elementwise(
            pair_asm(nibble_steps(HALF, HIGH, ZEROS), SECOND), "=h,l" if ZEROS else "=h,r", [w],
            dtype=tl.int16, is_pure=True, pack=1,
        )  # fmt: skip
        value = bits.to(DT, bitcast=True)
    return value


@triton.constexpr_function
def e2m1_steps(high: bool) -> str:
    which, shift = ("0x7351", "") if high else ("0x6240", "shl.b32 less, less, 4;")
    return (
        "mov.b32 zero, 0x80008000; prmt.b32 scale, $1, 0, 0x3232; prmt.b32 less, $1, 0, 0x1404;"
        " and.b32 bytes, $1, 0x7777; prmt.b32 ends, 0xc0800000, 0xc0804000, bytes;"
        f" prmt.b32 fronts, 0x3f3f3f00, 0x40404040, bytes; prmt.b32 value, ends, fronts, {which}; {shift}"
        " lop3.b32 value, less, 0x80008000, value, 0xea; fma.rn.bf16x2 value, value, scale, zero;"
    )


@triton.jit
def e2m1_nibble(w, HIGH: tl.constexpr, SECOND: tl.constexpr):
    """The e2m1 value in the low or HIGH nibble of one of two bytes, times the scale: bfloat16, exact.

    w: int32, the bytes in the low half, the bits of a bfloat16 power of two in the other. Two lookups give the low and
    the high bytes of four values without their signs, which come from the bytes.
    """
    if INTERPRETED:
        low, high = e2m1((w >> 8 * SECOND) & 255)
        value = narrow((high if HIGH else low) * half_of(w >> 16, tl.bfloat16), tl.bfloat16)
    else:
        bits = tl.inline_asm_elementwise(
            pair_asm(e2m1_steps(HIGH), SECOND), "=h,r", [w], dtype=tl.int16, is_pure=True, pack=1
        )
        value = bits.to(tl.bfloat16, bitcast=True)
    return value


@triton.constexpr_function
def int8_steps() -> str:
    return (
        "mov.b32 minus, 0xbf80bf80; prmt.b32 bytes, $1, 0, 0x4140;"
        " lop3.b32 value, bytes, 0x007f007f, 0x43004300, 0xea; lop3.b32 less, bytes, 0x00800080, 0x43004300, 0xea;"
        " fma.rn.bf16x2 value, less, minus, value;"
    )


@triton.jit
def int8_byte(w, SECOND: tl.constexpr):
    """One of two int8 in the low half of an int32, to bfloat16: 2⁷ + seven bits, less 2⁷ or, by the eighth bit, 2⁸."""
    if INTERPRETED:
        value = narrow((w << (24 - 8 * SECOND)) >> 24, tl.bfloat16)
    else:
        bits = tl.inline_asm_elementwise(
            pair_asm(int8_steps(), SECOND), "=h,r", [w], dtype=tl.int16, is_pure=True, pack=1
        )
        value = bits.to(tl.bfloat16, bitcast=True)
    return value


@triton.jit
def load_small(ptr, row, ld, first, mask, MANY: tl.constexpr):
    """ptr[row · ld + first + (0 … MANY-1)] of numbers of 8 or 16 bits, (R, MANY), 0 where masked, as int32 bits.

    row, mask: (R,). MANY is 1, 2 or 4, no more than a word holds, and divides ``first`` and ld. A pipelined loop copies
    words ahead into shared memory; smaller numbers it would wait for. One load for each place that the numbers may have
    in a word, masked to the rows that have it: a shift by row would keep the result from the layout of tensor cores.
    """
    BITS: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth
    PER: tl.constexpr = 32 // BITS
    MASK: tl.constexpr = (1 << BITS) - 1
    at = row * ld + first
    words = ptr.to(tl.pointer_type(tl.int32)) + at // PER
    word = tl.load(words, mask=mask & (at % PER == 0), other=0)
    for place in tl.static_range(MANY, PER, MANY):
        word = word | (tl.load(words, mask=mask & (at % PER == place), other=0) >> (place * BITS))
    if MANY == 1:
        bits = (word & MASK)[:, None]
    elif MANY == 2:
        bits = tl.join(word & MASK, (word >> BITS) & MASK)
    else:
        tl.static_assert(MANY == 4 and BITS == 8)
        even, odd = tl.join(word & MASK, (word >> 16) & MASK), tl.join((word >> 8) & MASK, (word >> 24) & MASK)
        bits = tl.join(even, odd).reshape(row.shape[0], 4)
    return bits


@triton.jit
def paired_nibbles(
    w_ptr, s_ptr, z_ptr, row, srow, ok, k0, K, ldw, lds,
    FMT: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """w[row, k0:k0+BK] of int4, int4zp or mxfp4 in DT: the values of low and of high nibbles, (BN, BK/32, 16) each."""
    BN: tl.constexpr = row.shape[0]
    NG: tl.constexpr = BK // G if BK > G else 1
    run, c = k0 // 32 + tl.arange(0, BK // 32), tl.arange(0, 8)
    words = w_ptr.to(tl.pointer_type(tl.uint16)) + row[:, None, None] * (ldw // 2)
    data = tl.load(
        words + run[None, :, None] * 8 + c[None, None, :],
        mask=ok[:, None, None] & (run * 32 < K)[None, :, None],
        other=0,
    )
    data = data.to(tl.int32).reshape(BN, NG, BK // NG // 32, 8)
    in_scales = ok & (tl.zeros_like(srow) + k0 < K)
    scale = load_small(s_ptr, srow, lds, k0 // G, in_scales, NG)
    if FMT == "mxfp4":
        w = data | (e8m0_bits(scale) << 16)[:, :, None, None]
        low = tl.join(e2m1_nibble(w, False, False), e2m1_nibble(w, False, True))
        high = tl.join(e2m1_nibble(w, True, False), e2m1_nibble(w, True, True))
    else:
        ZEROS: tl.constexpr = FMT == "int4zp"
        w = data | (scale << 16)[:, :, None, None]
        if ZEROS:
            zero = load_small(z_ptr, srow, lds, k0 // G, in_scales, NG)
            w = (w.to(tl.int64) & 0xFFFFFFFF) | ((zero | (zero << 16)).to(tl.int64) << 32)[:, :, None, None]
        low = tl.join(nibble(w, DT, ZEROS, False, False), nibble(w, DT, ZEROS, False, True))
        high = tl.join(nibble(w, DT, ZEROS, True, False), nibble(w, DT, ZEROS, True, True))
    return low.reshape(BN, BK // 32, 16), high.reshape(BN, BK // 32, 16)

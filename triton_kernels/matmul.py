"""Products with a stored weight, the two shapes every matmul family builds on.

``multiply_rows`` is for one vector: weight rows times x in float32 on the ordinary units, which is all that reading at
full bandwidth needs. ``multiply_tile`` is for many: tensor cores, with the weight as the left operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.dequant import e2m1, e4m3, group_offset, load_group_scale, narrow, nibbles, product
from ktfx.triton_kernels.launch import bytes_view, cdiv, native_fp8, pow2

from ktfx.formats import FP8_BLOCK, parse_format


@triton.jit
def scale_row(e, n, N, FMT: tl.constexpr):
    """Which row of the scales belongs to row n of expert e."""
    if FMT == "fp8":
        return e * ((N + 127) // 128) + n // 128
    return e * N + n


@triton.jit
def multiply_rows(
    acc, w_ptr, s_ptr, z_ptr, row, srow, ok, x_ptr, xrow, k0, K, ldw, lds,
    FMT: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, NATIVE: tl.constexpr, WORDS: tl.constexpr = False,
):  # fmt: skip
    """acc += w[row, k0:k0+BK] · x[xrow, k0:k0+BK], still unsummed along k (model, int8) or along groups.

    row, srow, ok: (L, R), weight rows, scale rows and which exist; xrow: (L or 1,) element offsets of the inputs.
    acc: what ``accumulator`` gives. WORDS: by ``multiply_words``.
    """
    if WORDS:
        acc = multiply_words(acc, w_ptr, s_ptr, z_ptr, row, srow, ok, x_ptr, xrow, k0, K, ldw, lds, FMT, G, BK)
    elif FMT == "model" or FMT == "int8":
        k = k0 + tl.arange(0, BK)
        x = tl.load(x_ptr + xrow[:, None] + k[None, :], mask=(k < K)[None, :], other=0.0).to(tl.float32)
        w = tl.load(
            w_ptr + row[:, :, None] * ldw + k[None, None, :], mask=ok[:, :, None] & (k < K)[None, None, :], other=0
        )
        acc += w.to(tl.float32) * x[:, None, :]
    else:
        NG: tl.constexpr = BK // G
        g = k0 // G + tl.arange(0, NG)
        at, there = srow[:, :, None] * lds + g[None, None, :], ok[:, :, None] & (g * G < K)[None, None, :]
        scale = load_group_scale(s_ptr, at, there, FMT)
        if FMT == "fp8":
            k = g[:, None] * G + tl.arange(0, G)[None, :]
            x = tl.load(x_ptr + xrow[:, None, None] + k[None, :, :], mask=(k < K)[None, :, :], other=0.0)
            w = tl.load(
                w_ptr + row[:, :, None, None] * ldw + k[None, None, :, :],
                mask=ok[:, :, None, None] & (k < K)[None, None, :, :], other=0,
            )  # fmt: skip
            acc += tl.sum(e4m3(w, NATIVE) * x.to(tl.float32)[:, None, :, :], 3) * scale
        else:
            c = tl.arange(0, G // 2)
            k = g[:, None] * G + (c // 16 * 32 + c % 16)[None, :]
            x_low = tl.load(x_ptr + xrow[:, None, None] + k[None, :, :], mask=(k < K)[None, :, :], other=0.0)
            k += 16
            x_high = tl.load(x_ptr + xrow[:, None, None] + k[None, :, :], mask=(k < K)[None, :, :], other=0.0)
            col = g[:, None] * (G // 2) + c[None, :]
            data = tl.load(
                w_ptr + row[:, :, None, None] * ldw + col[None, None, :, :], mask=there[:, :, :, None], other=0
            )
            if FMT == "mxfp4":
                low, high = e2m1(data)
            else:
                low, high = nibbles(data, group_offset(z_ptr, at, there, FMT)[:, :, :, None])
            part = low * x_low.to(tl.float32)[:, None, :, :] + high * x_high.to(tl.float32)[:, None, :, :]
            acc += tl.sum(part, 3) * scale
    return acc


@triton.jit
def four_inputs(x_ptr, at, there, FACTOR: tl.constexpr):
    """x[4·at … 4·at + 3] as four float32 tiles from one 8-byte load, times FACTOR. x: bfloat16 or float16."""
    DT: tl.constexpr = x_ptr.dtype.element_ty
    both = tl.load(x_ptr.to(tl.pointer_type(tl.int64)) + at, mask=there, other=0)
    first, second = both.to(tl.int32), (both >> 32).to(tl.int32)
    if tl.bfloat16 == DT:
        a, b = (first << 16).to(tl.float32, bitcast=True), (first & -65536).to(tl.float32, bitcast=True)
        c, d = (second << 16).to(tl.float32, bitcast=True), (second & -65536).to(tl.float32, bitcast=True)
    else:
        a = first.to(tl.int16).to(DT, bitcast=True).to(tl.float32)
        b = (first >> 16).to(tl.int16).to(DT, bitcast=True).to(tl.float32)
        c = second.to(tl.int16).to(DT, bitcast=True).to(tl.float32)
        d = (second >> 16).to(tl.int16).to(DT, bitcast=True).to(tl.float32)
    if FACTOR != 1.0:
        a, b, c, d = a * FACTOR, b * FACTOR, c * FACTOR, d * FACTOR
    return a, b, c, d


@triton.jit
def nibble_pair(word, byte: tl.constexpr, FMT: tl.constexpr):
    """Low and high nibble of a byte of int32 words as float32 in two or three operations each.

    int4: 2¹¹ + low and 2⁷ + high (the nibble lies inside the mantissa; the caller takes the offsets off whole blocks).
    mxfp4: the values times 2⁻¹²⁶ (see ``e2m1``).
    """
    if FMT == "mxfp4":
        low = ((word << (28 - 8 * byte)) >> 6) & -2118123520  # sign, two bits of exponent, one of mantissa
        high = ((word << (24 - 8 * byte)) >> 6) & -2118123520
    else:
        if byte == 0:
            at = word << 12
        elif byte == 1:
            at = word << 4
        elif byte == 2:
            at = word >> 4
        else:
            at = word >> 12
        low = (at & 0xF000) | 0x45000000
        high = (at & 0xF0000) | 0x43000000
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)


@triton.jit
def multiply_words(
    acc, w_ptr, s_ptr, z_ptr, row, srow, ok, x_ptr, xrow, k0, K, ldw, lds,
    FMT: tl.constexpr, G: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``multiply_rows`` of int4, int4zp, mxfp4 and int8 over 16-bit inputs: 16 bytes of weights a thread at a time.

    What a nibble stands for is only worked out as far as a float32 with an offset; offsets and scales are applied once
    a block of 32 values. acc: (L, R, BK / 32). Needs K and xrow divisible by 4, rows of whole 16-byte runs.
    """
    NB: tl.constexpr = BK // 32 if FMT != "int8" else BK // 16
    b, c = tl.arange(0, NB)[:, None], tl.arange(0, 4)[None, :]
    words = w_ptr.to(tl.pointer_type(tl.int32))
    if FMT == "int8":
        at = k0 // 4 + b * 4 + c
        in_row = at * 4 < K
        w = tl.load(
            words + row[:, :, None, None] * (ldw // 4) + at[None, None, :, :],
            mask=ok[:, :, None, None] & in_row[None, None, :, :], other=0,
        )  # fmt: skip
        x0, x1, x2, x3 = four_inputs(x_ptr, (xrow // 4)[:, None, None] + at[None, :, :], in_row[None, :, :], 1.0)
        # A byte with its sign bit flipped is value + 128; at a mantissa's bits 8 … 15 it is 2¹⁵ + 128 + value.
        w = w ^ -2139062144
        part = (((w << 8) & 0xFF00) | 0x47000000).to(tl.float32, bitcast=True) * x0[:, None, :, :]
        part += ((w & 0xFF00) | 0x47000000).to(tl.float32, bitcast=True) * x1[:, None, :, :]
        part += (((w >> 8) & 0xFF00) | 0x47000000).to(tl.float32, bitcast=True) * x2[:, None, :, :]
        part += (((w >> 16) & 0xFF00) | 0x47000000).to(tl.float32, bitcast=True) * x3[:, None, :, :]
        part -= (32896.0 * (x0 + x1 + x2 + x3))[:, None, :, :]
        acc += tl.sum(part, 3)
    else:
        FACTOR: tl.constexpr = 1.8446744073709552e19 if FMT == "mxfp4" else 1.0  # 2⁶⁴: products stay normal numbers
        g = (k0 + tl.arange(0, NB) * 32) // G
        there = ok[:, :, None] & (g * G < K)[None, None, :]
        at_scale = srow[:, :, None] * lds + g[None, None, :]
        col = k0 // 8 + b * 4 + c
        w = tl.load(
            words + row[:, :, None, None] * (ldw // 4) + col[None, None, :, :], mask=there[:, :, :, None], other=0
        )
        at = k0 // 4 + b * 8 + c
        xat = (xrow // 4)[:, None, None] + at[None, :, :]
        l0, l1, l2, l3 = four_inputs(x_ptr, xat, (at * 4 < K)[None, :, :], FACTOR)
        h0, h1, h2, h3 = four_inputs(x_ptr, xat + 4, (at * 4 + 16 < K)[None, :, :], FACTOR)
        low, high = nibble_pair(w, 0, FMT)
        part = low * l0[:, None, :, :]
        part += high * h0[:, None, :, :]
        low, high = nibble_pair(w, 1, FMT)
        part += low * l1[:, None, :, :]
        part += high * h1[:, None, :, :]
        low, high = nibble_pair(w, 2, FMT)
        part += low * l2[:, None, :, :]
        part += high * h2[:, None, :, :]
        low, high = nibble_pair(w, 3, FMT)
        part += low * l3[:, None, :, :]
        part += high * h3[:, None, :, :]
        scale = load_group_scale(s_ptr, at_scale, there, FMT)
        if FMT == "mxfp4":
            acc += tl.sum(part, 3) * 4.611686018427388e18 * scale  # 2⁶², what is left of 2¹²⁶
        else:
            x_low, x_high = l0 + l1 + l2 + l3, h0 + h1 + h2 + h3
            if FMT == "int4zp":
                part -= (2048.0 * x_low + 128.0 * x_high)[:, None, :, :]
                zero = tl.load(z_ptr + at_scale, mask=there, other=0).to(tl.float32)
                acc += (tl.sum(part, 3) - zero * tl.sum(x_low + x_high, 2)[:, None, :]) * scale
            else:
                part -= (2056.0 * x_low + 136.0 * x_high)[:, None, :, :]
                acc += tl.sum(part, 3) * scale
    return acc


@triton.jit
def accumulator(
    L: tl.constexpr, R: tl.constexpr, FMT: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, WORDS: tl.constexpr
):
    """Zeros for ``multiply_rows``, or with WORDS for ``multiply_words``."""
    WORD_PARTS: tl.constexpr = BK // 16 if FMT == "int8" else BK // 32
    ROW_PARTS: tl.constexpr = BK if FMT == "model" or FMT == "int8" else BK // G
    PARTS: tl.constexpr = WORD_PARTS if WORDS else ROW_PARTS
    return tl.zeros((L, R, PARTS), tl.float32)


@triton.jit
def load_inputs(x_ptr, xrow, there, k0, K, NIBBLES: tl.constexpr, BK: tl.constexpr):
    """x[xrow, k0:k0+BK] transposed, (BK, BM); for nibbles the two (BK/2, BM) halves that meet low and high values."""
    if NIBBLES:
        c = tl.arange(0, BK // 2)
        k = k0 + c // 16 * 32 + c % 16
        low = tl.load(x_ptr + xrow[None, :] + k[:, None], mask=there[None, :] & (k < K)[:, None], other=0.0)
        k += 16
        high = tl.load(x_ptr + xrow[None, :] + k[:, None], mask=there[None, :] & (k < K)[:, None], other=0.0)
    else:
        k = k0 + tl.arange(0, BK)
        low = tl.load(x_ptr + xrow[None, :] + k[:, None], mask=there[None, :] & (k < K)[:, None], other=0.0)
        high = low
    return low, high


@triton.jit
def multiply_tile(
    acc, low_x, high_x, w_ptr, s_ptr, z_ptr, row, srow, ok, k0, K, ldw, lds,
    FMT: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """acc (BN, BM) += w[row, k0:k0+BK] · x; weights become x's dtype, scales and all (int8's scale is the caller's)."""
    DT: tl.constexpr = low_x.dtype
    BN: tl.constexpr = row.shape[0]
    if FMT == "model" or FMT == "int8" or FMT == "fp8":
        k = k0 + tl.arange(0, BK)
        w = tl.load(w_ptr + row[:, None] * ldw + k[None, :], mask=ok[:, None] & (k < K)[None, :], other=0)
        if FMT == "fp8":
            scale = load_group_scale(s_ptr, srow * lds + k0 // G, ok, FMT)
            w = e4m3(w, NATIVE) * scale[:, None]
        acc = product(narrow(w, DT), low_x, acc)
    else:
        # A tile is whole groups (3-d, one scale a group), or lies inside one group.
        NG: tl.constexpr = BK // G if BK > G else 1
        GB: tl.constexpr = BK // NG // 2
        g = k0 // G + tl.arange(0, NG)
        there = ok[:, None] & (g * G < K)[None, :]
        at = srow[:, None] * lds + g[None, :]
        col = k0 // 2 + tl.arange(0, NG)[:, None] * GB + tl.arange(0, GB)[None, :]
        data = tl.load(w_ptr + row[:, None, None] * ldw + col[None, :, :], mask=there[:, :, None], other=0)
        scale = load_group_scale(s_ptr, at, there, FMT)[:, :, None]
        if FMT == "mxfp4":
            low, high = e2m1(data)
        else:
            low, high = nibbles(data, group_offset(z_ptr, at, there, FMT)[:, :, None])
        acc = product(narrow(low * scale, DT).reshape(BN, NG * GB), low_x, acc)
        acc = product(narrow(high * scale, DT).reshape(BN, NG * GB), high_x, acc)
    return acc


@dataclass(frozen=True)
class StoredWeight:
    """A weight as kernels take it: (N, K) or a stack in ``fmt``, rows of ldw elements or bytes and lds scales."""

    data: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    fmt: str
    group: int
    ldw: int
    lds: int

    @property
    def grouped(self) -> bool:
        """Whether scales belong to groups along k, not to whole rows."""
        return self.fmt not in ("model", "int8")

    @property
    def nibbles(self) -> bool:
        return self.fmt in ("int4", "int4zp", "mxfp4")

    @property
    def lines(self) -> int:
        """Lines of 128 bytes that hold a row, as a power of two; 0 for rows too long to be worth asking for ahead."""
        lines = pow2(cdiv(self.ldw * self.data.element_size(), 128))
        return lines if lines <= 256 else 0

    def words(self, x: torch.Tensor, K: int, BK: int) -> bool:
        """Whether ``multiply_words`` can be used: 16-bit inputs in 8-byte runs, weights in 16-byte runs."""
        return (
            (self.nibbles or self.fmt == "int8")
            and x.element_size() == 2
            and K % 4 == 0
            and x.stride(0) % 4 == 0
            and x.data_ptr() % 8 == 0
            and self.ldw % 16 == 0
            and BK >= 64
        )

    def constants(self) -> dict[str, object]:
        """The launch arguments that name the format."""
        native = self.fmt == "fp8" and native_fp8(self.data.device)
        return {"FMT": self.fmt, "G": max(self.group, 1), "NATIVE": native}


def stored_weight(name: str, tensors: Sequence[torch.Tensor]) -> StoredWeight:
    """``QuantizedWeight.tensors()``, contiguous, for a launch."""
    form, group = parse_format(name)
    data = bytes_view(tensors[0])
    scales = tensors[1] if len(tensors) > 1 else data
    zeros = tensors[2] if len(tensors) > 2 else data
    lds = scales.shape[-1] if form.name not in ("model", "int8") else 1
    return StoredWeight(data, scales, zeros, form.name, group if form.name != "fp8" else FP8_BLOCK, data.shape[-1], lds)

"""Stored weight values to numbers inside a kernel (ktfx/formats.py defines the formats), and the gates of experts.

``FMT`` is the format's name, ``G`` its group. Everything here is a ``triton.jit`` function other kernels call.
"""

from __future__ import annotations

import triton
import triton.language as tl
from ktfx.triton_kernels.launch import interpreted

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def nibbles(data, offset):
    """uint8 bytes to (low, high) as float32, minus ``offset`` - 2²³ (a scalar or a tile; 2²³ + 8 for symmetric int4).

    A nibble or-ed into the mantissa of 2²³ is the float 2²³ + nibble: one logic operation where an integer-to-float
    conversion runs at an eighth of the rate. The subtraction is exact.
    """
    low = ((data & 15).to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - offset
    high = ((data >> 4).to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - offset
    return low, high


@triton.jit
def e2m1(data):
    """uint8 bytes to the two e2m1 values they hold, as float32.

    The three low bits are exponent and mantissa of a float32 whose exponent is too small by 126; e2m1's subnormal 0.5
    becomes a float32 subnormal, so the product is right for it too.
    """
    bits = data.to(tl.int32)
    low = ((bits & 8) << 28) | ((bits & 7) << 22)
    high = ((bits & 128) << 24) | ((bits & 112) << 18)
    scale = 8.507059173023462e37  # 2¹²⁶
    return low.to(tl.float32, bitcast=True) * scale, high.to(tl.float32, bitcast=True) * scale


@triton.jit
def e4m3(data, NATIVE: tl.constexpr):
    """uint8 bytes holding float8 e4m3 to float32; NATIVE where the GPU converts them itself (Ada, Hopper and later)."""
    if NATIVE:
        value = data.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        bits = data.to(tl.int32)
        value = (((bits & 128) << 24) | ((bits & 127) << 20)).to(tl.float32, bitcast=True)
        value *= 1.329227995784916e36  # 2¹²⁰
    return value


@triton.jit
def e8m0(data):
    """uint8 exponents of bias 127 to float32 powers of two."""
    bits = data.to(tl.int32)
    return tl.where(bits == 0, 0x00400000, bits << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_group_scale(s_ptr, at, mask, FMT: tl.constexpr):
    """Scales at offsets ``at`` as float32; 0 where masked."""
    if FMT == "mxfp4":
        scale = tl.where(mask, e8m0(tl.load(s_ptr + at, mask=mask, other=127)), 0.0)
    else:
        scale = tl.load(s_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return scale


@triton.jit
def group_offset(z_ptr, at, mask, FMT: tl.constexpr):
    """What ``nibbles`` has to subtract, for groups at ``at``: 2²³ plus the zero point."""
    if FMT == "int4zp":
        offset = tl.load(z_ptr + at, mask=mask, other=0).to(tl.float32) + 8388608.0
    else:
        offset = tl.full(at.shape, 8388616.0, tl.float32)
    return offset


@triton.jit
def activation(t, ACT: tl.constexpr):
    """float32 to float32; the names of ``ktfx.ops.experts.ACTIVATIONS``."""
    if ACT == "silu":
        t = t * tl.sigmoid(t)
    elif ACT == "gelu":
        t = 0.5 * t * (1.0 + tl.erf(t * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # 0.5·(1 + tanh u) = sigmoid(2u)
        t = t * tl.sigmoid(1.5957691216057308 * (t + 0.044715 * t * t * t))
    elif ACT == "relu":
        t = tl.maximum(t, 0.0)
    elif ACT == "relu2":
        t = tl.maximum(t, 0.0)
        t = t * t
    else:
        tl.static_assert(ACT == "none")
    return t


@triton.jit
def gated(gate, up, ACT: tl.constexpr, GATE: tl.constexpr, alpha, limit):
    """act(gate)·up, or gpt-oss's clamped gate (``ktfx.ops.experts.apply_gate``)."""
    if GATE == "clamped":
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        h = (up + 1.0) * gate * tl.sigmoid(gate * alpha)
    else:
        h = activation(gate, ACT) * up
    return h


@triton.jit
def narrow(t, DT: tl.constexpr):
    """To the dtype that the tensor cores take, round to nearest even."""
    if INTERPRETED and tl.bfloat16 == DT:
        # The interpreter cuts off instead of rounding, and knows no way from integers to bfloat16.
        bits = t.to(tl.float32).to(tl.int32, bitcast=True)
        t = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return t.to(DT)


@triton.jit
def product(a, b, acc):
    """acc + a·b, sums in float32 (int32 for int8 operands), float32 operands without tf32's loss."""
    if INTERPRETED:  # the interpreter would multiply bfloat16's bits as integers
        acc += tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee").to(acc.dtype)
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc


@triton.jit
def settled(acc):
    """acc (float32) once every product in flight has been added to it: for left operands that are made in registers.

    Hopper's tensor cores read those registers while the program goes on. A sum that only the loop's next step uses lets
    Triton 3.6 begin that step's unpacking in the same registers (triton-lang/triton issue 9433; tiles of 256 rows gave
    wrong numbers on an H100), and where ptxas sees the danger it waits after each of a step's products. A sum that the
    step itself uses is waited for once, after all of them.
    """
    if not INTERPRETED:
        acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc

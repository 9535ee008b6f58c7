"""The assembly of ``paired_values``, run by a small reader of PTX over every pair of bytes, against the formats.

The interpreter of Triton takes another branch there, and a machine without a GPU runs no assembly: this reads the text
itself. What each instruction does is from the PTX manual.
"""

from __future__ import annotations

import re

import pytest
import torch

from ktfx.formats import E2M1

pytest.importorskip("triton")
WORDS = torch.arange(1 << 16)
MASK = 0xFFFFFFFF


def numbers(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The 16-bit numbers in the low halves of int64 words."""
    return bits.to(torch.int32).to(torch.int16).view(dtype)


def halves(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int64 words to the two 16-bit numbers they hold, as float32, (…, 2)."""
    return numbers(torch.stack([bits & 0xFFFF, bits >> 16 & 0xFFFF], -1), dtype).float()


def joined(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The way back, rounded to nearest even."""
    bits = values.to(dtype).view(torch.int16).long() & 0xFFFF
    return bits[..., 0] | bits[..., 1] << 16


def prmt(a: torch.Tensor, b: torch.Tensor, selector: torch.Tensor) -> torch.Tensor:
    """Four bytes of the eight of b:a, by the low three bits of the selector's nibbles; the fourth repeats the sign."""
    source = (a & MASK) | (b & MASK) << 32
    out = torch.zeros_like(source + selector)
    for i in range(4):
        nibble = selector >> (4 * i) & 15
        byte = source >> (8 * (nibble & 7)) & 255
        out |= torch.where(nibble >= 8, (byte >> 7) * 255, byte) << (8 * i)
    return out


def lop3(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, table: int) -> torch.Tensor:
    out = torch.zeros_like(a + b + c)
    for i in range(8):
        if table >> i & 1:
            terms = [t if i >> (2 - n) & 1 else ~t for n, t in enumerate((a, b, c))]
            out |= terms[0] & terms[1] & terms[2]
    return out & MASK


def run(asm: str, operand: torch.Tensor, *constants: int) -> torch.Tensor:
    """What the result register holds; operand: int64 words, constants: what the operands after it hold."""
    registers = {"$1": operand} | {f"${i + 2}": torch.full_like(operand, c) for i, c in enumerate(constants)}

    def value(name: str) -> torch.Tensor:
        if name in registers:
            return registers[name]
        return torch.full_like(operand, int(name, 0))

    for step in asm.strip().strip("{}").split(";"):
        words = re.sub(r"[,]", " ", step).split()
        if not words or words[0] == ".reg":
            continue
        op, args = words[0], words[1:]
        if op in ("mov.b32", "mov.b64") and (args[0].startswith("{") or args[-1].endswith("}")):
            low, high = (a.strip("{}") for a in args[:2])
            bits = 16 if op == "mov.b32" else 32
            registers[low] = value(args[2]) & ((1 << bits) - 1)
            registers[high] = value(args[2]) >> bits & ((1 << bits) - 1)
            continue
        target, sources = args[0], [value(a) for a in args[1:]]
        if op == "mov.b32":
            registers[target] = sources[0] & MASK
        elif op == "and.b32":
            registers[target] = sources[0] & sources[1]
        elif op == "or.b32":
            registers[target] = sources[0] | sources[1]
        elif op == "xor.b32":
            registers[target] = sources[0] ^ sources[1]
        elif op == "shl.b32":
            registers[target] = sources[0] << sources[1] & MASK
        elif op == "shr.u32":
            registers[target] = (sources[0] & MASK) >> sources[1]
        elif op == "prmt.b32":
            registers[target] = prmt(*sources)
        elif op == "lop3.b32":
            registers[target] = lop3(*sources[:3], int(args[4], 0))
        elif op == "fma.rn.bf16x2":
            a, b, c = (halves(s, torch.bfloat16) for s in sources)
            registers[target] = joined(a * b + c, torch.bfloat16)  # 16 bits of product: float32 rounds nothing
        elif op in ("sub.f16x2", "mul.f16x2"):
            a, b = (halves(s, torch.float16) for s in sources)
            registers[target] = joined(a - b if op.startswith("sub") else a * b, torch.float16)
        else:
            raise AssertionError(f"{op} is not read here")
    return registers["$0"]


def bits_of(value: float, dtype: torch.dtype) -> int:
    return int(torch.tensor([value], dtype=dtype).view(torch.int16)) & 0xFFFF


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("zero", [None, 0, 5, 15])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nibbles(dtype: torch.dtype, zero: int | None, high: bool, second: bool) -> None:
    from ktfx.triton_kernels.paired_values import nibble_steps, pair_asm

    asm = pair_asm(nibble_steps(dtype == torch.float16, high, zero is not None), second)
    for scale in (1.0, 0.01171875, -3.5, 0.0004372):
        bits = bits_of(scale, dtype)
        above = 0 if zero is None else (zero | zero << 16) << 32
        got = run(asm, WORDS | bits << 16 | above)
        code = WORDS >> (8 * second + 4 * high) & 15
        stored = numbers(torch.tensor([bits]), dtype).float()
        want = ((code - (8 if zero is None else zero)).float() * stored).to(dtype)
        assert torch.equal(numbers(got, dtype), want)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("high", [False, True])
def test_e2m1(high: bool, second: bool) -> None:
    from ktfx.triton_kernels.paired_values import e2m1_steps, pair_asm

    table = torch.tensor([*E2M1, *(-v for v in E2M1)])
    for exponent in (-126, -9, 0, 5, 120):
        got = run(pair_asm(e2m1_steps(high), second), WORDS | (exponent + 127) << 23)
        want = (table[WORDS >> (8 * second + 4 * high) & 15] * 2.0**exponent).bfloat16()
        assert torch.equal(numbers(got, torch.bfloat16), want)


@pytest.mark.parametrize("second", [False, True])
def test_int8(second: bool) -> None:
    from ktfx.triton_kernels.paired_values import int8_steps, pair_asm

    got = run(pair_asm(int8_steps(), second), WORDS)
    want = (WORDS >> (8 * second) & 255).to(torch.uint8).view(torch.int8)
    assert torch.equal(numbers(got, torch.bfloat16), want.bfloat16())


def test_doubled_e2m1() -> None:
    """Four values by look-up as bytes, times two and plus 12; what lies above the four nibbles does not matter."""
    from ktfx.triton_kernels.integer_rows import MINUS, PLUS, e2m1_look_up

    table = torch.tensor([*E2M1, *(-v for v in E2M1)])
    for above in (0, 0xABCD):
        got = run(e2m1_look_up(), WORDS | above << 16, PLUS.value, MINUS.value)
        for i in range(4):
            want = (2 * table[WORDS >> (4 * i) & 15] + 12).long()
            assert torch.equal(got >> (8 * i) & 255, want)

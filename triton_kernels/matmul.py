"""Products with a stored weight, the two shapes every matmul family builds on.

``multiply_rows`` is for one vector: weight rows times x on the ordinary units, in float32 or, for formats of 4 and 8
bits, in integers (``integer_products``), which is all that reading at full bandwidth needs. ``multiply_tile`` is for
many: tensor cores, with the weight as the left operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.dependent_launch import wait_for_previous
from ktfx.triton_kernels.dequant import (
    e2m1,
    e4m3,
    group_offset,
    load_group_scale,
    narrow,
    nibbles,
    product,
    settled,
)
from ktfx.triton_kernels.input_halves import EIGHT_BITS
from ktfx.triton_kernels.integer_products import FLOATS, MADE, READY, multiply_integers
from ktfx.triton_kernels.integer_rows import integer_inputs
from ktfx.triton_kernels.launch import bytes_view, cdiv, native_fp8, pow2, shared_memory, takes_descriptors
from ktfx.triton_kernels.paired_values import int8_byte, paired_nibbles

from ktfx.formats import FP8_BLOCK, parse_format


@triton.jit
def scale_row(e, n, N, FMT: tl.constexpr):
    """Which row of the scales belongs to row n of expert e."""
    if FMT == "fp8":
        return e * ((N + 127) // 128) + n // 128
    return e * N + n


@triton.jit
def multiply_rows(
    acc, w_ptr, s_ptr, z_ptr, row, srow, ok, x_ptr, xs_ptr, xrow, ldx, k0, K, ldw, lds,
    FMT: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, NATIVE: tl.constexpr, X: tl.constexpr = FLOATS,
    WAIT: tl.constexpr = False,
):  # fmt: skip
    """acc += w[row, k0:k0+BK] · x[xrow, k0:k0+BK], still unsummed along k (model, int8) or along groups.

    row, srow, ok: (L or 1, R), weight rows, scale rows and which exist; xrow: (L or 1,) rows of x, times ``ldx`` here.
    acc: what ``accumulator`` gives. X: ``FLOATS``, or in integers ``MADE``, or ``READY``, where x_ptr and xs_ptr hold
    ``IntegerInputs`` and ldx is their blocks in a row.
    WAIT: the kernel's wait for the kernels before it (``dependent_launch``) stands here, when the weights are on their
    way and before x is read.
    """
    xrow = xrow * ldx
    if X != FLOATS:
        acc = multiply_integers(
            acc, w_ptr, s_ptr, z_ptr, row, srow, ok, x_ptr, xs_ptr, xrow, k0, K, ldx, ldw, lds, FMT, G, BK, X, WAIT
        )
    elif FMT == "model" or FMT == "int8":
        k = k0 + tl.arange(0, BK)
        w = tl.load(
            w_ptr + row[:, :, None] * ldw + k[None, None, :], mask=ok[:, :, None] & (k < K)[None, None, :], other=0
        )
        wait_for_previous(WAIT)
        x = tl.load(x_ptr + xrow[:, None] + k[None, :], mask=(k < K)[None, :], other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * x[:, None, :]
    else:
        NG: tl.constexpr = BK // G
        g = k0 // G + tl.arange(0, NG)
        at, there = srow[:, :, None] * lds + g[None, None, :], ok[:, :, None] & (g * G < K)[None, None, :]
        scale = load_group_scale(s_ptr, at, there, FMT)
        if FMT == "fp8":
            k = g[:, None] * G + tl.arange(0, G)[None, :]
            w = tl.load(
                w_ptr + row[:, :, None, None] * ldw + k[None, None, :, :],
                mask=ok[:, :, None, None] & (k < K)[None, None, :, :], other=0,
            )  # fmt: skip
            wait_for_previous(WAIT)
            x = tl.load(x_ptr + xrow[:, None, None] + k[None, :, :], mask=(k < K)[None, :, :], other=0.0)
            acc += tl.sum(e4m3(w, NATIVE) * x.to(tl.float32)[:, None, :, :], 3) * scale
        else:
            c = tl.arange(0, G // 2)
            col = g[:, None] * (G // 2) + c[None, :]
            data = tl.load(
                w_ptr + row[:, :, None, None] * ldw + col[None, None, :, :], mask=there[:, :, :, None], other=0
            )
            if FMT == "mxfp4":
                low, high = e2m1(data)
            else:
                low, high = nibbles(data, group_offset(z_ptr, at, there, FMT)[:, :, :, None])
            wait_for_previous(WAIT)
            k = g[:, None] * G + (c // 16 * 32 + c % 16)[None, :]
            x_low = tl.load(x_ptr + xrow[:, None, None] + k[None, :, :], mask=(k < K)[None, :, :], other=0.0)
            k += 16
            x_high = tl.load(x_ptr + xrow[:, None, None] + k[None, :, :], mask=(k < K)[None, :, :], other=0.0)
            part = low * x_low.to(tl.float32)[:, None, :, :] + high * x_high.to(tl.float32)[:, None, :, :]
            acc += tl.sum(part, 3) * scale
    return acc


@triton.jit
def accumulator(
    L: tl.constexpr, R: tl.constexpr, FMT: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, X: tl.constexpr
):
    """Zeros for ``multiply_rows``."""
    RUNS: tl.constexpr = BK // 16 if FMT == "int8" else BK // 32
    SUMS: tl.constexpr = BK if FMT == "model" or FMT == "int8" else BK // G
    PARTS: tl.constexpr = SUMS if X == FLOATS else RUNS
    return tl.zeros((L, R, PARTS), tl.float32)


@triton.jit
def load_inputs(x_ptr, xrow, there, k0, K, BK: tl.constexpr):
    """x[xrow, k0:k0+BK] transposed, (BK, BM)."""
    k = k0 + tl.arange(0, BK)
    return tl.load(x_ptr + xrow[None, :] + k[:, None], mask=there[None, :] & (k < K)[:, None], other=0.0)


@triton.jit
def widened_nibbles(
    w_ptr, s_ptr, z_ptr, row, srow, ok, k0, K, ldw, lds,
    FMT: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """What ``paired_nibbles`` gives, for any DT, through float32."""
    BN: tl.constexpr = row.shape[0]
    NG: tl.constexpr = BK // G if BK > G else 1
    g, run, c = k0 // G + tl.arange(0, NG), k0 // 32 + tl.arange(0, BK // 32), tl.arange(0, 16)
    there, at = ok[:, None] & (g * G < K)[None, :], srow[:, None] * lds + g[None, :]
    data = tl.load(
        w_ptr + row[:, None, None] * ldw + run[None, :, None] * 16 + c[None, None, :],
        mask=ok[:, None, None] & (run * 32 < K)[None, :, None], other=0,
    ).reshape(BN, NG, BK // NG // 32, 16)  # fmt: skip
    scale = load_group_scale(s_ptr, at, there, FMT)[:, :, None, None]
    if FMT == "mxfp4":
        low, high = e2m1(data)
    else:
        low, high = nibbles(data, group_offset(z_ptr, at, there, FMT)[:, :, None, None])
    return narrow(low * scale, DT).reshape(BN, BK // 32, 16), narrow(high * scale, DT).reshape(BN, BK // 32, 16)


@triton.jit
def stored_tile(
    w_ptr, s_ptr, z_ptr, row, srow, ok, k0, K, ldw, lds,
    FMT: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, NATIVE: tl.constexpr, PAIRED: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """w[row, k0:k0+BK] as DT, (BN, BK), scales and all (int8's scale is the caller's).

    PAIRED: two stored bytes at a time become 16 bits of DT without a way through float32 (``StoredWeight.paired``).
    """
    if FMT == "int4" or FMT == "int4zp" or FMT == "mxfp4":
        if PAIRED:
            low, high = paired_nibbles(w_ptr, s_ptr, z_ptr, row, srow, ok, k0, K, ldw, lds, FMT, G, BK, DT)
        else:
            low, high = widened_nibbles(w_ptr, s_ptr, z_ptr, row, srow, ok, k0, K, ldw, lds, FMT, G, BK, DT)
        # 16 bytes hold 32 neighbours, the first 16 in their low halves: joined so, the order is x's own, and with one
        # product an accumulator it runs beside the next step's unpacking.
        w = tl.join(low, high).permute(0, 1, 3, 2).reshape(row.shape[0], BK)
    elif FMT == "int8" and PAIRED:
        k = k0 // 2 + tl.arange(0, BK // 2)
        words = w_ptr.to(tl.pointer_type(tl.uint16)) + row[:, None] * (ldw // 2)
        data = tl.load(words + k[None, :], mask=ok[:, None] & (k < K // 2)[None, :], other=0).to(tl.int32)
        w = tl.join(int8_byte(data, False), int8_byte(data, True)).reshape(row.shape[0], BK)
    else:
        k = k0 + tl.arange(0, BK)
        w = tl.load(w_ptr + row[:, None] * ldw + k[None, :], mask=ok[:, None] & (k < K)[None, :], other=0)
        if FMT == "fp8":
            w = e4m3(w, NATIVE) * load_group_scale(s_ptr, srow * lds + k0 // G, ok, FMT)[:, None]
        w = narrow(w, DT)
    return w


@triton.jit
def multiply_tile(
    acc, x, w_ptr, s_ptr, z_ptr, row, srow, ok, k0, K, ldw, lds,
    FMT: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, NATIVE: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """acc (BN, BM) += w[row, k0:k0+BK] · x, by ``stored_tile``."""
    w = stored_tile(w_ptr, s_ptr, z_ptr, row, srow, ok, k0, K, ldw, lds, FMT, G, BK, NATIVE, PAIRED, x.dtype)
    acc = product(w, x, acc)
    return acc if FMT == "model" else settled(acc)


@triton.jit
def multiply_both(
    acc, more, x, x_more, w_ptr, s_ptr, z_ptr, row, srow, ok, k0, K, ldw, lds,
    FMT: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, NATIVE: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """``multiply_tile`` for a second tile of inputs too, with what was unpacked of the weights once."""
    w = stored_tile(w_ptr, s_ptr, z_ptr, row, srow, ok, k0, K, ldw, lds, FMT, G, BK, NATIVE, PAIRED, x.dtype)
    acc, more = product(w, x, acc), product(w, x_more, more)
    if FMT != "model":
        acc, more = settled(acc), settled(more)
    return acc, more


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
    def small_integers(self) -> bool:
        """Whether values are integers of 4 or 8 bits, or halves of integers (mxfp4)."""
        return self.nibbles or self.fmt == "int8"

    @property
    def lines(self) -> int:
        """Lines of 128 bytes that hold a row, as a power of two; 0 for rows too long to be worth asking for ahead."""
        lines = pow2(cdiv(self.ldw * self.data.element_size(), 128))
        return lines if lines <= 256 else 0

    @property
    def row_bytes(self) -> int:
        return self.ldw * self.data.element_size()

    @property
    def scale_row_bytes(self) -> int:
        return self.lds * self.scales.element_size()

    def integers(self, x: torch.Tensor) -> bool:
        """Whether ``multiply_integers`` serves: a format of 4 or 8 bits in whole 16-byte runs, inputs of 16 bits."""
        whole_runs = self.ldw % 16 == 0 and self.data.data_ptr() % 4 == 0
        return self.small_integers and whole_runs and x.element_size() == 2

    def takes_tma(self, dtype: torch.dtype) -> bool:
        """Whether ``plain_experts`` serves: rows of 16-bit values as x has them, whole steps of 64, aligned alike."""
        plain = self.fmt == "model" and dtype.itemsize == 2 and self.data.dtype == dtype
        whole = self.ldw % 64 == 0 and self.data.data_ptr() % 16 == 0 and self.data.is_contiguous()
        return plain and whole and takes_descriptors(self.data.device)

    def takes_halves(self, dtype: torch.dtype) -> bool:
        """Whether ``halved_experts`` and ``halved_linear`` serve: eight bits, and inputs that two such halves hold.

        A bfloat16 is two e4m3 exactly and int16 to 2⁻¹⁶ of its row; a float16 is int16 as well, and no two e4m3. Rows
        are aligned for descriptors, and the GPU has the shared memory of Hopper.
        """
        held = dtype == torch.bfloat16 or (dtype == torch.float16 and self.fmt == "int8")
        aligned = self.ldw % 16 == 0 and self.data.data_ptr() % 16 == 0 and self.data.is_contiguous()
        device = self.data.device
        able = takes_descriptors(device) and shared_memory(device) >= 225_000
        return held and self.fmt in EIGHT_BITS and aligned and able

    def whole_groups(self, step: int) -> bool:
        """Whether steps of a tile's loop are parts of a group, or whole groups (of nibbles alone)."""
        return not self.grouped or self.group % step == 0 or (self.nibbles and step % self.group == 0)

    def paired(self, dtype: torch.dtype, step: int) -> bool:
        """Whether ``multiply_tile`` unpacks two bytes at a time for inputs of a dtype.

        The dtype holds codes and scales exactly, one word holds a step's scales of a row, and words lie at whole words.
        """
        if self.data.data_ptr() % 2 or (self.nibbles and (self.scales.data_ptr() | self.zeros.data_ptr()) % 4):
            return False
        if self.fmt == "int8":
            return dtype == torch.bfloat16 and self.ldw % 2 == 0
        groups = max(step // max(self.group, 1), 1)
        one_word = self.lds % groups == 0 and groups * self.scales.element_size() <= 4
        exact = torch.bfloat16 if self.fmt == "mxfp4" else self.scales.dtype
        return self.nibbles and one_word and dtype.itemsize == 2 and dtype == exact

    def tile_constants(self, x: torch.Tensor, step: int) -> dict[str, object]:
        """The launch arguments of a kernel that calls ``multiply_tile``."""
        return {"BK": step, "PAIRED": self.paired(x.dtype, step), **self.constants()}

    def constants(self) -> dict[str, object]:
        """The launch arguments that name the format."""
        native = self.fmt == "fp8" and native_fp8(self.data.device)
        return {"FMT": self.fmt, "G": max(self.group, 1), "NATIVE": native}


@dataclass(frozen=True)
class RowInputs:
    """x (T, K) as ``multiply_rows`` takes it: x itself and its stride, or its integers and their blocks in a row."""

    data: torch.Tensor
    scales: torch.Tensor
    ldx: int
    kind: int


def row_inputs(x: torch.Tensor, weight: StoredWeight, made: bool, early: bool = False) -> RowInputs:
    """made: the kernel makes integers of x itself, where rows are whole runs. early: as in ``integer_inputs``."""
    if not weight.integers(x):
        return RowInputs(x, x, x.stride(0), FLOATS.value)
    if made and (x.shape[1] | x.stride(0)) % 8 == 0 and x.data_ptr() % 4 == 0:
        return RowInputs(x, x, x.stride(0), MADE.value)
    integers = integer_inputs(x, weight.fmt, early)
    return RowInputs(integers.planes, integers.scales, integers.blocks, READY.value)


def step_of(K: int, steps: Sequence[int]) -> int:
    """The first (largest) step of which whole ones cover K with at most a tenth to spare; else the last."""
    return next((s for s in steps if cdiv(K, s) * s <= 1.1 * K), steps[-1])


@dataclass(frozen=True)
class TileShape:
    """BN rows of a weight a tile, BK values of k a step of its loop, and how it runs."""

    BN: int
    BK: int
    num_warps: int
    num_stages: int


def tile_shape(weight: StoredWeight, dtype: torch.dtype, BM: int, parts: int = 1) -> TileShape:
    """For tiles of BM inputs; ``parts`` is 2 where a tile has BN rows of gate and BN of up.

    By sweeps on one H100 over the shapes of Qwen3-30B-A3B, gpt-oss-20b, DeepSeek-V2-Lite and DeepSeek-V3. Weights that
    are unpacked for tensor cores wait for their products once a step: programs of four warps, two to four a
    multiprocessor, fill the gap. Few inputs leave the time to memory, which longer steps keep busier. float32 goes
    without tensor cores, by small products of many warps.
    """
    few, plain, half = BM <= 32, weight.fmt == "model", dtype.itemsize == 2
    BK = (64 if half else 32) if plain else tile_step(weight, dtype, few)
    if few:
        BN, warps, stages = 64, 4, 3 if BK == 128 else 4
    elif plain or not half:
        BN, warps, stages = 128, 8, 4 if half and parts == 2 and BM == 128 else 3
    else:
        BN, warps, stages = 64 if parts == 2 else 128, 4, 3
    value = dtype.itemsize if plain else 0.5 if weight.nibbles else 1
    room = shared_memory(weight.data.device) / (BK * (BM * dtype.itemsize + parts * BN * value))
    return TileShape(BN, BK, warps, max(1, min(stages, int(room))))


def tile_step(weight: StoredWeight, dtype: torch.dtype, long: bool = False) -> int:
    """Values of k a step of a tile's loop that unpacks its weight, by preference 64 or, ``long``, 128."""
    sizes = [64, 32] if dtype.itemsize == 2 else [32]
    if long and dtype.itemsize == 2:
        sizes.insert(0, 128)
    sizes = [size for size in sizes if weight.whole_groups(size)]
    plain = next(size for size in sizes if size < 128 or weight.fmt == "fp8")
    return next((size for size in sizes if weight.paired(dtype, size)), plain)


def integer_run(weight: StoredWeight) -> int:
    """Values of k that one warp takes a step of a product in integers: 32 runs of 16 bytes of a row."""
    return 32 * (32 if weight.nibbles else 16)


def stored_weight(name: str, tensors: Sequence[torch.Tensor]) -> StoredWeight:
    """``QuantizedWeight.tensors()``, contiguous, for a launch."""
    form, group = parse_format(name)
    data = bytes_view(tensors[0])
    scales = tensors[1] if len(tensors) > 1 else data
    zeros = tensors[2] if len(tensors) > 2 else data
    lds = scales.shape[-1] if form.name not in ("model", "int8") else 1
    return StoredWeight(data, scales, zeros, form.name, group if form.name != "fp8" else FP8_BLOCK, data.shape[-1], lds)

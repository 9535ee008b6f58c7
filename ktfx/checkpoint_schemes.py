"""How a checkpoint keeps quantised weights, by the ``quantization_config`` of its config.json.

A *base* is a weight's name without its last part: ``model.layers.0.self_attn.q_proj``. What no scheme here reads is a
WeightError that says what was found and what could be read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ktfx.errors import WeightError
from ktfx.formats import FP8_BLOCK, QuantizedWeight, from_fp8_blocks, from_mxfp4_blocks
from ktfx.quantised_checkpoints import GROUPS, ImportedWeight, import_awq, import_compressed_tensors, import_gptq

Read = Callable[[str], torch.Tensor | None]


@dataclass(frozen=True)
class Scheme(ABC):
    """leaves: what stands behind a base and ``separator``, the ``needed`` first ones always.

    The first is there for every stored weight and for no other.
    """

    leaves: ClassVar[tuple[str, ...]]
    needed: ClassVar[int] = 2
    separator: ClassVar[str] = "."

    @abstractmethod
    def read(self, get: Read) -> ImportedWeight:
        """The weight of which ``get(leaf)`` gives the tensors (None for one that is not there), bit for bit."""

    @property
    @abstractmethod
    def format(self) -> str:
        """The format that its weights will most likely have; which one it is, the numbers decide."""


@dataclass(frozen=True)
class Gptq(Scheme):
    """zero_offset: 1 where zero points are stored less one (``gptq``), 0 in ``gptq_v2``."""

    group: int
    symmetric: bool
    zero_offset: int
    leaves: ClassVar[tuple[str, ...]] = ("qweight", "scales", "qzeros", "g_idx")
    needed: ClassVar[int] = 3

    def read(self, get: Read) -> ImportedWeight:
        qweight, scales, qzeros, g_idx = map(get, self.leaves)
        assert qweight is not None and scales is not None and qzeros is not None
        return import_gptq(qweight, qzeros, scales, g_idx, zero_offset=self.zero_offset)

    @property
    def format(self) -> str:
        return _int4(self.group, self.symmetric)


@dataclass(frozen=True)
class Awq(Scheme):
    group: int
    leaves: ClassVar[tuple[str, ...]] = ("qweight", "scales", "qzeros")
    needed: ClassVar[int] = 3

    def read(self, get: Read) -> ImportedWeight:
        qweight, scales, qzeros = map(get, self.leaves)
        assert qweight is not None and scales is not None and qzeros is not None
        return import_awq(qweight, qzeros, scales)

    @property
    def format(self) -> str:
        return _int4(self.group, False)


@dataclass(frozen=True)
class CompressedTensors(Scheme):
    group: int
    symmetric: bool
    leaves: ClassVar[tuple[str, ...]] = (
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
    )

    def read(self, get: Read) -> ImportedWeight:
        packed, scale, zeros, shape, g_idx = map(get, self.leaves)
        assert packed is not None and scale is not None
        return import_compressed_tensors(packed, scale, zeros, shape, g_idx)

    @property
    def format(self) -> str:
        return _int4(self.group, self.symmetric)


@dataclass(frozen=True)
class Fp8Blocks(Scheme):
    """block: (rows, columns) that share a scale; empty for one scale a weight."""

    block: tuple[int, ...]
    leaves: ClassVar[tuple[str, ...]] = ("weight_scale_inv", "weight")

    def read(self, get: Read) -> ImportedWeight:
        scales, weight = map(get, self.leaves)
        assert weight is not None and scales is not None
        if weight.dtype != torch.float8_e4m3fn or weight.dim() != 2 or not scales.dtype.is_floating_point:
            raise WeightError(
                f"an fp8 weight is {weight.dtype} {tuple(weight.shape)} with scales {scales.dtype}",
                expected="a float8_e4m3fn matrix and float scales",
                mend="only fp8 is read under this quant_method; dequantise other checkpoints",
            )
        if self.block == (FP8_BLOCK, FP8_BLOCK):
            return ImportedWeight(from_fp8_blocks(weight, scales))
        N, K = weight.shape
        rows, columns = self.block or (N, K)
        shape = (-(-N // rows), -(-K // columns))
        if scales.numel() != shape[0] * shape[1]:
            raise WeightError(
                f"an fp8 weight {(N, K)} has scales {tuple(scales.shape)}",
                expected=f"{shape}, one for each {rows} × {columns}",
                mend="check weight_block_size in config.json",
            )
        return ImportedWeight(QuantizedWeight("fp8", (N, K), weight, scales.reshape(shape).float(), None, FP8_BLOCK))

    @property
    def format(self) -> str:
        return "fp8"


@dataclass(frozen=True)
class Mxfp4(Scheme):
    """gpt-oss: the experts of a layer stacked, gate and up rows alternating. A base ends in ``…_proj``."""

    leaves: ClassVar[tuple[str, ...]] = ("blocks", "scales")
    separator: ClassVar[str] = "_"

    def read(self, get: Read) -> ImportedWeight:
        blocks, scales = map(get, self.leaves)
        assert blocks is not None and scales is not None
        return ImportedWeight(from_mxfp4_blocks(blocks, scales))

    @property
    def format(self) -> str:
        return "mxfp4"


def _int4(group: int, symmetric: bool) -> str:
    size = next((g for g in GROUPS if group > 0 and group % g == 0), GROUPS[0])
    name = "int4" if symmetric else "int4zp"
    return name if size == 64 else f"{name}-g{size}"


def scheme_of(config: Mapping[str, Any], file: Path) -> Scheme:
    """The scheme of a ``quantization_config``. WeightError for a method, bits or packing that is not read."""
    method = config.get("quant_method")
    make = _SCHEMES.get(str(method))
    if make is None:
        raise _unread(file, f"its quant_method is {method!r}", "one of " + ", ".join(_SCHEMES))
    return make(config, file)


def _gptq(config: Mapping[str, Any], file: Path) -> Scheme:
    _expect_four_bits(config.get("bits"), file)
    packing = config.get("checkpoint_format") or "gptq"
    if packing not in ("gptq", "gptq_v2"):
        raise _unread(file, f"its checkpoint_format is {packing!r}", "gptq or gptq_v2")
    offset = 1 if packing == "gptq" else 0
    return Gptq(int(config.get("group_size", -1)), bool(config.get("sym", True)), offset)


def _awq(config: Mapping[str, Any], file: Path) -> Scheme:
    _expect_four_bits(config.get("bits", config.get("w_bit")), file)
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise _unread(file, f"its version is {version!r}", "the layout `gemm`")
    return Awq(int(config.get("group_size", config.get("q_group_size", -1))))


def _compressed_tensors(config: Mapping[str, Any], file: Path) -> Scheme:
    groups: dict[str, Any] = config.get("config_groups") or {}
    schemes = []
    for name, group in groups.items():
        weights = group.get("weights") or {}
        packing = group.get("format") or config.get("format")
        if packing != "pack-quantized":
            raise _unread(file, f"the format of its {name} is {packing!r}", "pack-quantized")
        _expect_four_bits(weights.get("num_bits"), file)
        if weights.get("type", "int") != "int":
            raise _unread(file, f"the weights of its {name} are of type {weights.get('type')!r}", "int")
        schemes.append(CompressedTensors(int(weights.get("group_size") or -1), bool(weights.get("symmetric", True))))
    if not schemes:
        raise _unread(file, "it has no config_groups", "groups of layers with 4-bit weights")
    return schemes[0]


def _fp8(config: Mapping[str, Any], file: Path) -> Scheme:
    block = config.get("weight_block_size")
    whole = isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block)
    if block is not None and not whole:
        raise _unread(file, f"its weight_block_size is {block!r}", "two sizes, such as [128, 128], or none")
    return Fp8Blocks(tuple(block) if block is not None else ())


_SCHEMES: dict[str, Callable[[Mapping[str, Any], Path], Scheme]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "mxfp4": lambda config, file: Mxfp4(),
}


def _expect_four_bits(bits: object, file: Path) -> None:
    if bits != 4:
        raise _unread(file, f"its weights have {bits} bits", "4 bits")


def _unread(file: Path, found: str, expected: str) -> WeightError:
    return WeightError(
        f"{file}: ktfx does not read this quantised checkpoint: {found}",
        expected=expected,
        mend="dequantise it with the package that made it, save that, and let a rule quantise it (weights: int4)",
    )

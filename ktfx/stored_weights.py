"""Weights as a module stores them quantised: which format of ``ktfx.formats`` a few tensors are, and their numbers.

A module keeps values, scales and zero points as parameters of its own; what they are is read off dtypes and shapes
alone, so that the meta device and a graph's fakes tell as much as the weights themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ktfx.errors import WeightError
from ktfx.formats import FORMATS, QuantizedWeight, dequantize, format_name, from_tensors, parse_format, storage

# Parts of a stored weight beside its values, in the order of ``QuantizedWeight.tensors``.
SCALES, ZEROS = "scales", "zeros"


def stored_format_of(
    shape: Sequence[int], data: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None
) -> str | None:
    """The format of a weight (…, N, K) kept as these tensors, ``int4-g128`` for one; None if kernels have no such one.

    Scales of fp8 may have any float dtype (``float8_e8m0fnu`` too): their numbers are exact in float32.
    """
    for name in _candidates(data, scales, zeros):
        metas = storage(name, tuple(shape), scales.dtype)
        found = [data, scales, *([] if zeros is None else [zeros])]
        if [tuple(t.shape) for t in found] == [shape for shape, _ in metas]:
            return name
    return None


def _candidates(data: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> list[str]:
    if data.dtype == torch.float8_e4m3fn and zeros is None and scales.dtype.is_floating_point:
        return ["fp8"]
    if data.dtype != torch.uint8:
        return []
    if scales.dtype == torch.uint8:
        return ["mxfp4"] if zeros is None else []
    base = "int4" if zeros is None else "int4zp"
    return [f"{base}-g{group}" if group != 64 else base for group in (32, 64, 128)]


def stored_weight(format: str, shape: Sequence[int], tensors: Sequence[torch.Tensor]) -> QuantizedWeight:
    """The weight that these tensors are, bit for bit; fp8's scales in float32."""
    if parse_format(format)[0].name == "fp8":
        tensors = [tensors[0], tensors[1].float()]
    return from_tensors(format, tuple(shape), list(tensors))


def dequantize_each(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """A weight (E, N, K) in ``dtype``, one matrix after another: only one is ever held in float32."""
    name = format_name(FORMATS[weight.format], weight.group)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.data.device)
    for e, matrix in enumerate(out):
        matrix.copy_(dequantize(from_tensors(name, weight.shape[1:], [t[e] for t in weight.tensors()])))
    return out


def kept_format(stored: str, asked: str) -> str:
    """The format to keep a stored weight in, where a rule asks for one: its own bits wherever the rule allows them.

    ``model`` is the stored format. ``int4`` or ``int4zp`` without a group is whatever 4-bit integers are stored, of any
    group, with or without zero points: rounding them anew would only lose.
    """
    integers = ("int4", "int4zp")
    same = asked in integers and stored.partition("-")[0] in integers
    return stored if asked == "model" or same else asked


def scales_dtype(format: str, scales: torch.Tensor, otherwise: torch.dtype = torch.bfloat16) -> torch.dtype:
    """The dtype that a kernel takes for the model's: int4's scales have it, other formats do not tell."""
    return scales.dtype if parse_format(format)[0].name in ("int4", "int4zp") else otherwise


def dequantize_blocks(
    weight: torch.Tensor, scales: torch.Tensor, block: Sequence[int], dtype: torch.dtype, halves: bool = False
) -> torch.Tensor:
    """An fp8 matrix (N, K) with scales per block of any size: (⌈N/b⌉, ⌈K/c⌉) for ``block`` (b, c), in ``dtype``.

    block: empty for one scale a matrix. halves: two matrices lie one above the other (a gate and an up projection),
    each with rows of scales of its own; where there are too few for that, blocks run through both. Raises WeightError
    for scales that do not fit.
    """
    N, K = weight.shape
    scales = scales.float()
    if scales.dim() == 0:
        return (weight.float() * scales).to(dtype)
    for parts in (2, 1) if halves else (1,):
        size = N // parts
        rows, columns = block if block else (size, K)
        if N % parts or tuple(scales.shape) != (parts * -(-size // rows), -(-K // columns)):
            continue
        wide = scales.repeat_interleave(columns, 1)[:, :K].unflatten(0, (parts, -1))
        return (weight.float() * wide.repeat_interleave(rows, 1)[:, :size].flatten(0, 1)).to(dtype)
    raise WeightError(
        f"an fp8 weight {(N, K)} has scales {tuple(scales.shape)}",
        expected=f"one for each {' × '.join(map(str, block)) or 'matrix'}",
        mend="check weight_block_size in the checkpoint's config.json",
    )

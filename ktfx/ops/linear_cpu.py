"""``linear.cpu``: a linear layer on the host, by the native kernel where it is built, else by ATen.

The ATen path keeps the weight as ``ktfx/formats.py`` stores it and dequantises it at every call.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

import torch

from ktfx.cpu_kernels import library
from ktfx.errors import KtfxWarning, WeightError
from ktfx.formats import parse_format
from ktfx.ops import linear_native
from ktfx.ops.experts import TensorMeta
from ktfx.ops.linear import FLOATS, LinearKernel, LinearSpec, Weight, linear_kernel, register_linear_kernel


def _unsupported(spec: LinearSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it runs on the host, not on {device}"
    if dtype not in FLOATS:
        return f"it takes float32, bfloat16 or float16 weights, not {dtype}"
    if spec.activations not in ("model", "int8"):
        return f"it leaves activations as they are or rounds them to int8, not {spec.activations}"
    try:
        parse_format(spec.weights)
    except WeightError as error:
        return error.what
    return None


@cache
def _warn_once() -> None:
    reason = library.load().reason if library.load().library is None else "the library was built before it had one"
    warnings.warn(f"linear.cpu runs on ATen, not on its own kernel: {reason}", KtfxWarning, stacklevel=2)


def _meta(spec: LinearSpec, dtype: torch.dtype) -> list[TensorMeta]:
    if linear_native.available():
        return linear_native.packed_meta(spec, dtype)
    return linear_kernel("reference").packed_meta(spec, dtype)


def _pack(spec: LinearSpec, weight: Weight, device: torch.device) -> list[torch.Tensor]:
    if not linear_native.available():
        _warn_once()
        return linear_kernel("reference").pack(spec, weight, torch.device("cpu"))
    if isinstance(weight, torch.Tensor):
        return linear_native.pack(spec, weight, weight.dtype)
    scales = weight.scales
    keeps = weight.format in ("int4", "int4zp") and scales is not None and scales.dtype in FLOATS
    return linear_native.pack(spec, weight, scales.dtype if keeps and scales is not None else torch.bfloat16)


def _forward(
    spec: LinearSpec, x: torch.Tensor, packed: Sequence[torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    if linear_native.available():
        return linear_native.forward(spec, x, packed, bias)
    return linear_kernel("reference").forward(spec, x, packed, bias)


def _dequantised(spec: LinearSpec, packed: Sequence[torch.Tensor]) -> torch.Tensor:
    if linear_native.available():
        return linear_native.dequantised(spec, packed)
    return linear_kernel("reference").dequantised(spec, packed)


LINEAR_CPU = register_linear_kernel(LinearKernel("cpu", _unsupported, _meta, _pack, _forward, _dequantised))

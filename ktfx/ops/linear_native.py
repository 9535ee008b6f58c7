"""The native CPU kernel behind ``linear.cpu``: packing and calls of ``ktfx_linear.h``.

Packed tensors of a layer: the tiles, uint8 (bytes,), and an empty tensor of the model's dtype.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_char, c_int32, c_int64, c_void_p
from functools import lru_cache

import torch

from ktfx.cpu_kernels import library as native
from ktfx.errors import HostCallError, WeightError
from ktfx.formats import parse_format, quantize
from ktfx.ops.experts import TensorMeta
from ktfx.ops.experts_native import ALIGNMENT, DTYPES, aligned_empty, lib
from ktfx.ops.linear import LinearSpec, Weight, check_weight

_FORMATS = {"fp8": 3, "int8": 4, "int4": 5, "int4zp": 6, "mxfp4": 7}  # enum ktfx_format


class LinearCall(ctypes.Structure):
    """``ktfx_linear_call``: one call of a layer, and its outcome."""

    _fields_ = [
        ("matrix", native.Matrix),
        *((name, c_void_p) for name in ("weights", "bias", "x", "out")),
        ("rows", c_int64),
        *((name, c_int32) for name in ("x_dtype", "int8_activations", "status")),
        ("message", c_char * native.MESSAGE_BYTES),
    ]


def available() -> bool:
    """Whether the library is loaded and has the linear kernel."""
    library = native.load().library
    return library is not None and hasattr(library, "ktfx_linear")


@lru_cache(maxsize=1024)
def _layout(spec: LinearSpec, dtype: torch.dtype) -> native.Matrix:
    form, group = parse_format(spec.weights)
    code = DTYPES[dtype] if form.name == "model" else _FORMATS[form.name]
    matrix = native.Matrix()
    N, K = spec.out_features, spec.in_features
    if lib().ktfx_matrix_layout(ctypes.byref(matrix), code, group, DTYPES[dtype], N, K, 0):
        raise WeightError(f"the CPU kernels cannot lay out a {N} x {K} matrix as {spec.weights}")
    return matrix


def packed_meta(spec: LinearSpec, dtype: torch.dtype) -> list[TensorMeta]:
    matrix = _layout(spec, dtype)
    # int4's scales are in the model's dtype, so the packed bytes alone do not say how to read them.
    return [TensorMeta((matrix.tiles * matrix.tile_bytes,), torch.uint8), TensorMeta((0,), dtype)]


def pack(spec: LinearSpec, weight: Weight, dtype: torch.dtype) -> list[torch.Tensor]:
    """The weight (N, K), or one that is quantised already, to tiles. dtype: that of the model."""
    check_weight(spec, weight)
    matrix = _layout(spec, dtype)
    host = torch.device("cpu")
    if isinstance(weight, torch.Tensor) and spec.weights == "model":
        kept = weight.to(host).contiguous()
        source = native.Source(kept.data_ptr(), DTYPES[kept.dtype], kept.stride(0), 1, 0, 0, 0, 0)
        parts = [kept]
    else:
        # Rounded here, not by ktfx_pack, so that linear.cpu and linear.triton compute with the same numbers.
        if isinstance(weight, torch.Tensor):
            weight = quantize(weight, spec.weights, search=True, device=host)
        parts = [t.to(host).contiguous() for t in weight.tensors()]
        if parse_format(spec.weights)[0].name in ("int4", "int4zp"):
            parts[1] = parts[1].to(dtype)
        pointers = [t.data_ptr() for t in parts] + [0]
        source = native.Source(pointers[0], 0, 0, 1, 0, 1, pointers[1], pointers[2])
    packed = aligned_empty((matrix.tiles * matrix.tile_bytes,))
    lib().ktfx_place(packed.data_ptr(), ctypes.byref(matrix), 1, 1)
    message = ctypes.create_string_buffer(native.MESSAGE_BYTES)
    if lib().ktfx_pack(ctypes.byref(matrix), (native.Source * 1)(source), 1, packed.data_ptr(), message):
        raise WeightError(f"cannot pack the weight: {message.value.decode()}", mend="check the checkpoint")
    del parts  # the source points into them until here
    return [packed, torch.empty(0, dtype=dtype)]


def dequantised(spec: LinearSpec, packed: Sequence[torch.Tensor]) -> torch.Tensor:
    """What the kernel computes with: float32 (N, K)."""
    matrix = _layout(spec, packed[1].dtype)
    plain = torch.empty(spec.out_features, spec.in_features)
    lib().ktfx_unpack(ctypes.byref(matrix), packed[0].data_ptr(), plain.data_ptr())
    return plain


def forward(
    spec: LinearSpec, x: torch.Tensor, packed: Sequence[torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    """(…, K) to (…, N) in x's dtype; sums in float32."""
    tiles, like = packed
    matrix = _layout(spec, like.dtype)
    x_TK = x.reshape(-1, spec.in_features).contiguous()
    if x_TK.dtype not in DTYPES or x_TK.device.type != "cpu":
        raise HostCallError(
            f"linear.cpu got {x_TK.dtype} on {x_TK.device}", expected="float32, bfloat16 or float16 on the host"
        )
    if tiles.numel() != matrix.tiles * matrix.tile_bytes or tiles.dtype != torch.uint8:
        raise WeightError("the packed weight is not this spec's", mend="pack the layer again with this spec")
    if tiles.data_ptr() % ALIGNMENT:
        tiles = aligned_empty(tuple(tiles.shape)).copy_(tiles)
    own_bias = None if bias is None else bias.float().contiguous()
    out = torch.empty(*x.shape[:-1], spec.out_features, dtype=x.dtype)
    call = LinearCall(
        matrix,
        tiles.data_ptr(),
        None if own_bias is None else own_bias.data_ptr(),
        x_TK.data_ptr(),
        out.data_ptr(),
        x_TK.shape[0],
        DTYPES[x_TK.dtype],
        int(spec.activations == "int8"),
    )
    if lib().ktfx_linear(ctypes.byref(call)):
        raise HostCallError(
            call.message.decode() or "the linear kernel failed", mend="use shorter prefills, or linear.aten"
        )
    return out

"""The native library seen from Python: loading it, and the structures and functions of ``ktfx_cpu.h``."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char, c_char_p, c_double, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ABI = 3
MESSAGE_BYTES = 192
PROFILE_SUMS = 11
FILE_NAME = "libktfx_cpu.so"


class Matrix(ctypes.Structure):
    """``ktfx_matrix``: how one weight matrix of every expert lies."""

    _fields_ = [
        *((name, c_int32) for name in ("format", "group", "scale_dtype", "N", "K", "Kp", "tiles", "paired")),
        *((name, c_int64) for name in ("tile_bytes", "scale_offset", "zero_offset")),
    ]


class Layer(ctypes.Structure):
    """``ktfx_layer``: one layer's experts."""

    _fields_ = [
        *((name, c_int32) for name in ("num_experts", "hidden", "intermediate", "activation", "gate")),
        ("alpha", c_float),
        ("limit", c_float),
        ("int8_activations", c_int32),
        ("up", Matrix),
        ("down", Matrix),
        *((name, c_void_p) for name in ("up_weights", "down_weights", "up_bias", "down_bias")),
    ]


class Call(ctypes.Structure):
    """``ktfx_call``: one call of a layer, and its outcome."""

    _fields_ = [
        ("layer", POINTER(Layer)),
        *((name, c_void_p) for name in ("x", "ids", "weights", "out")),
        ("tokens", c_int64),
        *((name, c_int32) for name in ("chosen", "x_dtype", "id_dtype", "weight_dtype", "status")),
        ("message", c_char * MESSAGE_BYTES),
    ]


class Source(ctypes.Structure):
    """``ktfx_source``: one expert's weight to pack."""

    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int32),
        ("row_stride", c_int64),
        ("column_stride", c_int64),
        ("interleaved", c_int32),
        ("quantized", c_int32),
        ("scales", c_void_p),
        ("zeros", c_void_p),
    ]


_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "ktfx_abi": (c_int32, []),
    "ktfx_isa": (c_char_p, []),
    "ktfx_isas": (c_char_p, []),
    "ktfx_set_isa": (c_int32, [c_char_p]),
    "ktfx_amx_rows": (c_int32, []),
    "ktfx_set_amx_rows": (None, [c_int32]),
    "ktfx_ahead": (c_int32, []),
    "ktfx_set_ahead": (None, [c_int32]),
    "ktfx_threads": (c_int32, []),
    "ktfx_set_threads": (c_int32, [c_int32, c_int32]),
    "ktfx_shares": (c_int32, []),
    "ktfx_matrix_layout": (c_int32, [POINTER(Matrix), c_int32, c_int32, c_int32, c_int32, c_int32, c_int32]),
    "ktfx_pack": (c_int32, [POINTER(Matrix), POINTER(Source), c_int32, c_void_p, c_char_p]),
    "ktfx_restore": (c_int32, [POINTER(Matrix), c_void_p, POINTER(Source), c_int32, c_char_p]),
    "ktfx_hash": (c_int32, [c_void_p, c_int64, POINTER(c_uint64)]),
    "ktfx_unpack": (c_int32, [POINTER(Matrix), c_void_p, c_void_p]),
    "ktfx_place": (None, [c_void_p, POINTER(Matrix), c_int32, c_int32]),
    "ktfx_wake": (None, []),
    "ktfx_experts": (c_int32, [POINTER(Call)]),
    "ktfx_experts_now": (
        c_int32,
        [c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int32, c_int32],
    ),
    "ktfx_last_message": (c_char_p, []),
    "ktfx_submit": (c_int64, [POINTER(Call)]),
    "ktfx_wait": (c_int32, [c_int64, c_char_p]),
    "ktfx_host_call": (None, [c_void_p]),
    "ktfx_poller_create": (c_void_p, []),
    "ktfx_poller_add": (c_int32, [c_void_p, POINTER(Call), POINTER(c_uint32), POINTER(c_uint32)]),
    "ktfx_poller_arm": (None, [c_void_p, c_int32]),
    "ktfx_poller_destroy": (None, [c_void_p]),
    "ktfx_profile": (None, [c_int32, POINTER(c_double)]),
    "ktfx_measure_read": (c_double, [c_void_p, c_int64, c_int32]),
    "ktfx_measure_fma": (c_double, []),
}


@dataclass(frozen=True)
class Loaded:
    """The library, or why there is none."""

    library: ctypes.CDLL | None
    reason: str


@cache
def load() -> Loaded:
    """Load the library once; KTFX_CPU_LIBRARY names another file (sanitizer builds), empty for none (the ATen path)."""
    wanted = os.environ.get("KTFX_CPU_LIBRARY")
    if wanted == "":
        return Loaded(None, "KTFX_CPU_LIBRARY is empty, which asks for ATen")
    path = Path(wanted) if wanted else Path(__file__).parent / FILE_NAME
    if not path.exists():
        return Loaded(None, f"{path.name} was not built: reinstall ktfx with a C++17 compiler (GCC 11 or newer)")
    try:
        library = ctypes.CDLL(str(path))
        if library.ktfx_abi() != ABI:  # first: a library of another version may lack functions
            return Loaded(None, f"{path.name} is of another version of ktfx: reinstall ktfx")
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return Loaded(None, f"{path.name} cannot be loaded: {error}")
    isa = os.environ.get("KTFX_CPU_ISA", "")
    available = library.ktfx_isas().decode().split(",")
    if isa and isa not in available:
        return Loaded(None, f"KTFX_CPU_ISA={isa} is not what this machine runs: one of {', '.join(available)}")
    return Loaded(library, f"{library.ktfx_isa().decode()} of {', '.join(available)}")

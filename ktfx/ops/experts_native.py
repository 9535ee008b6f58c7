"""The native CPU kernels behind ``experts.cpu``: specs to C structures, packing, calls and tickets.

Packed tensors of a layer: the gate-up tiles and the down tiles, uint8 (E, bytes), then with biases both as float32.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from typing import Any

import torch

from ktfx.cpu_kernels import library as native
from ktfx.errors import HostCallError, KtfxError, WeightError
from ktfx.formats import QuantizedWeight, parse_format
from ktfx.ops.experts import ExpertsSpec, TensorMeta, Weight

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ID_DTYPES = {torch.int32: 3, torch.int64: 4}
# Dtypes of x, ids and weights to their codes, a byte each from the lowest.
_DTYPES_OF_CALL = {
    (x, i, w): DTYPES[x] | _ID_DTYPES[i] << 8 | DTYPES[w] << 16 for x in DTYPES for i in _ID_DTYPES for w in DTYPES
}
_FORMATS = {"fp8": 3, "int8": 4, "int4": 5, "int4zp": 6, "mxfp4": 7}
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "none": 5}
_GATES = {"mul": 0, "clamped": 1, "none": 2}
_OK, _NO_MEMORY = 0, 3
ALIGNMENT = 64


@cache
def lib() -> ctypes.CDLL:
    library = native.load().library
    if library is None:
        raise HostCallError("the native CPU kernels are not loaded", mend=native.load().reason)
    return library


@lru_cache(maxsize=1024)
def _layouts(spec: ExpertsSpec, dtype: torch.dtype) -> tuple[native.Matrix, native.Matrix]:
    form, group = parse_format(spec.weights)
    code = DTYPES[dtype] if form.name == "model" else _FORMATS[form.name]
    gated = spec.gate != "none"
    up, down = native.Matrix(), native.Matrix()
    for matrix, N, K, paired in ((up, spec.up_rows, spec.hidden, gated), (down, spec.hidden, spec.intermediate, False)):
        if lib().ktfx_matrix_layout(ctypes.byref(matrix), code, group, DTYPES[dtype], N, K, int(paired)):
            raise WeightError(f"the CPU kernels cannot lay out a {N} x {K} matrix as {spec.weights}")
    return up, down


def packed_meta(spec: ExpertsSpec, dtype: torch.dtype) -> list[TensorMeta]:
    up, down = _layouts(spec, dtype)
    E = spec.num_experts
    metas = [TensorMeta((E, m.tiles * m.tile_bytes), torch.uint8) for m in (up, down)]
    if spec.has_bias:
        metas += [TensorMeta((E, up.N), torch.float32), TensorMeta((E, spec.hidden), torch.float32)]
    # int4's scales are in the model's dtype, so the packed bytes alone do not say how to read them.
    return [*metas, TensorMeta((0,), dtype)]


def aligned_empty(shape: tuple[int, ...]) -> torch.Tensor:
    """uint8 memory that starts on a cache line, whatever the allocator."""
    size = int(torch.Size(shape).numel())
    block = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    skip = -block.data_ptr() % ALIGNMENT
    return block[skip : skip + size].view(shape)


def pack(spec: ExpertsSpec, tensors: Mapping[str, Weight], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """The model's tensors, or weights that are quantised already, to the kernels' layout.

    ``gate_up`` and ``down`` are float tensors in the spec's own layout (any strides, any device: experts that are not
    on the host come over one at a time), or QuantizedWeights of the spec's format (E, N, K), interleaved as the spec
    says but never transposed. dtype: that of the model, for quantised weights: if not given, of int4's
    scales, else of biases, else bfloat16.
    """
    gate_up, down = tensors["gate_up"], tensors["down"]
    if isinstance(gate_up, torch.Tensor):
        dtype = gate_up.dtype
    elif dtype is None:
        bias = tensors.get("gate_up_bias")
        dtype = bias.dtype if isinstance(bias, torch.Tensor) and bias.dtype in DTYPES else torch.bfloat16
        if gate_up.scales is not None and gate_up.format in ("int4", "int4zp"):
            dtype = gate_up.scales.dtype
    metas = packed_meta(spec, dtype)
    out: list[torch.Tensor] = []
    interleaved = spec.alternates
    for i, (weight, matrix) in enumerate(zip((gate_up, down), _layouts(spec, dtype), strict=True)):
        packed = aligned_empty(metas[i].shape)
        lib().ktfx_place(packed.data_ptr(), ctypes.byref(matrix), spec.num_experts, i)
        _pack_matrix(spec, matrix, weight, packed, interleaved and i == 0, ("gate_up", "down")[i])
        out.append(packed)
    if spec.has_bias:
        up_bias, down_bias = tensors["gate_up_bias"], tensors["down_bias"]
        assert isinstance(up_bias, torch.Tensor) and isinstance(down_bias, torch.Tensor)
        if interleaved:
            up_bias = torch.cat([up_bias[:, 0::2], up_bias[:, 1::2]], dim=1)
        out += [t.to("cpu", torch.float32, copy=True).contiguous() for t in (up_bias, down_bias)]
    return [*out, torch.empty(0, dtype=dtype)]


def _pack_matrix(
    spec: ExpertsSpec, matrix: native.Matrix, weight: Weight, packed: torch.Tensor, interleaved: bool, name: str
) -> None:
    E, N, K = spec.num_experts, matrix.N, matrix.K
    message = ctypes.create_string_buffer(native.MESSAGE_BYTES)

    def run(sources: list[native.Source], first: int) -> None:
        array = (native.Source * len(sources))(*sources)
        status = lib().ktfx_pack(ctypes.byref(matrix), array, len(sources), packed[first].data_ptr(), message)
        if status:
            raise WeightError(f"cannot pack {name}: {message.value.decode()}", mend="check the checkpoint")

    if isinstance(weight, QuantizedWeight):
        parts = [t.to("cpu").contiguous() for t in weight.tensors()]
        if weight.format != parse_format(spec.weights)[0].name or tuple(weight.shape) != (E, N, K):
            raise WeightError(
                f"{name} is {weight.format} {tuple(weight.shape)}", expected=f"{spec.weights} {(E, N, K)}"
            )
        pointers = [[p[e].data_ptr() for p in parts] + [0] for e in range(E)]
        run([native.Source(p[0], 0, 0, 1, int(interleaved), 1, p[1], p[2]) for p in pointers], 0)
        return
    if spec.transposed:
        weight = weight.transpose(1, 2)
    if tuple(weight.shape) != (E, N, K):
        raise WeightError(f"{name} has shape {tuple(weight.shape)} in the plain layout", expected=str((E, N, K)))
    dtype = DTYPES[weight.dtype]

    def source(expert: torch.Tensor) -> native.Source:
        return native.Source(expert.data_ptr(), dtype, expert.stride(0), expert.stride(1), int(interleaved), 0, 0, 0)

    if weight.device.type == "cpu":
        run([source(weight[e]) for e in range(E)], 0)
    else:
        for e in range(E):  # one expert at a time, so that no second copy of the layer ever lies on the host
            expert = weight[e].to("cpu")
            run([source(expert)], e)


def restored(spec: ExpertsSpec, packed: Sequence[torch.Tensor], part: str, experts: range) -> torch.Tensor:
    """A part of a layer packed as ``model``, bit for bit, in the model's layout and dtype, for a range of experts."""
    dtype = packed[-1].dtype
    interleaved = spec.alternates
    if part.endswith("_bias"):
        bias = packed[2 if part == "gate_up_bias" else 3][experts.start : experts.stop]
        if interleaved and part == "gate_up_bias":
            bias = torch.stack(bias.chunk(2, dim=1), dim=2).flatten(1)
        return bias.to(dtype, copy=True)  # packed as float32, which holds every bfloat16 and float16
    which = ("gate_up", "down").index(part)
    matrix, tiles = _layouts(spec, dtype)[which], packed[which]
    N, K = (matrix.K, matrix.N) if spec.transposed else (matrix.N, matrix.K)
    out = torch.empty(len(experts), N, K, dtype=dtype)
    plain = out.transpose(1, 2) if spec.transposed else out
    targets = [
        native.Source(t.data_ptr(), DTYPES[dtype], t.stride(0), t.stride(1), int(interleaved and not which), 0, 0, 0)
        for t in plain
    ]
    message = ctypes.create_string_buffer(native.MESSAGE_BYTES)
    array = (native.Source * len(targets))(*targets)
    if len(targets) and lib().ktfx_restore(
        ctypes.byref(matrix), tiles[experts.start].data_ptr(), array, len(targets), message
    ):
        raise WeightError(f"cannot unpack {part}: {message.value.decode()}")
    return out


def content_hash(tensor: torch.Tensor) -> str:
    """128 bits over a contiguous host tensor's bytes, in hexadecimal, at the speed of memory."""
    out = (ctypes.c_uint64 * 2)()
    if lib().ktfx_hash(tensor.data_ptr(), tensor.numel() * tensor.element_size(), out):
        raise HostCallError("no memory to hash a tensor")
    return f"{out[0]:016x}{out[1]:016x}"


def place(spec: ExpertsSpec, packed: Sequence[torch.Tensor]) -> None:
    """Huge pages, and NUMA shares, for packed tensors that are still to be written."""
    for i, matrix in enumerate(_layouts(spec, packed[-1].dtype)):
        lib().ktfx_place(packed[i].data_ptr(), ctypes.byref(matrix), spec.num_experts, i)


def dequantised(spec: ExpertsSpec, packed: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the kernels compute with, float32, plain layout."""
    up, down = _layouts(spec, packed[-1].dtype)
    out: dict[str, torch.Tensor] = {}
    for name, matrix, tiles in (("gate_up", up, packed[0]), ("down", down, packed[1])):
        plain = torch.empty(spec.num_experts, matrix.N, matrix.K)
        for e in range(spec.num_experts):
            lib().ktfx_unpack(ctypes.byref(matrix), tiles[e].data_ptr(), plain[e].data_ptr())
        out[name] = plain
    if spec.has_bias:
        out |= {"gate_up_bias": packed[2], "down_bias": packed[3]}
    return out


@dataclass(frozen=True, eq=False)
class NativeLayer:
    """A ``ktfx_layer`` and the tensors it points into."""

    spec: ExpertsSpec
    struct: native.Layer
    packed: tuple[torch.Tensor, ...]
    addresses: list[int]

    @cached_property
    def pointer(self) -> Any:
        return ctypes.pointer(self.struct)

    @cached_property
    def address(self) -> int:
        return ctypes.addressof(self.struct)


def native_layer(spec: ExpertsSpec, packed: Sequence[torch.Tensor]) -> NativeLayer:
    """The C structure for a layer's packed tensors; it keeps them alive."""
    up, down = _layouts(spec, packed[-1].dtype)
    for tensor, meta in zip(packed, packed_meta(spec, packed[-1].dtype), strict=True):
        if tuple(tensor.shape) != meta.shape or tensor.dtype != meta.dtype or not tensor.is_contiguous():
            raise WeightError(
                f"a packed tensor is {tensor.dtype} {tuple(tensor.shape)}",
                expected=f"{meta.dtype} {meta.shape}, contiguous",
                mend="pack the layer again with this spec",
            )
    for tensor in packed[:2]:
        if tensor.data_ptr() % ALIGNMENT:
            raise WeightError("packed tiles do not start on a 64-byte line", mend="copy them with aligned_empty")
    bias = [t.data_ptr() for t in packed[2:4]] if spec.has_bias else [None, None]
    struct = native.Layer(
        spec.num_experts,
        spec.hidden,
        spec.intermediate,
        _ACTIVATIONS[spec.activation],
        _GATES[spec.gate],
        spec.alpha,
        spec.limit,
        int(spec.activations == "int8"),
        up,
        down,
        packed[0].data_ptr(),
        packed[1].data_ptr(),
        *bias,
    )
    return NativeLayer(spec, struct, tuple(packed), [t.data_ptr() for t in packed])


# By the identity of the gate-up tiles. Weak: a model that is dropped takes its packed weights along.
_layers: dict[int, tuple[weakref.ref[torch.Tensor], NativeLayer]] = {}


def _cached_layer(spec: ExpertsSpec, packed: Sequence[torch.Tensor]) -> NativeLayer:
    """``native_layer`` without its hold on the tensors; building it takes longer than a small call."""
    tiles = packed[0]
    found = _layers.get(id(tiles))
    if found is not None:
        owner, known = found
        same = known.spec is spec or known.spec == spec
        if same and owner() is tiles and known.addresses == [t.data_ptr() for t in packed]:
            return known
    key, layer = id(tiles), replace(native_layer(spec, packed), packed=())
    _layers[key] = (weakref.ref(tiles, lambda _: _layers.pop(key, None)), layer)
    return layer


@dataclass(eq=False)
class NativeCall:
    """A ``ktfx_call`` and everything it points into. ``pointer`` is what a CUDA host function takes."""

    layer: NativeLayer
    struct: native.Call
    tensors: tuple[torch.Tensor, ...]
    packed: Sequence[torch.Tensor] = ()

    @property
    def pointer(self) -> int:
        return ctypes.addressof(self.struct)


_NOT_HOST = "inputs and outputs of a native call must be contiguous, on the host, and of one dtype"


def native_call(
    layer: NativeLayer, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, out_TH: torch.Tensor
) -> NativeCall:
    """The C structure of one call over tensors that stay where they are; checks shapes and dtypes, not ids."""
    struct = _call_struct(layer, x_TH, ids_TK, weights_TK, out_TH)
    if (
        out_TH.shape != x_TH.shape
        or out_TH.dtype != x_TH.dtype
        or not (x_TH.is_contiguous() and ids_TK.is_contiguous() and weights_TK.is_contiguous())
        or not (out_TH.is_contiguous() and out_TH.is_cpu)
    ):
        raise HostCallError(_NOT_HOST)
    return NativeCall(layer, struct, (x_TH, ids_TK, weights_TK, out_TH))


def _call_struct(
    layer: NativeLayer, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, out_TH: torch.Tensor
) -> native.Call:
    """A ``ktfx_call`` over contiguous tensors and an output that is known to fit x."""
    dtypes = _checked_dtypes(layer, x_TH, ids_TK, weights_TK)
    return native.Call(
        layer.pointer,
        x_TH.data_ptr(),
        ids_TK.data_ptr(),
        weights_TK.data_ptr(),
        out_TH.data_ptr(),
        *ids_TK.shape,
        *dtypes.to_bytes(3, "little"),
    )


def _checked_dtypes(layer: NativeLayer, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> int:
    """The entry of ``_DTYPES_OF_CALL``; HostCallError for inputs that do not fit or are not on the host."""
    dtypes = _DTYPES_OF_CALL.get((x_TH.dtype, ids_TK.dtype, weights_TK.dtype))
    T, K = ids_TK.shape
    if dtypes is None or x_TH.shape != (T, layer.spec.hidden) or weights_TK.shape != (T, K):
        raise _unfit(layer, x_TH, ids_TK, weights_TK)
    if not (x_TH.is_cpu and ids_TK.is_cpu and weights_TK.is_cpu):
        raise HostCallError(_NOT_HOST)
    return dtypes


def _unfit(layer: NativeLayer, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> HostCallError:
    T, K = ids_TK.shape
    if x_TH.shape != (T, layer.spec.hidden) or weights_TK.shape != (T, K):
        return HostCallError(
            f"shapes do not fit: x {tuple(x_TH.shape)}, ids {tuple(ids_TK.shape)}, weights {tuple(weights_TK.shape)}",
            expected=f"(T, {layer.spec.hidden}), (T, K), (T, K)",
        )
    return HostCallError(
        f"dtypes do not fit: x {x_TH.dtype}, ids {ids_TK.dtype}, weights {weights_TK.dtype}",
        expected="float32, bfloat16 or float16; ids int32 or int64",
    )


def _readable(ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights in dtypes that the kernels read."""
    if ids_TK.dtype not in _ID_DTYPES:
        ids_TK = ids_TK.long()
    if weights_TK.dtype not in DTYPES:
        weights_TK = weights_TK.float()
    return ids_TK, weights_TK


def _prepared(
    spec: ExpertsSpec,
    x_TH: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    packed: Sequence[torch.Tensor],
) -> NativeCall:
    ids_TK, weights_TK = _readable(ids_TK, weights_TK)
    x_TH, ids_TK, weights_TK = x_TH.contiguous(), ids_TK.contiguous(), weights_TK.contiguous()
    out_TH = torch.empty_like(x_TH)
    layer = _cached_layer(spec, packed)
    struct = _call_struct(layer, x_TH, ids_TK, weights_TK, out_TH)
    return NativeCall(layer, struct, (x_TH, ids_TK, weights_TK, out_TH), packed)  # a ticket must hold the packed


def _raise(status: int, message: str) -> None:
    if status == _OK:
        return
    mend = "use shorter prefills" if status == _NO_MEMORY else "check the router's output and the placed module"
    raise HostCallError(message or f"the CPU kernels returned {status}", mend=mend)


def forward(
    spec: ExpertsSpec,
    x_TH: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    packed: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The call, now: (T, H) in x's dtype. ctypes lets other Python threads run meanwhile."""
    # Weights have just passed through every cache and Python's own memory is far away: each new piece of code that is
    # touched here costs microseconds. So one look-up for all dtypes, numbers instead of a structure, few calls.
    library = lib()
    library.ktfx_wake()  # waking takes about as long as preparing
    layer = _cached_layer(spec, packed)
    ids_TK, weights_TK = _readable(ids_TK, weights_TK)
    dtypes = _checked_dtypes(layer, x_TH, ids_TK, weights_TK)
    T, K = ids_TK.shape
    x_TH, ids_TK, weights_TK = x_TH.contiguous(), ids_TK.contiguous(), weights_TK.contiguous()
    out_TH = torch.empty_like(x_TH)
    status = T and library.ktfx_experts_now(
        layer.address, x_TH.data_ptr(), ids_TK.data_ptr(), weights_TK.data_ptr(), out_TH.data_ptr(), T, K, dtypes
    )
    if status != _OK:
        _raise(status, library.ktfx_last_message().decode())
    return out_TH


@dataclass(eq=False)
class Ticket:
    """A call under way; holds its tensors until it is waited for."""

    number: int
    call: NativeCall

    def wait(self) -> torch.Tensor:
        """The (T, H) result; raises the call's HostCallError. A ticket can be waited for once."""
        message = ctypes.create_string_buffer(native.MESSAGE_BYTES)
        _raise(lib().ktfx_wait(self.number, message), message.value.decode())
        return self.call.tensors[3]


def submit(
    spec: ExpertsSpec,
    x_TH: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    packed: Sequence[torch.Tensor],
) -> Ticket:
    """Start the call on the kernels' own threads; errors of the call itself come back from ``Ticket.wait``."""
    call = _prepared(spec, x_TH, ids_TK, weights_TK, packed)
    number = lib().ktfx_submit(ctypes.byref(call.struct))
    if number < 0:
        raise HostCallError("the call could not be queued: no memory")
    return Ticket(number, call)


def set_threads(threads: int = 0, shares: int = 0) -> None:
    """Threads of the kernels' pool and NUMA shares; 0 is what the machine has. Waits for running calls."""
    if lib().ktfx_set_threads(threads, shares):
        raise KtfxError(f"cannot run {threads} threads in {shares} shares", mend="give numbers from 0 on")


def set_isa(name: str) -> None:
    """Force an instruction set (tests, measurements); KTFX_CPU_ISA does it for a whole process."""
    if lib().ktfx_set_isa(name.encode()):
        raise KtfxError(
            f"this machine does not run the {name!r} kernels", expected="one of " + ", ".join(isas()), mend="name one"
        )


def isas() -> list[str]:
    """Instruction sets that this machine runs, best first; the last two are the portable and the emulated one."""
    return lib().ktfx_isas().decode().split(",")

"""What a graph may ask the ``WeightStore`` for besides a parameter as it is: a kernel's packing, or several in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch

from ktfx.errors import WeightError
from ktfx.formats import QuantizedWeight, dequantize, format_name, parse_format
from ktfx.ops.experts import ExpertsSpec, Weight, experts_kernel
from ktfx.ops.linear import LinearSpec, linear_kernel
from ktfx.stored_weights import SCALES, ZEROS, dequantize_each, scales_dtype, stored_format_of, stored_weight

MERGED = "merged"
LINEAR = "linear."
DEQUANTISED = "dequantised."

Parts = tuple[tuple[str, str], ...]


class WeightRequest(Protocol):
    """Tensors made from parameters. Equal requests share one copy a device.

    kernel, spec_text: what makes them, as text (``request_of`` reads it back). parts: (part, dotted parameter name)
    pairs. format: for reports. activations: what the kernel may turn activations into, ``model`` for nothing.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def kernel(self) -> str: ...
    @property
    def parts(self) -> Parts: ...
    @property
    def spec_text(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def activations(self) -> str: ...

    def pack(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        """part → parameter, to the tensors on ``device``."""
        ...

    def model_weights(self, packed: Sequence[torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """part → the numbers really computed with, in the model's layout; None if they are the parameters' own."""
        ...


@dataclass(frozen=True)
class PackedRequest:
    """Weights of one experts module in a kernel's own layout.

    parts: (part, dotted parameter name) pairs, e.g. (``gate_up``, ``model.layers.0.mlp.experts.gate_up_proj``); of a
        weight that is stored quantised also ``gate_up_scales`` and, where it has them, ``gate_up_zeros``.
    """

    kernel: str
    spec: ExpertsSpec
    parts: Parts

    @property
    def format(self) -> str:
        return f"{self.kernel}:{self.spec.weights}"

    @property
    def spec_text(self) -> str:
        return self.spec.encode()

    @property
    def activations(self) -> str:
        return self.spec.activations

    def pack(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        given: dict[str, Weight] = {p: t for p, t in tensors.items() if not p.endswith((SCALES, ZEROS))}
        for part in ("gate_up", "down"):
            stored = self.stored(part, tensors)
            if stored is not None:
                kept = format_name(parse_format(stored.format)[0], stored.group) == self.spec.weights
                given[part] = stored if kept else dequantize_each(stored, _wide(tensors[f"{part}_{SCALES}"]))
        return experts_kernel(self.kernel).pack(self.spec, given, device)

    @property
    def is_stored(self) -> bool:
        """Whether the parameters are quantised themselves."""
        return any(part.endswith(SCALES) for part, _ in self.parts)

    def dtype_of(self, tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
        """What the kernel takes for the dtype of the model's weights (``ExpertsLayout.dtype``)."""
        stored = self.stored("down", tensors)
        if stored is None:
            return tensors["down"].dtype
        bias = tensors.get("down_bias")
        otherwise = torch.bfloat16 if bias is None else bias.dtype
        return scales_dtype(stored.format, tensors[f"down_{SCALES}"], otherwise)

    def stored(self, part: str, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight | None:
        """The weight that the parameters of ``gate_up`` or ``down`` store; None for plain ones."""
        if f"{part}_{SCALES}" not in tensors:
            return None
        spec = self.spec
        rows = spec.up_rows
        N, K = (rows, spec.hidden) if part == "gate_up" else (spec.hidden, spec.intermediate)
        return _stored((spec.num_experts, N, K), tensors, part, f"{part}_")

    def model_weights(self, packed: Sequence[torch.Tensor]) -> dict[str, torch.Tensor] | None:
        if self.spec.weights == "model":
            return None
        plain = experts_kernel(self.kernel).dequantised(self.spec, list(packed))
        return {part: _model_layout(self.spec, part, plain[part]) for part, _ in self.parts if part in plain}

    @property
    def unpacks_exactly(self) -> bool:
        """Whether the kernel promises the model's own numbers, bit for bit, from this pack."""
        return self.spec.weights == "model" and experts_kernel(self.kernel).restored is not None

    def unpacked(self, packed: Sequence[torch.Tensor], part: str, experts: range) -> torch.Tensor:
        """A part of the packed weights for a range of experts, in the model's layout: what the kernel computes with."""
        kernel = experts_kernel(self.kernel)
        if kernel.restored is not None and self.spec.weights == "model":
            return kernel.restored(self.spec, packed, part, experts)
        few = replace(self.spec, num_experts=len(experts))
        chosen = [t[experts.start : experts.stop] if t.dim() > 1 or t.numel() else t for t in packed]
        return _model_layout(few, part, kernel.dequantised(few, chosen)[part])


def _model_layout(spec: ExpertsSpec, part: str, plain: torch.Tensor) -> torch.Tensor:
    """The inverse of ``plain_layout`` for one tensor."""
    if spec.alternates and part in ("gate_up", "gate_up_bias"):
        half = plain.shape[1] // 2
        plain = torch.stack([plain[:, :half], plain[:, half:]], dim=2).flatten(1, 2)
    if spec.transposed and part in ("gate_up", "down"):
        plain = plain.transpose(1, 2)
    return plain.contiguous()


@dataclass(frozen=True)
class LinearRequest:
    """The weight of one linear layer in a kernel's own layout.

    kernel: ``linear.<name>``. parts: (``weight``, dotted parameter name), and of a weight that is stored quantised
    (``scales``, name) and, where it has them, (``zeros``, name).
    """

    kernel: str
    spec: LinearSpec
    parts: Parts

    @property
    def activations(self) -> str:
        return self.spec.activations

    @property
    def format(self) -> str:
        return f"{self.kernel}:{self.spec.weights}"

    @property
    def spec_text(self) -> str:
        return self.spec.encode()

    def pack(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        weight: Weight = tensors["weight"]
        stored = self.stored(tensors)
        if stored is not None:
            kept = format_name(parse_format(stored.format)[0], stored.group) == self.spec.weights
            weight = stored if kept else dequantize(stored, _wide(tensors[SCALES]))
        return linear_kernel(self.kernel.removeprefix(LINEAR)).pack(self.spec, weight, device)

    def stored(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight | None:
        """The weight that the parameters store; None for a plain one."""
        if SCALES not in tensors:
            return None
        return _stored((self.spec.out_features, self.spec.in_features), tensors, "weight", "")

    def model_weights(self, packed: Sequence[torch.Tensor]) -> dict[str, torch.Tensor] | None:
        if self.spec.weights == "model":
            return None
        return {"weight": linear_kernel(self.kernel.removeprefix(LINEAR)).dequantised(self.spec, list(packed))}


def _stored(shape: tuple[int, ...], tensors: Mapping[str, torch.Tensor], part: str, prefix: str) -> QuantizedWeight:
    data, scales, zeros = tensors[part], tensors[f"{prefix}{SCALES}"], tensors.get(f"{prefix}{ZEROS}")
    format = stored_format_of(shape, data, scales, zeros)
    if format is None:
        raise WeightError(
            f"{part} holds {data.dtype} {tuple(data.shape)} with scales {scales.dtype} {tuple(scales.shape)}",
            expected=f"a weight {tuple(shape)} in a format of ktfx",
            mend="load the checkpoint again",
        )
    return stored_weight(format, shape, [data, scales, *([] if zeros is None else [zeros])])


def _wide(scales: torch.Tensor) -> torch.dtype:
    """What a stored weight is dequantised to before it is rounded anew: scales in 16 bits tell the model's dtype."""
    return scales.dtype if scales.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


@dataclass(frozen=True)
class MergedRequest:
    """Parameters one above the other (along dimension 0), as one linear layer reads them. No number is changed."""

    parts: Parts
    kernel: str = MERGED
    spec_text: str = ""
    format: str = MERGED
    activations: str = "model"

    def pack(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        return [torch.cat([tensors[part].to(device) for part, _ in self.parts])]

    def model_weights(self, packed: Sequence[torch.Tensor]) -> dict[str, torch.Tensor] | None:
        return None


@dataclass(frozen=True)
class DequantisedRequest:
    """The numbers that a linear layer over a quantised weight computes with, (N, K) in ``dtype``: for a pass that takes
    the weight apart. spec: the layer's, with the format; parts: as of a ``LinearRequest``.
    """

    spec: LinearSpec
    dtype: torch.dtype
    parts: Parts
    activations: str = "model"

    @property
    def kernel(self) -> str:
        return DEQUANTISED + str(self.dtype).removeprefix("torch.")

    @property
    def spec_text(self) -> str:
        return self.spec.encode()

    @property
    def format(self) -> str:
        return f"{self.kernel}:{self.spec.weights}"

    def pack(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        rounded = LinearRequest(f"{LINEAR}reference", self.spec, self.parts).pack(tensors, device)
        return [linear_kernel("reference").dequantised(self.spec, rounded).to(self.dtype)]

    def model_weights(self, packed: Sequence[torch.Tensor]) -> dict[str, torch.Tensor] | None:
        return None  # the request that the layer itself has says it


def request_of(kernel: str, spec_text: str, parts: Parts) -> WeightRequest:
    """The request that a dump wrote down."""
    if kernel == MERGED:
        return MergedRequest(parts)
    if not spec_text.startswith("{"):
        raise WeightError(
            f"{spec_text[:60]!r} is no spec of the kernel {kernel!r}", mend="dump the graph again with this version"
        )
    if kernel.startswith(DEQUANTISED):
        dtype = getattr(torch, kernel.removeprefix(DEQUANTISED))
        return DequantisedRequest(LinearSpec.decode(spec_text), dtype, parts)
    if kernel.startswith(LINEAR):
        return LinearRequest(kernel, LinearSpec.decode(spec_text), parts)
    return PackedRequest(kernel, ExpertsSpec.decode(spec_text), parts)

"""An experts module's layout: what the ``transformers`` decorator records, and its gate found by trying it.

Experts that a checkpoint keeps quantised (transformers' ``FP8Experts``, ktfx's ``StoredExperts``) have the scales and
zero points of their weights as further parameters; their spec says the format.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ktfx.formats import FP8_BLOCK
from ktfx.ops.experts import ACTIVATIONS, ExpertsSpec, apply_gate
from ktfx.stored_weights import SCALES, ZEROS, scales_dtype, stored_format_of

_PROBE_ROWS = 16
_FP8 = torch.float8_e4m3fn
# How a module may name the scales and zero points of a weight.
SCALE_SUFFIXES = ("_scale_inv", "_scale")
ZERO_SUFFIX = "_zeros"


@dataclass(frozen=True)
class ExpertsLayout:
    """A module that ``ktfx::routed_experts`` can express: its spec and which parameter plays which part.

    parameters: part (``gate_up``, ``down``, ``gate_up_bias``, ``down_bias``) → parameter name on the module. Where
        weights are stored quantised, also ``gate_up_scales``, ``gate_up_zeros`` and the like; the spec's ``weights`` is
        then the stored format.
    dtype: what a kernel takes for the dtype of the model's weights.
    """

    spec: ExpertsSpec
    parameters: dict[str, str]
    dtype: torch.dtype

    @property
    def stored(self) -> bool:
        return self.spec.weights != "model"

    def names(self, part: str) -> list[str]:
        """The parameters of ``gate_up`` or ``down``: values, then scales and zero points where it is stored."""
        parts = (part, f"{part}_{SCALES}", f"{part}_{ZEROS}")
        return [self.parameters[p] for p in parts if p in self.parameters]


@dataclass(frozen=True)
class StoredLayout:
    """Experts whose weights are stored quantised, in whatever blocks.

    layout: the spec's ``weights`` is the format, or ``model`` where kernels have no such one; then ``block`` is that of
        fp8. order: the buffer that says how gate_up's inputs were sorted, or None. why_not: in words, what keeps
        kernels from reading these weights.
    """

    layout: ExpertsLayout
    block: tuple[int, ...] = ()
    order: str | None = None
    why_not: str | None = None


def experts_layout(module: Any) -> ExpertsLayout | str:
    """The layout, or in words why the op cannot express this module."""
    stored = _stored_layout(module)
    if isinstance(stored, StoredLayout):
        return stored.why_not or stored.layout
    if stored is not None:
        return stored
    for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated"):
        if not isinstance(getattr(module, name, None), bool):
            return f"{type(module).__name__} does not record its layout (no attribute {name!r})"
    return _layout(module, bool(module.is_transposed), bool(module.is_concatenated))


def stored_layout(module: Any) -> StoredLayout | None:
    """The layout of experts whose weights are stored quantised, if ``ktfx::stored_experts`` can run them."""
    found = _stored_layout(module)
    return found if isinstance(found, StoredLayout) else None


def _stored_layout(module: Any) -> StoredLayout | str | None:
    """None for experts in plain weights; in words why no op can run stored ones."""
    up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    scales = {name: _first(module, name, SCALE_SUFFIXES) for name in (up, "down_proj")}
    own = [getattr(module, name, None) for name in scales]
    if None in scales.values() or any(not isinstance(t, torch.Tensor) or t.dtype.itemsize > 1 for t in own):
        return None
    if not isinstance(getattr(module, "has_gate", None), bool) or not isinstance(
        getattr(module, "has_bias", None), bool
    ):
        return f"{type(module).__name__} does not record its layout"
    declared = getattr(module, "spec", None)  # StoredExperts'
    if isinstance(declared, ExpertsSpec):
        plain: ExpertsLayout | str = ExpertsLayout(declared, _plain_parameters(module, up), torch.bfloat16)
    else:
        plain = _layout(module, getattr(module, "is_transposed", False), getattr(module, "is_concatenated", True))
    if isinstance(plain, str):
        return plain
    return _with_scales(module, plain, {"gate_up": up, "down": "down_proj"}, scales)


def _with_scales(
    module: Any, plain: ExpertsLayout, weights: dict[str, str], scales: dict[str, str | None]
) -> StoredLayout | str:
    spec, parameters = plain.spec, dict(plain.parameters)
    E, rows = spec.num_experts, spec.up_rows
    shapes = {"gate_up": (E, rows, spec.hidden), "down": (E, spec.hidden, spec.intermediate)}
    formats: dict[str | None, None] = {}
    for part, name in weights.items():
        scale, zeros = scales[name], _first(module, name, (ZERO_SUFFIX,))
        assert scale is not None
        parameters[f"{part}_{SCALES}"] = scale
        if zeros is not None:
            parameters[f"{part}_{ZEROS}"] = zeros
        zero = None if zeros is None else getattr(module, zeros)
        formats[stored_format_of(shapes[part], getattr(module, name), getattr(module, scale), zero)] = None
    ordered = [*parameters]
    ordered.sort(key=lambda part: (part.endswith("_bias"), not part.startswith("gate_up")))  # as kernels read them
    parameters = {part: parameters[part] for part in ordered}
    if spec.gate != "none" and spec.intermediate % FP8_BLOCK and getattr(module, weights["gate_up"]).dtype == _FP8:
        formats = {None: None}  # blocks begin anew with up's rows
    order = "input_order" if isinstance(getattr(module, "input_order", None), torch.Tensor) else None
    (format, *others) = formats
    if others or format is None:
        if any(getattr(module, name).dtype != _FP8 for name in weights.values()):
            return f"{type(module).__name__} stores its experts in formats that do not go together"
        block = tuple(getattr(module, "block_size", None) or ())
        size = " × ".join(map(str, block)) or "one matrix"
        why = f"{type(module).__name__} has fp8 scales per {size}, gate and up each for itself; kernels read 128 × 128"
        return StoredLayout(ExpertsLayout(spec, parameters, plain.dtype), block, order, why)
    scale_dtype = getattr(module, parameters[f"down_{SCALES}"])
    otherwise = getattr(module, parameters["down_bias"]).dtype if spec.has_bias else torch.bfloat16
    dtype = scales_dtype(format, scale_dtype, otherwise)
    why_not = None
    if order is not None:
        why_not = f"{type(module).__name__} holds experts that sort their inputs each in its own way (act-order)"
    elif spec.has_bias and getattr(module, parameters["down_bias"]).dtype != dtype:
        why_not = f"{type(module).__name__} has biases of another dtype than its scales"
    return StoredLayout(ExpertsLayout(replace(spec, weights=format), parameters, dtype), (), order, why_not)


def _first(module: Any, name: str, suffixes: tuple[str, ...]) -> str | None:
    return next((name + s for s in suffixes if isinstance(getattr(module, name + s, None), torch.Tensor)), None)


def _plain_parameters(module: Any, up: str) -> dict[str, str]:
    biases = {"gate_up_bias": f"{up}_bias", "down_bias": "down_proj_bias"} if module.has_bias else {}
    return {"gate_up": up, "down": "down_proj"} | biases


def _layout(module: Any, transposed: bool, concatenated: bool) -> ExpertsLayout | str:
    if getattr(module, "has_post_expert_norm", False):
        return f"{type(module).__name__} normalises each expert's output"
    if getattr(module, "_is_expert_parallel", False):
        return f"{type(module).__name__} is split over ranks (expert parallel)"
    has_gate, has_bias = bool(module.has_gate), bool(module.has_bias)
    up = "gate_up_proj" if has_gate else "up_proj"
    parameters = _plain_parameters(module, up)
    for name in parameters.values():
        if not isinstance(getattr(module, name, None), torch.Tensor):
            return f"{type(module).__name__} has no parameter {name!r}"
    weight, down = getattr(module, up), module.down_proj
    if weight.dim() != 3 or down.dim() != 3:
        return f"{type(module).__name__} does not hold its experts' weights stacked (3-D)"
    E, rows, hidden = weight.shape
    if transposed:
        rows, hidden = hidden, rows
    spec = ExpertsSpec(
        num_experts=E,
        hidden=hidden,
        intermediate=rows // 2 if has_gate else rows,
        transposed=transposed,
        interleaved=not concatenated and has_gate,
        has_bias=has_bias,
    )
    if tuple(down.shape) != ((E, spec.intermediate, hidden) if spec.transposed else (E, hidden, spec.intermediate)):
        return (
            f"{type(module).__name__}.down_proj is {tuple(down.shape)}, which does not fit {up} {tuple(weight.shape)}"
        )
    gated = _find_gate(module, spec)
    if gated is None:
        return f"{type(module).__name__} has a gate function that no known one reproduces"
    return ExpertsLayout(gated, parameters, down.dtype)


def _find_gate(module: Any, spec: ExpertsSpec) -> ExpertsSpec | None:
    """The spec with the activation and gate that give what the module's own functions give on random input."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    width = 8
    with unset_fake_temporarily(), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        rows = width * (1 if not module.has_gate else 2)
        probe = torch.randn(_PROBE_ROWS, rows, generator=generator) * 6  # far enough to meet every clamp
        try:
            expected = getattr(module, "_apply_gate" if module.has_gate else "act_fn")(probe)
        except Exception:  # a gate that needs more than its argument: not one of ours
            return None
        plain = torch.cat([probe[:, 0::2], probe[:, 1::2]], dim=1) if spec.interleaved else probe
        candidates = [replace(spec, activation=a, gate="mul" if module.has_gate else "none") for a in ACTIVATIONS]
        if module.has_gate:
            limit = getattr(module, "limit", None)
            alpha = getattr(module, "alpha", None) or getattr(module, "swiglu_alpha", None)
            if isinstance(limit, (int, float)) and isinstance(alpha, (int, float)):
                candidates.append(replace(spec, activation="none", gate="clamped", alpha=alpha, limit=limit))
        for candidate in candidates:
            actual = apply_gate(candidate, plain)
            if actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-5, atol=1e-5):
                return candidate
    return None

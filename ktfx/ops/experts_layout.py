"""An experts module's layout: what the ``transformers`` decorator records, and its gate found by trying it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ktfx.ops.experts import ACTIVATIONS, ExpertsSpec, apply_gate

_PROBE_ROWS = 16


@dataclass(frozen=True)
class ExpertsLayout:
    """A module that ``ktfx::routed_experts`` can express: its spec and which parameter plays which part.

    parameters: part (``gate_up``, ``down``, ``gate_up_bias``, ``down_bias``) → parameter name on the module.
    """

    spec: ExpertsSpec
    parameters: dict[str, str]


def experts_layout(module: Any) -> ExpertsLayout | str:
    """The layout, or in words why the op cannot express this module."""
    for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated"):
        if not isinstance(getattr(module, name, None), bool):
            return f"{type(module).__name__} does not record its layout (no attribute {name!r})"
    if getattr(module, "has_post_expert_norm", False):
        return f"{type(module).__name__} normalises each expert's output"
    if getattr(module, "_is_expert_parallel", False):
        return f"{type(module).__name__} is split over ranks (expert parallel)"
    has_gate, has_bias = bool(module.has_gate), bool(module.has_bias)
    up = "gate_up_proj" if has_gate else "up_proj"
    parameters = {"gate_up": up, "down": "down_proj"}
    if has_bias:
        parameters |= {"gate_up_bias": f"{up}_bias", "down_bias": "down_proj_bias"}
    for name in parameters.values():
        if not isinstance(getattr(module, name, None), torch.Tensor):
            return f"{type(module).__name__} has no parameter {name!r}"
    weight, down = getattr(module, up), module.down_proj
    if weight.dim() != 3 or down.dim() != 3:
        return f"{type(module).__name__} does not hold its experts' weights stacked (3-D)"
    E, rows, hidden = weight.shape
    if module.is_transposed:
        rows, hidden = hidden, rows
    spec = ExpertsSpec(
        num_experts=E,
        hidden=hidden,
        intermediate=rows // 2 if has_gate else rows,
        transposed=bool(module.is_transposed),
        interleaved=not module.is_concatenated and has_gate,
        has_bias=has_bias,
    )
    if tuple(down.shape) != ((E, spec.intermediate, hidden) if spec.transposed else (E, hidden, spec.intermediate)):
        return (
            f"{type(module).__name__}.down_proj is {tuple(down.shape)}, which does not fit {up} {tuple(weight.shape)}"
        )
    gated = _find_gate(module, spec)
    if gated is None:
        return f"{type(module).__name__} has a gate function that no known one reproduces"
    return ExpertsLayout(gated, parameters)


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
            limit, alpha = getattr(module, "limit", None), getattr(module, "alpha", None)
            if isinstance(limit, (int, float)) and isinstance(alpha, (int, float)):
                candidates.append(replace(spec, activation="none", gate="clamped", alpha=alpha, limit=limit))
        for candidate in candidates:
            actual = apply_gate(candidate, plain)
            if actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-5, atol=1e-5):
                return candidate
    return None

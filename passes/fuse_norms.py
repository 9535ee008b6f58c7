"""fuse_norms: RMS norms, and the residual sum before them, → ``ktfx::rms_norm`` and ``ktfx::add_rms_norm``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ktfx.canonical import same_shape, tensor_of
from ktfx.fusion import Fusion, FusionPass
from ktfx.graph import info
from ktfx.matcher import Match
from ktfx.pass_manager import PassContext, register_pass
from ktfx.replacement import Replacement

# Casts to float32 and back are in the pattern; in a float32 model they are not in the graph, and match all the same.
_X = "aten.to(x, 'float32')"
_U = f"aten.mul({_X}, aten.rsqrt(aten.add(aten.mean(aten.pow({_X}, 2), [-1], True), eps)))"
_W = "aten.to(w, 'float32')"


def _check(match: Match) -> str | None:
    """The op returns x's dtype and takes one weight an entry of the last dimension."""
    x, w, root = (tensor_of(v) for v in (match.captures["x"], match.captures["w"], match.root))
    if x is None or w is None or root is None:
        return "x or the weight is no tensor"
    if x.dtype != root.dtype:
        return f"it turns {x.dtype} into {root.dtype}"
    if w.dim() != 1 or w.shape[0] != x.shape[-1]:
        return f"its weight is {list(w.shape)}, x is {list(x.shape)}"
    return None


def _check_whole(match: Match) -> str | None:
    """``aten.rms_norm`` kept whole: over the last dimension alone, with its eps given."""
    shape = match.captures["shape"]
    if not isinstance(match.captures["eps"], float) or not isinstance(shape, list | tuple) or len(shape) != 1:
        return "it has no eps of its own, or normalises several dimensions"
    return _check(match)


def _check_sum(match: Match) -> str | None:
    a, b = tensor_of(match.captures["a"]), tensor_of(match.captures["b"])
    if a is None or b is None or a.dtype != b.dtype or not same_shape(a.shape, b.shape):
        return "the two terms of the sum differ in shape or dtype"
    return None


def _norm(kind: str, pattern: str) -> Fusion:
    return Fusion(f"RMS norm ({kind}) → ktfx.rms_norm", pattern, f"ktfx.rms_norm(x, w, eps, '{kind}')", _check)


@register_pass
class FuseNorms(FusionPass):
    """The three kinds of ``ktfx.ops.norms``, told by where the graph rounds; then sums that feed one.

    The mean is summed in another order than ATen's, nothing else changes.
    """

    name = "fuse_norms"
    numerics_preserving = True
    roles = ("norm",)

    @dataclass(frozen=True)
    class Options(FusionPass.Options):
        """residual: also take in the sum before a norm (``add_rms_norm``)."""

        residual: bool = True

    options: Options

    fusions: ClassVar[tuple[Fusion, ...]] = (
        _norm("gemma", f"aten.to(aten.mul({_U}, aten.add({_W}, 1.0)), d)"),
        _norm("llama", f"aten.mul(w, aten.to({_U}, d))"),
        _norm("late", f"aten.to(aten.mul({_W}, {_U}), d)"),
        _norm("late", f"aten.to(aten.mul(w, {_U}), d)"),
        Fusion(
            "aten.rms_norm → ktfx.rms_norm",
            "aten.rms_norm(x, shape, w, eps)",
            "ktfx.rms_norm(x, w, eps, 'late')",
            _check_whole,
        ),
        Fusion(
            "sum + RMS norm → ktfx.add_rms_norm",
            "[ktfx.rms_norm(aten.add(a, b), w, eps, kind), aten.add(a, b)]",
            "[ktfx.add_rms_norm(a, b, w, eps, kind)[0], ktfx.add_rms_norm(a, b, w, eps, kind)[1]]",
            _check_sum,
        ),
    )

    def chosen(self) -> tuple[Fusion, ...]:
        return self.fusions if self.options.residual else self.fusions[:-1]

    @staticmethod
    def _why_not(
        graph: fx.Graph, context: PassContext, fusion: Fusion, replacement: Replacement, match: Match
    ) -> str | None:
        return _crosses_layers(match, context) or FusionPass._why_not(graph, context, fusion, replacement, match)


def _crosses_layers(match: Match, context: PassContext) -> str | None:
    """Why a sum at a layer's end stays with its layer: with layers on several devices, those beside a border would come
    out unlike the rest, and each kind is compiled on its own."""
    resolution = context.resolution
    if len({info(n).layer for n in (*match.nodes, match.root)}) == 1:
        return None
    layers = map(resolution.layer_path, range(resolution.num_layers))
    if len({resolution.glue_device(path, context.phase) for path in layers}) <= 1:
        return None
    return "the sum ends one layer and the norm begins the next, and layers lie on several devices"

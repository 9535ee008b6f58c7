"""Linear layers of one input in a decode step, over weights that stay where they are: ``ktfx::linear_rows``, with the
norm before them ``ktfx::norm_linear_rows``, and one whose result is added to another ``ktfx::linear_rows_add``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ktfx.errors import KtfxError
from ktfx.ops.activations import gated_mul_reference
from ktfx.ops.experts import ACTIVATIONS
from ktfx.ops.norms import add_rms_norm, rms_norm
from ktfx.ops.triton_loader import kernels, runs_kernels

# As many as the kernel has arguments for.
MOST_WEIGHTS = 4
# Rows of x up to which reading each weight once a row costs no more than a tiled product.
MOST_ROWS = 2


@torch.library.custom_op("ktfx::linear_rows", mutates_args=())
def linear_rows(
    x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor], wide: bool = False, act: str = ""
) -> list[torch.Tensor]:
    """x (…, K) and one to four weights (N, K) to one (…, N) each, contiguous; sums in float32.

    biases: one (N,) a weight, or none at all. Results are in x's dtype or, with ``wide``, the float32 sums themselves,
    which is what the product of x and weights cast to float32 gives (routers of DeepSeek and GLM). With ``act``, a key
    of ``ktfx.ops.experts.ACTIVATIONS``, the weights are a gate's and up's, both (N, K), and the one result is
    act(gate)·up: gate and up rounded to x's dtype, the rest in float32 and rounded once, as ``gated_mul``. x has at
    most two rows where the kernel runs (``MOST_ROWS``); more, and tensors on the CPU, go to ATen.
    """
    _check("linear_rows", x, weights, biases)
    _check_act("linear_rows", weights, wide, act)
    if _runs_kernel(x):
        made: list[torch.Tensor] = kernels("linear_rows").linear_rows(x, weights, biases, wide, act)
        return made
    if wide:
        x, weights, biases = x.float(), [w.float() for w in weights], [b.float() for b in biases]
    given: Sequence[torch.Tensor | None] = biases or [None] * len(weights)
    results = [F.linear(x, w, b).contiguous() for w, b in zip(weights, given, strict=True)]
    if not act:
        return results
    gate, up = results
    return [gated_mul_reference(gate, up, act)]


def _runs_kernel(x: torch.Tensor) -> bool:
    return runs_kernels(x) and 0 < x.numel() <= MOST_ROWS * x.shape[-1]


def _check(name: str, x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> None:
    K = x.shape[-1]
    if not 1 <= len(weights) <= MOST_WEIGHTS or len(biases) not in (0, len(weights)):
        raise KtfxError(
            f"{name} got {len(weights)} weights and {len(biases)} biases",
            expected=f"one to {MOST_WEIGHTS} weights, with a bias each or with none",
            mend="call it once for each group",
        )
    for w in weights:
        if w.dim() != 2 or w.shape[1] != K or w.dtype != x.dtype:
            raise KtfxError(
                f"{name} got a weight {w.dtype} {tuple(w.shape)} for inputs {x.dtype} {tuple(x.shape)}",
                expected=f"weights (N, {K}) in {x.dtype}",
                mend="pass the weights of layers that read this input",
            )


def _check_act(name: str, weights: Sequence[torch.Tensor], wide: bool, act: str) -> None:
    if not act:
        return
    if act not in ACTIVATIONS:
        raise KtfxError(f"{name}: no activation {act!r}", expected=", ".join(ACTIVATIONS), mend="name one of these")
    if len(weights) != 2 or weights[0].shape != weights[1].shape or wide:
        shapes = ", ".join(str(tuple(w.shape)) for w in weights)
        raise KtfxError(
            f"{name} got act={act!r} with {'wide results and ' * wide}weights {shapes}",
            expected="a gate's and up's, of one shape, with results in their dtype",
            mend="apply the activation to the results",
        )


def empty_results(x: torch.Tensor, weights: Sequence[torch.Tensor], wide: bool, act: str = "") -> list[torch.Tensor]:
    """What ``linear_rows`` returns, not filled."""
    dtype = torch.float32 if wide else x.dtype
    return [x.new_empty([*x.shape[:-1], w.shape[0]], dtype=dtype) for w in (weights[:1] if act else weights)]


@linear_rows.register_fake
def _(
    x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor], wide: bool = False, act: str = ""
) -> list[torch.Tensor]:
    return empty_results(x, weights, wide, act)


def empty_norm_results(
    x: torch.Tensor, residual: torch.Tensor | None, weights: Sequence[torch.Tensor], wide: bool, act: str = ""
) -> list[torch.Tensor]:
    """What ``norm_linear_rows`` returns, not filled."""
    before = [x.new_empty(x.shape) for _ in range(1 if residual is None else 2)]
    return [*before, *empty_results(x, weights, wide, act)]


@torch.library.custom_op("ktfx::norm_linear_rows", mutates_args=())
def norm_linear_rows(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: torch.Tensor,
    eps: float,
    kind: str,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    wide: bool = False,
    act: str = "",
) -> list[torch.Tensor]:
    """``linear_rows`` of an RMS norm's result: [normed x, x + residual if there is a residual, then its results].

    x, residual (…, K) as for ``rms_norm`` and ``add_rms_norm``, norm (K,) its weight. Rounds where these would.
    """
    _check("norm_linear_rows", x, weights, biases)
    _check_act("norm_linear_rows", weights, wide, act)
    if _runs_kernel(x):
        made: list[torch.Tensor] = kernels("linear_rows").norm_linear_rows(
            x, residual, norm, eps, kind, weights, biases, wide, act
        )
        return made
    before = [rms_norm(x, norm, eps, kind)] if residual is None else [*add_rms_norm(x, residual, norm, eps, kind)]
    return [*before, *linear_rows(before[0], weights, biases, wide, act)]


@norm_linear_rows.register_fake
def _(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: torch.Tensor,
    eps: float,
    kind: str,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    wide: bool = False,
    act: str = "",
) -> list[torch.Tensor]:
    return empty_norm_results(x, residual, weights, wide, act)


@torch.library.custom_op("ktfx::linear_rows_add", mutates_args=())
def linear_rows_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor,
    share: torch.Tensor | None = None,
) -> torch.Tensor:
    """addend + y, or addend + sigmoid(share)·y, where y = ``linear_rows`` of one weight, rounded to x's dtype.

    x (…, K), weight (N, K), bias (N,), addend as many rows of N, share as many rows of one, all in x's dtype. Sigmoid,
    product and sum are formed in float32 and rounded once. Returns addend's shape, contiguous.
    """
    _check("linear_rows_add", x, [weight], [] if bias is None else [bias])
    _check_rows("addend", addend, x, weight.shape[0])
    if share is not None:
        _check_rows("share", share, x, 1)
    if _runs_kernel(x):
        made: torch.Tensor = kernels("linear_rows").linear_rows_add(x, weight, bias, addend, share)
        return made
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.linear(x, weight, bias).reshape(-1, weight.shape[0]).to(wide)
    if share is not None:
        y = y * torch.sigmoid(share.reshape(-1, 1).to(wide))
    return (addend.to(wide) + y.view(addend.shape)).to(x.dtype).contiguous()


def _check_rows(name: str, t: torch.Tensor, x: torch.Tensor, width: int) -> None:
    if t.shape[-1] != width or t.shape[:-1].numel() != x.shape[:-1].numel() or t.dtype != x.dtype:
        raise KtfxError(
            f"linear_rows_add got {name} {t.dtype} {tuple(t.shape)} for inputs {x.dtype} {tuple(x.shape)}",
            expected=f"{x.shape[:-1].numel()} rows of {width} in {x.dtype}",
            mend="add after the product where shapes or dtypes differ",
        )


@linear_rows_add.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor,
    share: torch.Tensor | None = None,
) -> torch.Tensor:
    return addend.new_empty(addend.shape)

"""Linear layers of one input in a decode step, over weights that stay where they are: ``ktfx::linear_rows``, and with
the norm before them ``ktfx::norm_linear_rows``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ktfx.errors import KtfxError
from ktfx.ops.norms import add_rms_norm, rms_norm
from ktfx.ops.triton_loader import kernels, runs_kernels

# As many as the kernel has arguments for.
MOST_WEIGHTS = 4
# Rows of x up to which reading each weight once a row costs no more than a tiled product.
MOST_ROWS = 2


@torch.library.custom_op("ktfx::linear_rows", mutates_args=())
def linear_rows(
    x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor], wide: bool = False
) -> list[torch.Tensor]:
    """x (…, K) and one to four weights (N, K) to one (…, N) each, contiguous; sums in float32.

    biases: one (N,) a weight, or none at all. Results are in x's dtype or, with ``wide``, the float32 sums themselves,
    which is what the product of x and weights cast to float32 gives (routers of DeepSeek and GLM). x has at most two
    rows where the kernel runs (``MOST_ROWS``); more, and tensors on the CPU, go to ATen.
    """
    _check("linear_rows", x, weights, biases)
    if runs_kernels(x) and 0 < x.numel() <= MOST_ROWS * x.shape[-1]:
        made: list[torch.Tensor] = kernels("linear_rows").linear_rows(x, weights, biases, wide)
        return made
    if wide:
        x, weights, biases = x.float(), [w.float() for w in weights], [b.float() for b in biases]
    given: Sequence[torch.Tensor | None] = biases or [None] * len(weights)
    return [F.linear(x, w, b).contiguous() for w, b in zip(weights, given, strict=True)]


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


def empty_results(x: torch.Tensor, weights: Sequence[torch.Tensor], wide: bool) -> list[torch.Tensor]:
    """What ``linear_rows`` returns, not filled."""
    return [x.new_empty([*x.shape[:-1], w.shape[0]], dtype=torch.float32 if wide else x.dtype) for w in weights]


@linear_rows.register_fake
def _(
    x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor], wide: bool = False
) -> list[torch.Tensor]:
    return empty_results(x, weights, wide)


def empty_norm_results(
    x: torch.Tensor, residual: torch.Tensor | None, weights: Sequence[torch.Tensor], wide: bool
) -> list[torch.Tensor]:
    """What ``norm_linear_rows`` returns, not filled."""
    before = [x.new_empty(x.shape) for _ in range(1 if residual is None else 2)]
    return [*before, *empty_results(x, weights, wide)]


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
) -> list[torch.Tensor]:
    """``linear_rows`` of an RMS norm's result: [normed x, x + residual if there is a residual, then one a weight].

    x, residual (…, K) as for ``rms_norm`` and ``add_rms_norm``, norm (K,) its weight. Rounds where these would.
    """
    _check("norm_linear_rows", x, weights, biases)
    if runs_kernels(x) and 0 < x.numel() <= MOST_ROWS * x.shape[-1]:
        made: list[torch.Tensor] = kernels("linear_rows").norm_linear_rows(
            x, residual, norm, eps, kind, weights, biases, wide
        )
        return made
    before = [rms_norm(x, norm, eps, kind)] if residual is None else [*add_rms_norm(x, residual, norm, eps, kind)]
    return [*before, *linear_rows(before[0], weights, biases, wide)]


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
) -> list[torch.Tensor]:
    return empty_norm_results(x, residual, weights, wide)

"""``ktfx::linear_rows``: linear layers of one input in a decode step, over weights that stay where they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ktfx.errors import KtfxError
from ktfx.ops.triton_loader import kernels, runs_kernels

# As many as the kernel has arguments for.
MOST_WEIGHTS = 4
# Rows of x up to which reading each weight once a row costs no more than a tiled product.
MOST_ROWS = 2


@torch.library.custom_op("ktfx::linear_rows", mutates_args=())
def linear_rows(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> list[torch.Tensor]:
    """x (…, K) and one to four weights (N, K) to one (…, N) each, in x's dtype, contiguous; sums in float32.

    biases: one (N,) a weight, or none at all. x has at most two rows where the kernel runs (``MOST_ROWS``); more, and
    tensors on the CPU, go to ATen.
    """
    K = x.shape[-1]
    if not 1 <= len(weights) <= MOST_WEIGHTS or len(biases) not in (0, len(weights)):
        raise KtfxError(
            f"linear_rows got {len(weights)} weights and {len(biases)} biases",
            expected=f"one to {MOST_WEIGHTS} weights, with a bias each or with none",
            mend="call it once for each group",
        )
    for w in weights:
        if w.dim() != 2 or w.shape[1] != K or w.dtype != x.dtype:
            raise KtfxError(
                f"linear_rows got a weight {w.dtype} {tuple(w.shape)} for inputs {x.dtype} {tuple(x.shape)}",
                expected=f"weights (N, {K}) in {x.dtype}",
                mend="pass the weights of layers that read this input",
            )
    if runs_kernels(x) and 0 < x.numel() <= MOST_ROWS * K:
        made: list[torch.Tensor] = kernels("linear_rows").linear_rows(x, weights, biases)
        return made
    given: Sequence[torch.Tensor | None] = biases or [None] * len(weights)
    return [F.linear(x, w, b).contiguous() for w, b in zip(weights, given, strict=True)]


@linear_rows.register_fake
def _(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.new_empty([*x.shape[:-1], w.shape[0]]) for w in weights]

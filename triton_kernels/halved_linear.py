"""Linear layers stored in fp8 or int8, for more than a few inputs: multiplied as they are stored (``input_halves``).

Both operands come by descriptor (TMA), inputs as their two halves. Weights are the left operand, and the reduction is
split as in ``linear``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.input_halves import add_products, halved_inputs, no_products, stored_view, worth
from ktfx.triton_kernels.launch import cdiv
from ktfx.triton_kernels.matmul import StoredWeight, scale_row
from ktfx.triton_kernels.tile_results import linear_tile, store_linear
from triton.tools.tensor_descriptor import TensorDescriptor

if TYPE_CHECKING:
    from ktfx.triton_kernels.linear import LinearConfig


@triton.jit
def _halves_kernel(
    x_tiles, xs_ptr, w_tiles, s_ptr, b_ptr, y_ptr, M, N, K, lds, span,
    FMT: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    m_first, n_first = linear_tile(M, N, BM, BN, GROUP)
    m, n = m_first + tl.arange(0, BM), n_first + tl.arange(0, BN)
    ok = n < N
    srow = scale_row(tl.zeros((1,), tl.int64), n.to(tl.int64), N, FMT)
    acc, scale = no_products(BN, BM, FMT), tl.zeros((BN,), tl.float32)
    for k0 in tl.range(part * span, tl.minimum((part + 1) * span, K), BK):
        if FMT == "fp8":
            scale = tl.load(s_ptr + srow * lds + k0 // 128, mask=ok, other=0.0)
        x = x_tiles.load([0, m_first, k0]).reshape(2 * BM, BK).T
        acc = add_products(acc, w_tiles.load([n_first, k0]), x, scale, FMT)
    y = worth(acc, tl.load(xs_ptr + m, mask=m < M, other=0.0), BM, FMT)
    store_linear(y, y_ptr, s_ptr, b_ptr, m, n, M, N, part, FMT, BIAS, SPLIT)


def halved_linear(
    x: torch.Tensor, weight: StoredWeight, bias: torch.Tensor, has_bias: bool, y: torch.Tensor, c: LinearConfig,
    span: int,
) -> None:  # fmt: skip
    """y (M, N), or partial sums (parts, M, N) in float32 over ``span`` values of k each.

    The weight must say ``takes_halves`` for x's dtype.
    """
    (M, K), N = x.shape, y.shape[-1]
    xs, fmt = halved_inputs(x, weight.fmt), weight.fmt
    data = stored_view(weight.data, fmt)
    _halves_kernel[(cdiv(M, c.BM) * cdiv(N, c.BN), c.SPLIT)](
        TensorDescriptor.from_tensor(xs.halves, [2, c.BM, c.BK]), xs.scales,
        TensorDescriptor.from_tensor(data, [c.BN, c.BK]), weight.scales, bias, y, M, N, K, weight.lds, span,
        FMT=fmt, BIAS=has_bias, SPLIT=c.SPLIT, BM=c.BM, BN=c.BN, BK=c.BK, GROUP=c.GROUP,
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip

"""New keys and values into a static cache: ``ktfx::cache_write``, and with norm and rope before it
``ktfx::norm_rope_write``.

In a graph these are functions: they return the caches and the count as they are afterwards. Where the graph writes
those back to the very tensors that went in, the program calls the twin whose name ends in ``_``, which writes in place
(``IN_PLACE``). Shape suffixes: B sequences, L rows of the cache, S new rows, D and DV a head's size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ktfx.errors import KtfxError
from ktfx.ops.rope import norm_rope
from ktfx.ops.triton_loader import kernels, runs_kernels

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _check(keys: torch.Tensor, values: torch.Tensor, count: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    (B, H, S, D), DV = k.shape, v.shape[3]
    caches = keys.dim() == values.dim() == 4 and keys.shape[2] == values.shape[2] and keys.stride(3) == 1
    fits = caches and keys.shape == (B, H, keys.shape[2], D) and values.shape == (B, H, keys.shape[2], DV)
    if not (fits and v.shape == (B, H, S, DV) and values.stride(3) == 1 and count.numel() == 1):
        raise KtfxError(
            f"cache_write got keys {tuple(keys.shape)}, values {tuple(values.shape)}, count {tuple(count.shape)}, "
            f"k {tuple(k.shape)} and v {tuple(v.shape)}",
            expected="caches (B, H, L, D) and (B, H, L, DV), k (B, H, S, D), v (B, H, S, DV), one number",
            mend="write k and v one by one, by index_copy",
        )
    if count.dtype != torch.int64 or keys.dtype != k.dtype or values.dtype != v.dtype:
        raise KtfxError(
            f"cache_write got {k.dtype} for {keys.dtype}, {v.dtype} for {values.dtype} and a count in {count.dtype}",
            expected="k and v in the caches' dtypes, the count in int64",
            mend="convert k and v to the cache's dtype",
        )


@torch.library.custom_op("ktfx::cache_write_", mutates_args=("keys", "values", "count"))
def cache_write_(
    keys: torch.Tensor, values: torch.Tensor, count: torch.Tensor, k: torch.Tensor, v: torch.Tensor, moves: bool
) -> None:
    """k (B, H, S, D) and v (B, H, S, DV) to rows count … count + S − 1 of keys (B, H, L, D) and values (B, H, L, DV).

    count: one int64, on the same device; moves: add S to it. A row that the cache lacks is an error: IndexError on the
    CPU, a device-side assertion on CUDA, as for ``index_copy``.
    """
    _check(keys, values, count, k, v)
    if runs_kernels(k):
        kernels("cache_write").cache_write(keys, values, count, k, v, moves)
        return
    rows = torch.arange(k.shape[2], device=k.device) + count.reshape(())
    keys.index_copy_(2, rows, k)
    values.index_copy_(2, rows, v)
    if moves:
        count.add_(k.shape[2])


@cache_write_.register_fake
def _(*_: Any) -> None:
    return None


@torch.library.custom_op("ktfx::cache_write", mutates_args=())
def cache_write(
    keys: torch.Tensor, values: torch.Tensor, count: torch.Tensor, k: torch.Tensor, v: torch.Tensor, moves: bool
) -> Three:
    """``cache_write_`` on copies: keys, values and count as they are afterwards."""
    made = (keys.clone(), values.clone(), count.clone())
    cache_write_(*made, k, v, moves)
    return made


@cache_write.register_fake
def _(keys: torch.Tensor, values: torch.Tensor, count: torch.Tensor, *_: Any) -> Three:
    return torch.empty_like(keys), torch.empty_like(values), torch.empty_like(count)


@torch.library.custom_op("ktfx::norm_rope_write_", mutates_args=("keys", "values", "count"))
def norm_rope_write_(
    keys: torch.Tensor,
    values: torch.Tensor,
    count: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    moves: bool,
    cos: torch.Tensor,
    sin: torch.Tensor,
    style: str,
    weights: list[torch.Tensor],
    eps: float,
    kind: str,
) -> torch.Tensor:
    """``ktfx::norm_rope`` of q and k, then ``cache_write_`` of its k and of v. Returns q (B, its heads, S, D)."""
    _check(keys, values, count, k, v)
    if runs_kernels(q):
        rope = kernels("rope")
        cache = rope.CacheRows(keys, values, count, v, moves)
        made: torch.Tensor = rope.norm_rope_write(q, k, cos, sin, style, weights, eps, kind, cache)
        return made
    q, k = norm_rope(q, k, cos, sin, style, weights, eps, kind)
    cache_write_(keys, values, count, k, v, moves)
    return q


@norm_rope_write_.register_fake
def _(
    keys: torch.Tensor,
    values: torch.Tensor,
    count: torch.Tensor,
    q: torch.Tensor,
    *_: Any,
) -> torch.Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("ktfx::norm_rope_write", mutates_args=())
def norm_rope_write(
    keys: torch.Tensor,
    values: torch.Tensor,
    count: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    moves: bool,
    cos: torch.Tensor,
    sin: torch.Tensor,
    style: str,
    weights: list[torch.Tensor],
    eps: float,
    kind: str,
) -> Four:
    """``norm_rope_write_`` on copies: keys, values and count as they are afterwards, and q."""
    made = (keys.clone(), values.clone(), count.clone())
    return (*made, norm_rope_write_(*made, q, k, v, moves, cos, sin, style, weights, eps, kind))


@norm_rope_write.register_fake
def _(
    keys: torch.Tensor,
    values: torch.Tensor,
    count: torch.Tensor,
    q: torch.Tensor,
    *_: Any,
) -> Four:
    return torch.empty_like(keys), torch.empty_like(values), torch.empty_like(count), q.new_empty(q.shape)


@dataclass(frozen=True)
class InPlace:
    """The twin of an op that writes in place what the op returns first, and returns the one tensor behind, if any.

    moves: the position of the argument that says whether the third of keys, values and count is written.
    """

    op: Any
    moves: int

    def written(self, args: Sequence[Any]) -> int:
        """How many of the first arguments the twin writes to."""
        return 3 if args[self.moves] else 2


# The results of these ops that are its first arguments as they are afterwards: keys, values, count.
WRITTEN = 3
IN_PLACE: Mapping[Any, InPlace] = {
    torch.ops.ktfx.cache_write.default: InPlace(torch.ops.ktfx.cache_write_.default, 5),
    torch.ops.ktfx.norm_rope_write.default: InPlace(torch.ops.ktfx.norm_rope_write_.default, 6),
}

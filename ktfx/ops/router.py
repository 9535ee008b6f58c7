"""Routing: ``ktfx::route`` from router logits to chosen experts and their weights.

Scores are softmax or sigmoid of the logits, in float32. Experts are chosen by score plus ``bias``, weighted by score.
With groups, only the ``keep_groups`` best groups stay (best by their largest choice value, ``max``, or by the sum
of the two largest, ``top2``), and experts of the others count as ``masked`` (0, or −inf: never chosen). Then the
weights may be divided by their sum + eps, and are multiplied by ``scale``.

Qwen-MoE, Mixtral: softmax, renormalise. gpt-oss: the same (softmax over the chosen logits only is that quotient).
DeepSeek-V2: softmax, groups by ``max``, scale. DeepSeek-V3: sigmoid, bias, groups by ``top2``, renormalise with 1e-20,
scale, and in transformers ``masked`` −inf.
"""

from __future__ import annotations

import torch

from ktfx.errors import KtfxError
from ktfx.ops.triton_loader import kernels, runs_kernels


def _check(E: int, top_k: int, scoring: str, groups: int, keep_groups: int, group_score: str) -> None:
    problem = None
    if scoring not in ("softmax", "sigmoid"):
        problem = f"no scoring named {scoring!r}", "softmax or sigmoid"
    elif group_score not in ("max", "top2"):
        problem = f"no group score named {group_score!r}", "max or top2"
    elif not 1 <= top_k <= E:
        problem = f"top_k is {top_k}", f"1 to {E}, the number of experts"
    elif groups < 1 or E % groups or not 1 <= keep_groups <= groups:
        problem = (
            f"{keep_groups} of {groups} groups of {E} experts",
            "groups that divide the experts, and 1 to all kept",
        )
    elif group_score == "top2" and keep_groups < groups and E // groups < 2:
        problem = f"groups of {E // groups} expert have no two best", "group_score max, or larger groups"
    if problem:
        raise KtfxError(f"route: {problem[0]}", expected=problem[1], mend="take these from the model's config")


def route_reference(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    top_k: int,
    scoring: str = "softmax",
    groups: int = 1,
    keep_groups: int = 1,
    group_score: str = "max",
    renormalise: bool = True,
    scale: float = 1.0,
    eps: float = 0.0,
    masked: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in ATen; of equal choice values the lower id wins."""
    wide = torch.promote_types(logits_TE.dtype, torch.float32)
    logits = logits_TE.to(wide)
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    choice = scores if bias_E is None else scores + bias_E.to(wide)
    if keep_groups < groups:
        by_group = choice.unflatten(1, (groups, -1))
        best = by_group.amax(-1) if group_score == "max" else by_group.topk(2, -1).values.sum(-1)
        order = best.sort(dim=1, descending=True, stable=True).indices[:, :keep_groups]
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, order, True)
        choice = choice.masked_fill(~kept.repeat_interleave(logits.shape[1] // groups, 1), masked)
    ids = choice.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return (weights * scale), ids


@torch.library.custom_op("ktfx::route", mutates_args=())
def route(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    top_k: int,
    scoring: str = "softmax",
    groups: int = 1,
    keep_groups: int = 1,
    group_score: str = "max",
    renormalise: bool = True,
    scale: float = 1.0,
    eps: float = 0.0,
    dtype: torch.dtype | None = None,
    masked: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, E) logits of any float dtype to weights (T, K) in ``dtype`` (None: float32), int64 ids (T, K), best first."""
    T, E = logits_TE.shape
    _check(E, top_k, scoring, groups, keep_groups, group_score)
    out_dtype = torch.float32 if dtype is None else dtype
    if runs_kernels(logits_TE):
        weights = torch.empty(T, top_k, dtype=out_dtype, device=logits_TE.device)
        ids = torch.empty(T, top_k, dtype=torch.int64, device=logits_TE.device)
        kernels("router").route(
            logits_TE, bias_E, top_k, scoring, groups, keep_groups, group_score, renormalise, scale, eps, weights, ids,
            masked,
        )  # fmt: skip
        return weights, ids
    weights, ids = route_reference(
        logits_TE, bias_E, top_k, scoring, groups, keep_groups, group_score, renormalise, scale, eps, masked
    )
    return weights.to(out_dtype), ids.contiguous()


@route.register_fake
def _(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    top_k: int,
    scoring: str = "softmax",
    groups: int = 1,
    keep_groups: int = 1,
    group_score: str = "max",
    renormalise: bool = True,
    scale: float = 1.0,
    eps: float = 0.0,
    dtype: torch.dtype | None = None,
    masked: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = [logits_TE.shape[0], top_k]
    return logits_TE.new_empty(shape, dtype=dtype or torch.float32), logits_TE.new_empty(shape, dtype=torch.int64)

"""Router logits to chosen experts and weights, one program a token, all in registers. See ``ktfx.ops.router``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ktfx.triton_kernels.dependent_launch import dependent, wait_for_previous
from ktfx.triton_kernels.dequant import narrow
from ktfx.triton_kernels.launch import on_its_device, pow2


@triton.jit
def _router_kernel(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, E, row, scale, eps, masked,
    SCORING: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr, KEEP: tl.constexpr, GROUP_SCORE: tl.constexpr,
    RENORM: tl.constexpr, TOPK: tl.constexpr, KP: tl.constexpr, NG: tl.constexpr, GS: tl.constexpr, SIZE: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    wait_for_previous(DEPENDENT)
    t = tl.program_id(0).to(tl.int64)
    g, j = tl.arange(0, NG)[:, None], tl.arange(0, GS)[None, :]
    e = g * SIZE + j
    there = (g < GROUPS) & (j < SIZE)
    lowest = float("-inf")
    logits = tl.load(logits_ptr + t * row + e, mask=there, other=lowest).to(tl.float32)
    if SCORING == "softmax":
        top = tl.max(tl.max(logits, 1), 0)
        exp = tl.where(there, tl.exp(logits - top), 0.0)
        scores = exp / tl.sum(tl.sum(exp, 1), 0)
    else:
        tl.static_assert(SCORING == "sigmoid")
        scores = tl.sigmoid(logits)
    choice = scores
    if BIAS:
        choice += tl.load(bias_ptr + e, mask=there, other=0.0).to(tl.float32)
    choice = tl.where(there, choice, lowest)
    if KEEP < GROUPS:
        best = tl.max(choice, 1)
        if GROUP_SCORE == "top2":
            at = tl.min(tl.where(choice == best[:, None], j, GS), 1)
            best += tl.max(tl.where(j == at[:, None], lowest, choice), 1)
        groups = tl.arange(0, NG)
        best = tl.where(groups < GROUPS, best, lowest)
        kept = tl.zeros((NG,), tl.int32)
        for _ in tl.static_range(KEEP):
            first = tl.min(tl.where((best == tl.max(best, 0)) & (kept == 0), groups, NG), 0)
            kept = tl.where(groups == first, 1, kept)
            best = tl.where(groups == first, lowest, best)
        choice = tl.where(there & (kept[:, None] == 1), choice, tl.where(there, masked, lowest))
    k = tl.arange(0, KP)
    ids, weights = tl.zeros((KP,), tl.int32), tl.zeros((KP,), tl.float32)
    free = there
    for i in tl.static_range(TOPK):
        top = tl.max(tl.max(tl.where(free, choice, lowest), 1), 0)
        hit = tl.min(tl.min(tl.where(free & (choice == top), e, NG * GS * SIZE), 1), 0)
        weight = tl.sum(tl.sum(tl.where(e == hit, scores, 0.0) * there.to(tl.float32), 1), 0)
        ids = tl.where(k == i, hit, ids)
        weights = tl.where(k == i, weight, weights)
        free = free & (e != hit)
    if RENORM:
        weights = weights / (tl.sum(weights, 0) + eps)
    weights *= scale
    tl.store(weights_ptr + t * TOPK + k, narrow(weights, weights_ptr.dtype.element_ty), mask=k < TOPK)
    tl.store(ids_ptr + t * TOPK + k, ids.to(tl.int64), mask=k < TOPK)


@on_its_device
def route(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, top_k: int, scoring: str, groups: int, keep_groups: int,
    group_score: str, renormalise: bool, scale: float, eps: float, weights_TK: torch.Tensor, ids_TK: torch.Tensor,
    masked: float = 0.0,
) -> None:  # fmt: skip
    """Writes weights_TK (any float dtype) and ids_TK (int64)."""
    T, E = logits_TE.shape
    if T == 0:
        return
    logits = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    size = E // groups
    elements = pow2(groups) * pow2(size)
    _router_kernel[(T,)](
        logits, logits if bias_E is None else bias_E.contiguous(), weights_TK, ids_TK, E, logits.stride(0), scale, eps,
        masked,
        SCORING=scoring, BIAS=bias_E is not None, GROUPS=groups, KEEP=keep_groups, GROUP_SCORE=group_score,
        RENORM=renormalise, TOPK=top_k, KP=pow2(top_k), NG=pow2(groups), GS=pow2(size), SIZE=size,
        num_warps=1 if elements <= 256 else 2,
        **dependent(logits.device),
    )  # fmt: skip

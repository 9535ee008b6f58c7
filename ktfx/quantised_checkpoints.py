"""Weights that come quantised, as ``QuantizedWeight``s: no bit of a value, scale or zero point is changed.

GPTQ and AWQ store (inputs, outputs), compressed-tensors (outputs, inputs); all pack eight 4-bit values into an int32.
DeepSeek's fp8 blocks and gpt-oss's mxfp4 are ``from_fp8_blocks`` and ``from_mxfp4_blocks`` of ``ktfx.formats``.

Shape suffixes: N outputs, K inputs, G groups along K, W words of eight values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ktfx.errors import WeightError
from ktfx.formats import QuantizedWeight, pack_nibbles

BITS, PER_WORD = 4, 8
GROUPS = (128, 64, 32)  # those that int4 has, the largest first
# Which of eight neighbouring outputs the i-th nibble of an AWQ word holds.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class ImportedWeight:
    """A quantised weight and, for act-order checkpoints, how its inputs were sorted.

    order: int64 (K,); the weight's column j belongs to input ``order[j]`` of the model, so x is read as
        ``x[..., order]``. None where inputs lie as the model has them.
    """

    weight: QuantizedWeight
    order: torch.Tensor | None = None


def import_gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None = None,
    *,
    zero_offset: int = 1,
) -> ImportedWeight:
    """A GPTQ layer: w[k, n] = scales[g, n] · (q[k, n] − zero[g, n] − zero_offset), g = g_idx[k].

    qweight: int32 (K/8, N), eight inputs a word. qzeros: int32 (G, N/8), eight outputs a word. scales: float (G, N).
    g_idx: int32 (K,), the group of each input; None for k // (K/G). zero_offset: 1 in ``gptq`` checkpoints, 0 in
    ``gptq_v2`` ones. Raises WeightError for other bits than 4, shapes that do not fit, groups of unequal size.
    """
    _expect_int32("GPTQ", qweight=qweight, qzeros=qzeros)
    (words, N), G = qweight.shape, scales.shape[0]
    K = words * PER_WORD
    if tuple(scales.shape) != (G, N) or tuple(qzeros.shape) != (G, -(-N // PER_WORD)):
        raise _misfit("GPTQ", f"qweight {_shape(qweight)}, qzeros {_shape(qzeros)}, scales {_shape(scales)}", 4)
    codes_KN = _unpacked(qweight, 0)
    zeros_GN = _unpacked(qzeros, 1)[:, :N] + zero_offset
    order = None
    if g_idx is not None:
        group_of = g_idx.long().cpu()
        if group_of.numel() != K or int(group_of.min()) < 0 or int(group_of.max()) >= G:
            raise _misfit("GPTQ", f"g_idx {_shape(g_idx)} for {K} inputs in {G} groups", 4)
        if not torch.equal(group_of, torch.arange(K) // -(-K // G)):
            order = torch.argsort(group_of, stable=True)
            if not torch.equal(group_of[order], torch.arange(K) // -(-K // G)):
                raise WeightError(
                    "the GPTQ layer's groups (g_idx) are of unequal size",
                    expected=f"{G} groups of {-(-K // G)} inputs",
                    mend="dequantise the checkpoint and quantise it anew, without act-order",
                )
            codes_KN = codes_KN[order.to(codes_KN.device)]
    return ImportedWeight(_grouped_int4(codes_KN.t(), scales.t(), zeros_GN.t(), -(-K // G)), order)


def import_awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> ImportedWeight:
    """An AWQ layer of the GEMM layout: w[k, n] = scales[g, n] · (q[k, n] − zero[g, n]), g = k // (K/G).

    qweight: int32 (K, N/8), qzeros: int32 (G, N/8), eight outputs a word in ``AWQ_ORDER``. scales: float (G, N).
    """
    _expect_int32("AWQ", qweight=qweight, qzeros=qzeros)
    K, G, N = qweight.shape[0], scales.shape[0], scales.shape[1]
    if qweight.shape[1] * PER_WORD != N or tuple(qzeros.shape) != (G, N // PER_WORD) or K % G:
        raise _misfit("AWQ", f"qweight {_shape(qweight)}, qzeros {_shape(qzeros)}, scales {_shape(scales)}", 4)
    back = torch.tensor([AWQ_ORDER.index(i) for i in range(PER_WORD)], device=qweight.device)
    codes_KN = _unpacked(qweight, 1).unflatten(1, (-1, PER_WORD))[..., back].flatten(1)
    zeros_GN = _unpacked(qzeros, 1).unflatten(1, (-1, PER_WORD))[..., back].flatten(1)
    return ImportedWeight(_grouped_int4(codes_KN.t(), scales.t(), zeros_GN.t(), K // G))


def import_compressed_tensors(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None = None,
    weight_shape: torch.Tensor | tuple[int, int] | None = None,
    weight_g_idx: torch.Tensor | None = None,
) -> ImportedWeight:
    """A ``pack-quantized`` layer of 4 bits: w[n, k] = weight_scale[n, g] · (q[n, k] − zero[n, g]), q from −8 to 7.

    weight_packed: int32 (N, ⌈K/8⌉), eight inputs a word, stored as q + 8. weight_scale: float (N, G); G is 1 for one
    scale per output. weight_zero_point: int32 (⌈N/8⌉, G), packed like the values, or int8 (N, G); None where all are 0.
    weight_shape: (N, K); without it K is a multiple of 8. weight_g_idx: as ``g_idx`` of GPTQ.
    """
    _expect_int32("compressed-tensors", weight_packed=weight_packed)
    N = weight_packed.shape[0]
    K = int(weight_shape[1]) if weight_shape is not None else weight_packed.shape[1] * PER_WORD
    G = weight_scale.shape[1] if weight_scale.dim() == 2 else 0
    if tuple(weight_scale.shape) != (N, G) or G < 1 or weight_packed.shape[1] != -(-K // PER_WORD):
        raise _misfit("compressed-tensors", f"weight_packed {_shape(weight_packed)}, scale {_shape(weight_scale)}", 4)
    codes_NK = _unpacked(weight_packed, 1)[:, :K]
    zeros_NG = torch.full((N, G), 8, dtype=torch.int32, device=codes_NK.device)
    if weight_zero_point is not None:
        packed = weight_zero_point.dtype == torch.int32
        zeros_NG = _unpacked(weight_zero_point, 0)[:N] if packed else weight_zero_point.to(torch.int32) + 8
        if tuple(zeros_NG.shape) != (N, G):
            raise _misfit("compressed-tensors", f"zero point {_shape(weight_zero_point)} beside {N} × {G} scales", 4)
    group, order = -(-K // G), None
    if weight_g_idx is not None and int(weight_g_idx.max()) >= 0:
        group_of = weight_g_idx.long().cpu()
        sorted_groups = torch.arange(K) // group
        if not torch.equal(group_of, sorted_groups):
            order = torch.argsort(group_of, stable=True)
            if not torch.equal(group_of[order], sorted_groups):
                raise _misfit("compressed-tensors", "groups (weight_g_idx) of unequal size", 4)
            codes_NK = codes_NK[:, order.to(codes_NK.device)]
    return ImportedWeight(_grouped_int4(codes_NK, weight_scale, zeros_NG, group), order)


def in_model_order(imported: ImportedWeight, weight_NK: torch.Tensor) -> torch.Tensor:
    """A dequantised weight with its columns as the model has its inputs."""
    if imported.order is None:
        return weight_NK
    return weight_NK[:, torch.argsort(imported.order).to(weight_NK.device)]


def _grouped_int4(
    codes_NK: torch.Tensor, scales_NG: torch.Tensor, zeros_NG: torch.Tensor, group: int
) -> QuantizedWeight:
    """Codes 0…15 to int4 where every zero is 8, else int4zp; large groups become several with one scale."""
    N, K = codes_NK.shape
    whole_rows = scales_NG.shape[1] == 1
    size = next((g for g in GROUPS if group == g or (group % g == 0 and not whole_rows)), None)
    if size is None and whole_rows:
        size = GROUPS[0]
    if size is None:
        raise WeightError(
            f"the checkpoint's groups have {group} inputs",
            expected="a multiple of 32",
            mend="dequantise the checkpoint and let a rule quantise it: weights: int4-g32",
        )
    groups = -(-K // size)
    at = torch.zeros(groups, dtype=torch.long) if whole_rows else torch.arange(groups) * size // group
    at = at.to(scales_NG.device)
    scales, zeros = scales_NG[:, at].contiguous(), zeros_NG[:, at].to(torch.uint8).contiguous()
    symmetric = bool((zeros == 8).all())
    codes = codes_NK.to(torch.uint8)
    if groups * size > K:  # behind K inputs are zeros, whatever the codes
        codes = torch.cat((codes, codes.new_full((N, groups * size - K), 8)), 1)
    name = "int4" if symmetric else "int4zp"
    return QuantizedWeight(name, (N, K), pack_nibbles(codes.contiguous()), scales, None if symmetric else zeros, size)


def _unpacked(words: torch.Tensor, dim: int) -> torch.Tensor:
    """int32 words to int32 values 0…15, eight for one along ``dim``, the lowest bits first."""
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32, device=words.device)
    shape = [1] * (words.dim() + 1)
    shape[dim + 1] = PER_WORD
    return ((words.unsqueeze(dim + 1) >> shifts.view(shape)) & 15).flatten(dim, dim + 1)


def _expect_int32(what: str, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32 or tensor.dim() != 2:
            raise WeightError(
                f"{name} of the {what} layer is {tensor.dtype} {_shape(tensor)}",
                expected="a matrix of int32 words, eight 4-bit values each",
                mend="only 4-bit checkpoints are read; dequantise others and let a rule quantise them",
            )


def _misfit(what: str, found: str, bits: int) -> WeightError:
    return WeightError(
        f"the {what} layer's tensors do not fit together: {found}",
        expected=f"{bits}-bit values, eight a word, with scales and zeros a group",
        mend="check that the tensors are of one layer and have 4 bits; dequantise other checkpoints",
    )


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)

"""Storage formats of weights, and the torch reference every kernel is held to: ``quantize`` and ``dequantize``.

A weight is (…, N, K): N outputs, K inputs (the reduction). 4-bit values lie two a byte in blocks of 32 along K: byte j
(0 ≤ j < 16) of a block holds value j in its low and value j + 16 in its high nibble, so that a kernel reads two runs of
16 neighbours and never has to interleave.
"""

from __future__ import annotations

import difflib
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ktfx.errors import WeightError

BLOCK = 32  # values that share one 16-byte run of nibbles
FP8_BLOCK = 128  # DeepSeek-V3's scales are per 128 × 128
FP8_MAX = 448.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # OCP Microscaling Formats v1.0, table 5


@dataclass(frozen=True)
class Format:
    """A storage format.

    bits: bits a value, scales not counted; 0 for the model's own dtype.
    group: values along K that share a scale (0: the whole row); the default one of ``groups``.
    groups: the group sizes a file may ask for, as ``int4-g128``.
    """

    name: str
    bits: int
    description: str
    group: int = 0
    groups: tuple[int, ...] = ()


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("model", 0, "the model's own dtype, unchanged"),
        Format("int8", 8, "symmetric, one float32 scale per output channel"),
        Format(
            "int4",
            4,
            "symmetric, one scale per group along the input; Marlin means group 64",
            64,
            (32, 64, 128),
        ),
        Format("int4zp", 4, "with a zero point beside each group's scale (GPTQ, AWQ)", 64, (32, 64, 128)),
        Format("fp8", 8, "e4m3 with a float32 scale per 128 × 128 block (DeepSeek-V3's own)", 128, (128,)),
        Format("mxfp4", 4, "e2m1 in blocks of 32 with a power-of-two scale each (gpt-oss's own)", 32, (32,)),
    )
}


def parse_format(text: str) -> tuple[Format, int]:
    """``int4`` or ``int4-g128`` to the format and the group in force; a WeightError names the nearest format."""
    name, _, suffix = text.partition("-")
    form = FORMATS.get(name)
    if form is None:
        near = difflib.get_close_matches(name, FORMATS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "name one of these"
        raise WeightError(f"no weight format named {text!r}", expected="one of " + ", ".join(FORMATS), mend=hint)
    if not suffix:
        return form, form.group
    if not (suffix[0] == "g" and suffix[1:].isdigit()):
        raise WeightError(f"cannot read {text!r}", expected=f"{name} or {name}-g64", mend="write the group as -g<size>")
    return form, _checked_group(form, int(suffix[1:]))


def format_name(form: Format, group: int) -> str:
    """The canonical spelling: the bare name where the group is the default."""
    return form.name if group == form.group else f"{form.name}-g{group}"


def _checked_group(form: Format, group: int) -> int:
    if group not in form.groups:
        expected = "one of " + ", ".join(map(str, form.groups)) if form.groups else "no group"
        raise WeightError(
            f"{form.name} has no group of {group}", expected=expected, mend="leave the group out, or name one of these"
        )
    return group


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight in one of the formats.

    shape: that of the weight, (…, N, K), without padding.
    data: int8 (…, N, K) | uint8 nibbles (…, N, KP/2) | float8_e4m3fn (…, N, K) | the model's dtype (…, N, K);
        KP is K rounded up to the group.
    scales: float32 (…, N) | model dtype (…, N, KP/group) | float32 (…, ⌈N/128⌉, ⌈K/128⌉) | uint8 exponents, bias 127,
        (…, N, KP/32) | None.
    zeros: uint8 (…, N, KP/group), int4zp only.
    """

    format: str
    shape: tuple[int, ...]
    data: torch.Tensor
    scales: torch.Tensor | None
    zeros: torch.Tensor | None
    group: int

    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (self.data, self.scales, self.zeros) if t is not None]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())


def storage(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of ``QuantizedWeight.tensors()`` for a weight of ``shape`` and ``dtype``, before it exists."""
    form, group = parse_format(name)
    *lead, N, K = shape
    row = (*lead, N)
    match form.name:
        case "model":
            return [(tuple(shape), dtype)]
        case "int8":
            return [(tuple(shape), torch.int8), (row, torch.float32)]
        case "fp8":
            blocks = (*lead, -(-N // FP8_BLOCK), -(-K // FP8_BLOCK))
            return [(tuple(shape), torch.float8_e4m3fn), (blocks, torch.float32)]
        case "mxfp4":
            padded = -(-K // BLOCK) * BLOCK
            return [((*row, padded // 2), torch.uint8), ((*row, padded // BLOCK), torch.uint8)]
        case _:
            padded = -(-K // group) * group
            metas = [((*row, padded // 2), torch.uint8), ((*row, padded // group), dtype)]
            return [*metas, ((*row, padded // group), torch.uint8)] if form.name == "int4zp" else metas


def from_tensors(name: str, shape: tuple[int, ...], tensors: list[torch.Tensor]) -> QuantizedWeight:
    """The inverse of ``QuantizedWeight.tensors``."""
    form, group = parse_format(name)
    data, scales, zeros = [*tensors, None, None][:3]
    assert data is not None
    return QuantizedWeight(form.name, tuple(shape), data, scales, zeros, group)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes 0…15 (…, K), K a multiple of 32, to bytes (…, K/2) in the layout of this file's head."""
    blocks = codes.unflatten(-1, (-1, 2, BLOCK // 2))
    return (blocks[..., 0, :] | (blocks[..., 1, :] << 4)).flatten(-2)


def unpack_nibbles(data: torch.Tensor) -> torch.Tensor:
    """The inverse of ``pack_nibbles``: (…, K/2) bytes to (…, K) codes."""
    runs = data.unflatten(-1, (-1, BLOCK // 2))
    return torch.stack((runs & 15, runs >> 4), dim=-2).flatten(-3)


def quantize(
    w: torch.Tensor,
    format: str,
    group: int | None = None,
    search: bool = False,
    device: torch.device | None = None,
) -> QuantizedWeight:
    """Round a weight (…, N, K) to a format, one (N, K) matrix at a time so that only one is ever held in float32.

    group: overrides the one in the format's name. search: try scales around the plain one for each group and keep the
    one of least squared error (int8, int4, int4zp, mxfp4; fp8's scale is already exact enough to gain nothing).
    device: where the result is to lie; the rounding is done there. Scales of int4 are in w's dtype.
    Raises WeightError for an unknown format or group, a weight that is no float matrix, or one that holds NaN or inf.
    """
    form, in_name = parse_format(format)
    size = in_name if group is None else _checked_group(form, group)
    if w.dim() < 2 or not w.is_floating_point():
        raise WeightError(
            f"cannot quantise a {w.dim()}-d {w.dtype} tensor",
            expected="floating point, (…, N, K)",
            mend="pass the matrix",
        )
    target = w.device if device is None else device
    if form.name == "model":
        return QuantizedWeight("model", tuple(w.shape), w.to(target), None, None, 0)
    name = format_name(form, size)
    outs = [torch.empty(shape, dtype=dtype, device=target) for shape, dtype in storage(name, tuple(w.shape), w.dtype)]
    lead = w.shape[:-2]
    flat = [t.view(-1, *t.shape[len(lead) :]) for t in outs]
    for i, matrix in enumerate(w.reshape(-1, *w.shape[-2:]) if w.is_contiguous() else _matrices(w)):
        m_NK = matrix.to(target).float()
        if not bool(torch.isfinite(m_NK).all()):
            raise WeightError("the weight holds NaN or inf", expected="finite values", mend="check the checkpoint")
        for out, part in zip(flat, _ROUND[form.name](m_NK, size, w.dtype, search), strict=True):
            out[i].copy_(part)
    return from_tensors(name, tuple(w.shape), outs)


def _matrices(w: torch.Tensor) -> list[torch.Tensor]:
    return [w] if w.dim() == 2 else [m for part in w.unbind(0) for m in _matrices(part)]


def dequantize(q: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight that ``q`` stands for, (…, N, K) in ``dtype``; products of value and scale are formed in float32."""
    N, K = q.shape[-2:]
    if q.scales is None:
        return q.data.to(dtype)
    if q.format == "int8":
        return (q.data.float() * q.scales[..., None]).to(dtype)
    if q.format == "fp8":
        scale = q.scales.repeat_interleave(FP8_BLOCK, -2).repeat_interleave(FP8_BLOCK, -1)[..., :N, :K]
        return (q.data.float() * scale).to(dtype)
    codes = unpack_nibbles(q.data).unflatten(-1, (-1, q.group))
    if q.format == "mxfp4":
        table = torch.tensor([*E2M1, *(-v for v in E2M1)], device=codes.device)
        values = table[codes.long()] * _e8m0(q.scales)[..., None]
    else:
        zeros = 8 if q.zeros is None else q.zeros[..., None].float()
        values = (codes.float() - zeros) * q.scales[..., None].float()
    return values.flatten(-2)[..., :K].to(dtype)


def relative_error(w: torch.Tensor, q: QuantizedWeight) -> float:
    """‖w − ŵ‖ / ‖w‖ over the whole weight, sums in float64, one matrix at a time; 0 for a weight of zeros."""
    flat = [t.reshape(-1, *t.shape[len(q.shape) - 2 :]) for t in q.tensors()]
    wrong = total = 0.0
    for i, m in enumerate(_matrices(w)):
        one = from_tensors(format_name(FORMATS[q.format], q.group), tuple(m.shape), [t[i] for t in flat])
        exact = m.to(q.data.device).double()
        wrong += float((exact - dequantize(one).double()).square().sum())
        total += float(exact.square().sum())
    return (wrong / total) ** 0.5 if total else 0.0


def from_fp8_blocks(weight: torch.Tensor, scale_inv: torch.Tensor) -> QuantizedWeight:
    """A DeepSeek-V3 weight, bit for bit: ``weight`` float8_e4m3fn (…, N, K), ``scale_inv`` (…, ⌈N/128⌉, ⌈K/128⌉)."""
    shape = tuple(weight.shape)
    expected = storage("fp8", shape, torch.float32)[1][0]
    if weight.dtype != torch.float8_e4m3fn or tuple(scale_inv.shape) != expected:
        raise WeightError(
            f"not an fp8 block weight: {weight.dtype} {shape} with scales {tuple(scale_inv.shape)}",
            expected=f"float8_e4m3fn with scales {expected}",
            mend="load it in another format, or pass the checkpoint's weight_scale_inv",
        )
    return QuantizedWeight("fp8", shape, weight, scale_inv.float(), None, FP8_BLOCK)


def from_mxfp4_blocks(blocks: torch.Tensor, scales: torch.Tensor) -> QuantizedWeight:
    """A gpt-oss weight, bit for bit: ``blocks`` uint8 (…, N, K/32, 16), two values a byte, ``scales`` (…, N, K/32)."""
    if blocks.dtype != torch.uint8 or blocks.shape[-1] != BLOCK // 2 or blocks.shape[:-1] != scales.shape:
        raise WeightError(
            f"not an mxfp4 weight: {blocks.dtype} {tuple(blocks.shape)} with scales {tuple(scales.shape)}",
            expected="uint8 blocks (…, N, K/32, 16) and uint8 scales (…, N, K/32)",
            mend="pass the checkpoint's *_blocks and *_scales",
        )
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-3)
    return QuantizedWeight("mxfp4", tuple(codes.shape), pack_nibbles(codes), scales, None, BLOCK)


def _e8m0(exponents: torch.Tensor) -> torch.Tensor:
    """uint8 exponents of bias 127 to float32 powers of two."""
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - 127)


def _grouped(m_NK: torch.Tensor, group: int) -> torch.Tensor:
    """(N, K) to (N, ⌈K/group⌉, group), zeros behind K."""
    return F.pad(m_NK, (0, -m_NK.shape[1] % group)).unflatten(1, (-1, group))


# Around the plain scale: a smaller one cuts values at the edge off, and steps the others more finely.
_RATIOS = tuple(0.70 + 0.02 * i for i in range(19))


def _symmetric(
    w_NGg: torch.Tensor, low: int, high: int, dtype: torch.dtype, search: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in [low, high] and scales (N, G) of ``dtype`` for w ≈ code · scale."""
    above, below = w_NGg.amax(-1), w_NGg.amin(-1)
    plain = torch.maximum(above, -below) / high

    def codes_for(scale: torch.Tensor) -> torch.Tensor:
        safe = torch.where(scale == 0, 1.0, scale.float())
        return (w_NGg / safe[..., None]).round_().clamp_(low, high)

    best = plain.to(dtype)
    if -low > high:
        # One code more below zero: it goes to the largest magnitude, by a scale of the other sign if that lies above.
        best = (torch.where(above >= -below, above, below) / low).to(dtype)
    if search:
        least = torch.full_like(plain, float("inf"))
        for ratio in (*_RATIOS, *(-r for r in _RATIOS)):
            scale = (plain * ratio).to(dtype)
            error = (codes_for(scale) * scale.float()[..., None] - w_NGg).square_().sum(-1)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
    return codes_for(best), best


def _round_int8(m_NK: torch.Tensor, group: int, dtype: torch.dtype, search: bool) -> list[torch.Tensor]:
    codes, scales = _symmetric(m_NK[:, None], -127, 127, torch.float32, search)
    return [codes[:, 0].to(torch.int8), scales[:, 0]]


def _round_int4(m_NK: torch.Tensor, group: int, dtype: torch.dtype, search: bool) -> list[torch.Tensor]:
    codes, scales = _symmetric(_grouped(m_NK, group), -8, 7, dtype, search)
    return [pack_nibbles((codes + 8).to(torch.uint8).flatten(1)), scales]


def _round_int4zp(m_NK: torch.Tensor, group: int, dtype: torch.dtype, search: bool) -> list[torch.Tensor]:
    w = _grouped(m_NK, group)
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)  # zero itself stays exact

    def parts(ratio: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale = ((high - low) * ratio / 15).to(dtype)
        safe = torch.where(scale == 0, 1.0, scale.float())
        zero = (-low * ratio / safe).round_().clamp_(0, 15)
        return (w / safe[..., None] + zero[..., None]).round_().clamp_(0, 15), scale, zero

    codes, scales, zeros = parts(1.0)
    if search:
        least = torch.full_like(low, float("inf"))
        for ratio in _RATIOS:
            c, s, z = parts(ratio)
            error = ((c - z[..., None]) * s.float()[..., None] - w).square_().sum(-1)
            better = error < least
            codes = torch.where(better[..., None], c, codes)
            scales, zeros = torch.where(better, s, scales), torch.where(better, z, zeros)
            least = torch.minimum(error, least)
    return [pack_nibbles(codes.to(torch.uint8).flatten(1)), scales, zeros.to(torch.uint8)]


def _round_fp8(m_NK: torch.Tensor, group: int, dtype: torch.dtype, search: bool) -> list[torch.Tensor]:
    N, K = m_NK.shape
    padded = F.pad(m_NK, (0, -K % FP8_BLOCK, 0, -N % FP8_BLOCK))
    blocks = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    scale = blocks.abs().amax((1, 3)) / FP8_MAX
    safe = torch.where(scale == 0, 1.0, scale)
    codes = (blocks / safe[:, None, :, None]).flatten(2).flatten(0, 1)[:N, :K]
    return [codes.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale]


def _round_mxfp4(m_NK: torch.Tensor, group: int, dtype: torch.dtype, search: bool) -> list[torch.Tensor]:
    w = _grouped(m_NK, BLOCK)
    # The largest e2m1 value is 1.5 · 2², so the block's exponent is two below that of its largest magnitude.
    # frexp, not log2, which rounds up to the next whole number just below a power of two.
    exponent = torch.frexp(w.abs().amax(-1).clamp(min=2.0**-120))[1] - 3
    bounds = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(E2M1)], device=w.device)
    table = torch.tensor(E2M1, device=w.device)

    def codes_for(e: torch.Tensor) -> torch.Tensor:
        size = torch.ldexp(w.abs(), -e[..., None]).contiguous()
        down, up = torch.bucketize(size, bounds), torch.bucketize(size, bounds, right=True)
        return torch.where(down % 2 == 0, down, up)  # a tie goes to the even mantissa

    best = codes_for(exponent)
    if search:
        wider = codes_for(exponent + 1)
        error = (torch.ldexp(table[best], exponent[..., None]) - w.abs()).square().sum(-1)
        other = (torch.ldexp(table[wider], exponent[..., None] + 1) - w.abs()).square().sum(-1)
        best = torch.where((other < error)[..., None], wider, best)
        exponent = torch.where(other < error, exponent + 1, exponent)
    codes = best.to(torch.uint8) | (torch.signbit(w).to(torch.uint8) << 3)
    return [pack_nibbles(codes.flatten(1)), (exponent + 127).clamp(0, 254).to(torch.uint8)]


_ROUND = {
    "int8": _round_int8,
    "int4": _round_int4,
    "int4zp": _round_int4zp,
    "fp8": _round_fp8,
    "mxfp4": _round_mxfp4,
}

"""Tiny checkpoints on disk that come quantised, in the layouts of GPTQ, AWQ, compressed-tensors, fp8 and gpt-oss.

Written out the slow way, from random codes: what a reader makes of them is compared with the plain model returned.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import tiny_model
from safetensors.torch import save_file
from torch import nn

Stored = tuple[dict[str, torch.Tensor], torch.Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Layout:
    """config: the quantization_config. store(N, K, generator): tensors by their leaf, and the weight they stand for."""

    config: dict[str, Any]
    store: Callable[[int, int, torch.Generator], Stored]


def words(values: torch.Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Values 0…15 to int32, eight a word along ``dim``."""
    moved = values.long().movedim(dim, -1)
    *lead, length = moved.shape
    padded = torch.zeros(*lead, -(-length // 8) * 8, dtype=torch.int64)
    padded[..., :length] = moved
    out = torch.zeros(*lead, padded.shape[-1] // 8, dtype=torch.int64)
    for i in range(8):
        out |= padded[..., order[i] :: 8] << (4 * i)
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32).movedim(-1, dim).contiguous()


def _codes(N: int, K: int, group: int, symmetric: bool, g: torch.Generator) -> tuple[torch.Tensor, ...]:
    """codes and zeros 0…15, scales in float16: (N, K), (N, G), (N, G)."""
    group = group or K
    codes, zeros = torch.randint(0, 16, (N, K), generator=g), torch.randint(5, 11, (N, K // group), generator=g)
    scales = ((torch.rand(N, K // group, generator=g) + 0.5) * 0.02).half()
    return codes, torch.full_like(zeros, 8) if symmetric else zeros, scales


def gptq(group: int = 32, symmetric: bool = False, act_order: bool = False, v2: bool = False) -> Layout:
    def store(N: int, K: int, g: torch.Generator) -> Stored:
        codes, zeros, scales = _codes(N, K, group, symmetric, g)
        g_idx = torch.arange(K) // group
        if act_order:
            g_idx = g_idx[torch.randperm(K, generator=g)]
        weight = (codes - zeros[:, g_idx]).float() * scales[:, g_idx].float()
        stored = {
            "qweight": words(codes.t(), 0),
            "qzeros": words(zeros.t() - (0 if v2 else 1), 1),
            "scales": scales.t().contiguous(),
            "g_idx": g_idx.to(torch.int32),
        }
        return stored, weight

    config = {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": symmetric, "desc_act": act_order}
    return Layout(config | {"checkpoint_format": "gptq_v2" if v2 else "gptq"}, store)


def awq(group: int = 32) -> Layout:
    def store(N: int, K: int, g: torch.Generator) -> Stored:
        codes, zeros, scales = _codes(N, K, group, False, g)
        at = torch.arange(K) // group
        stored = {
            "qweight": words(codes.t(), 1, AWQ_ORDER),
            "qzeros": words(zeros.t(), 1, AWQ_ORDER),
            "scales": scales.t().contiguous(),
        }
        return stored, (codes - zeros[:, at]).float() * scales[:, at].float()

    return Layout({"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}, store)


def compressed_tensors(group: int = 32, symmetric: bool = True) -> Layout:
    """group: 0 for one scale a row."""

    def store(N: int, K: int, g: torch.Generator) -> Stored:
        codes, zeros, scales = _codes(N, K, group, symmetric, g)
        at = torch.arange(K) // (group or K)
        stored = {
            "weight_packed": words(codes, 1),
            "weight_scale": scales.bfloat16(),
            "weight_shape": torch.tensor([N, K]),
        }
        if not symmetric:
            stored["weight_zero_point"] = words(zeros, 0)
        return stored, (codes - zeros[:, at]).float() * scales.bfloat16()[:, at].float()

    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group" if group else "channel"}
    weights |= {"group_size": group or None}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    return Layout(config | {"ignore": ["lm_head"]}, store)


def fp8(block: tuple[int, int] | None = (128, 128)) -> Layout:
    def store(N: int, K: int, g: torch.Generator) -> Stored:
        n, k = block or (N, K)
        weight = (torch.randn(N, K, generator=g) * 60).to(torch.float8_e4m3fn)
        scales = (torch.rand(-(-N // n), -(-K // k), generator=g) + 0.5) * 1e-3
        wide = scales.repeat_interleave(n, 0)[:N].repeat_interleave(k, 1)[:, :K]
        held = scales if block else scales.reshape(())
        return {"weight": weight, "weight_scale_inv": held}, weight.float() * wide

    size = None if block is None else list(block)
    return Layout({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": size}, store)


_PIECES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def write(directory: Path, layout: Layout, family: str = "qwen3_moe", seed: int = 0, **overrides: Any) -> nn.Module:
    """A checkpoint of a family with every linear layer and expert quantised but the head; returns the plain model."""
    model = tiny_model(family, layers=1, **overrides)
    g = torch.Generator().manual_seed(seed)
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    for path, module in model.named_modules():
        if type(module) is nn.Linear and path != "lm_head":
            stored, weight = layout.store(*module.weight.shape, g)
            module.weight.data.copy_(weight)
            del tensors[f"{path}.weight"]
            tensors |= {f"{path}.{leaf}": t for leaf, t in stored.items()}
        if path.endswith(".experts"):
            for name, pieces in _PIECES.items():
                del tensors[f"{path}.{name}"]
                stacked = module.get_parameter(name).data
                for e, matrix in enumerate(stacked):
                    for leaf, part in zip(pieces, matrix.chunk(len(pieces)), strict=True):
                        stored, weight = layout.store(*part.shape, g)
                        part.copy_(weight)
                        tensors |= {f"{path}.{e}.{leaf}.{end}": t for end, t in stored.items()}
    save(directory, model, tensors, layout.config)
    return model


def write_gpt_oss(directory: Path, seed: int = 0, **overrides: Any) -> nn.Module:
    """gpt-oss with its experts in mxfp4, as its own checkpoint has them."""
    model = tiny_model("gpt_oss", layers=1, **overrides)
    g = torch.Generator().manual_seed(seed)
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    table = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            for name in ("gate_up_proj", "down_proj"):
                plain = module.get_parameter(name).data  # (E, K, N)
                E, K, N = plain.shape
                codes = torch.randint(0, 16, (E, N, K), generator=g)
                exponents = torch.randint(119, 123, (E, N, K // 32), generator=g)
                blocks = codes.view(E, N, K // 32, 16, 2)
                tensors[f"{path}.{name}_blocks"] = (blocks[..., 0] | (blocks[..., 1] << 4)).to(torch.uint8)
                tensors[f"{path}.{name}_scales"] = exponents.to(torch.uint8)
                values = table[codes] * (2.0 ** (exponents.float() - 127)).repeat_interleave(32, -1)
                plain.copy_(values.transpose(1, 2))
                del tensors[f"{path}.{name}"]
    save(directory, model, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    return model


def save(directory: Path, model: Any, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> None:
    """Two files and their index, so that a module's tensors may lie apart."""
    model.config.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"quantization_config": quantization, "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, some in halves.items():
        save_file({n: tensors[n].contiguous() for n in some}, directory / file, metadata={"format": "pt"})
    where = {n: file for file, some in halves.items() for n in some}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))

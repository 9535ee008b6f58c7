"""Tiny models of many families, made on the spot: every experts layout and cache kind that transformers 5 has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LAYERS = 3
VOCAB = 96


@dataclass(frozen=True)
class Family:
    """name: transformers model_type. overrides: config entries beyond the common tiny ones."""

    name: str
    overrides: dict[str, Any]
    cache: str = "static"


_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}

_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}

FAMILIES: tuple[Family, ...] = (
    Family("qwen3_moe", {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2}),
    Family(
        "qwen2_moe",
        {
            "moe_intermediate_size": 24,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 24,
        },
    ),
    Family("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    Family("deepseek_v2", {**_DEEPSEEK, "topk_method": "group_limited_greedy"}),
    Family("deepseek_v3", _DEEPSEEK),
    Family("olmoe", {"num_experts": 8, "num_experts_per_tok": 2}),
    Family(
        "glm4_moe",
        {
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    Family("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
    Family(
        "llama4_text",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 64,
            "attn_temperature_tuning": False,
        },
    ),
    Family("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    Family(
        "qwen3_next",
        {
            "moe_intermediate_size": 24,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 24,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    Family("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Family(
        "ernie4_5_moe",
        {
            "moe_intermediate_size": 24,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    Family("minimax_m2", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    Family("flex_olmo", {"num_experts": 8, "num_experts_per_tok": 2}),
    Family(
        "dots1",
        {
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    Family("llama", {}),
)

# Sliding windows beside full layers, and no experts: for tests of caches and attention.
_WINDOWED: dict[str, Any] = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 8,
}
SLIDING: tuple[Family, ...] = (
    Family("gemma2", _WINDOWED),
    Family("gemma3_text", _WINDOWED),
)

BY_NAME = {f.name: f for f in (*FAMILIES, *SLIDING)}


def tiny_model(name: str, dtype: torch.dtype = torch.float32, layers: int = LAYERS, **overrides: Any) -> nn.Module:
    """A model of a family with random weights, in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family = BY_NAME[name]
    entries = {**_COMMON, "num_hidden_layers": layers, **family.overrides, **overrides}
    if "layer_types" in entries:
        entries["layer_types"] = entries["layer_types"][:layers]
    config = AutoConfig.for_model(name, **entries)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)  # norms off their neutral weights, biases off zero
            elif not parameter.any():
                parameter.normal_(std=0.3)  # a router left at zero (transformers 5.17's Ernie) ties all its experts
            else:
                parameter.mul_(2.0)  # sharper routing than the usual initialisation gives
    return model


class HandWrittenMoE(nn.Module):
    """A plain PyTorch MoE transformer in the style of small inference scripts: no transformers class anywhere."""

    def __init__(self, layers: int = LAYERS, hidden: int = 32, experts: int = 4, chosen: int = 2, vocab: int = VOCAB):
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList([HandWrittenBlock(hidden, experts, chosen) for _ in range(layers)])
        self.norm = nn.RMSNorm(hidden)
        self.output = nn.Linear(hidden, vocab, bias=False)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        """(B, T) token ids → (B, T, V) logits."""
        x = self.tok_embeddings(idx)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


class HandWrittenBlock(nn.Module):
    def __init__(self, hidden: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden)
        self.attention = HandWrittenAttention(hidden)
        self.ffn_norm = nn.RMSNorm(hidden)
        self.block_sparse_moe = HandWrittenExpertsBlock(hidden, experts, chosen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.block_sparse_moe(self.ffn_norm(x))


class HandWrittenAttention(nn.Module):
    def __init__(self, hidden: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.wqkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.wo = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, H = x.shape
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in self.wqkv(x).chunk(3, dim=-1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).reshape(B, T, H))


class HandWrittenExpertsBlock(nn.Module):
    def __init__(self, hidden: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.cond_ffn = HandWrittenExperts(hidden, experts)
        self.chosen = chosen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, H = x.shape
        flat = x.reshape(-1, H)
        weights, ids = torch.topk(self.gate(flat).softmax(-1), self.chosen, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = self.cond_ffn(flat, ids)
        return torch.einsum("tko,tk->to", out, weights).reshape(B, T, H)


class HandWrittenExperts(nn.Module):
    def __init__(self, hidden: int, experts: int, inter: int = 24) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(experts, inter, hidden) * 0.1)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, inter) * 0.1)
        self.w3 = nn.Parameter(torch.randn(experts, inter, hidden) * 0.1)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        w1, w2, w3 = self.w1[ids], self.w2[ids], self.w3[ids]
        up = nn.functional.silu(torch.einsum("ti,tkoi->tko", x, w1)) * torch.einsum("ti,tkoi->tko", x, w3)
        return torch.einsum("tki,tkoi->tko", up, w2)


def hand_written() -> nn.Module:
    torch.manual_seed(0)
    return HandWrittenMoE().eval()


MAKERS: dict[str, Callable[[], nn.Module]] = {"hand_written": hand_written}

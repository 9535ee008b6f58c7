"""fuse_router on the routers of transformers' own models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from pass_runs import PassRun, run_passes
from torch import nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

GPU = {"devices": {"gpu0": "cuda:0"}, "default_device": "gpu0", "rules": []}
SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_experts_per_tok": 3}
DEEPSEEK = {
    **SMALL,
    "moe_intermediate_size": 8,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_attention_heads": 4,
}
QWEN = {**SMALL, "num_experts": 8, "moe_intermediate_size": 8}

BLOCKS = {
    "qwen3": (Qwen3MoeSparseMoeBlock, T.Qwen3MoeConfig(**QWEN, norm_topk_prob=True), "softmax, renormalised"),
    "qwen3 as it is": (Qwen3MoeSparseMoeBlock, T.Qwen3MoeConfig(**QWEN, norm_topk_prob=False), "softmax → "),
    "mixtral": (MixtralSparseMoeBlock, T.MixtralConfig(**SMALL, num_local_experts=8), "softmax, renormalised"),
    "gpt-oss": (GptOssMLP, T.GptOssConfig(**SMALL, num_local_experts=8), "softmax of the chosen"),
    "deepseek-v3": (DeepseekV3MoE, T.DeepseekV3Config(**DEEPSEEK), "sigmoid, bias, groups, renormalised"),
    "deepseek-v3 raw": (
        DeepseekV3MoE, T.DeepseekV3Config(**DEEPSEEK, norm_topk_prob=False), "sigmoid, bias, groups → "
    ),
    "deepseek-v2": (
        DeepseekV2Moe, T.DeepseekV2Config(**DEEPSEEK, topk_method="group_limited_greedy"), "softmax, groups"
    ),
    "deepseek-v2 greedy": (
        DeepseekV2Moe, T.DeepseekV2Config(**DEEPSEEK, topk_method="greedy", routed_scaling_factor=2.5),
        "softmax, scaled → ",
    ),
    "deepseek-v2-lite": (DeepseekV2Moe, T.DeepseekV2Config(**DEEPSEEK, topk_method="greedy"), "softmax, scaled → "),
}  # fmt: skip


class Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.mlp = block

    def forward(self, hidden_states: torch.Tensor) -> Any:
        out = self.mlp(hidden_states)
        return out[0] if isinstance(out, tuple) else out


def block_of(case: str) -> tuple[nn.Module, str]:
    kind, config, what = BLOCKS[case]
    config._experts_implementation = "grouped_mm"
    return kind(config), what


def run(block: nn.Module, dtype: torch.dtype = torch.float32) -> PassRun:
    torch.manual_seed(0)
    for name, parameter in [*block.named_parameters(), *block.named_buffers()]:
        if parameter.is_floating_point():
            parameter.data.normal_(std=0.02 if "bias" in name else 0.3)
    done = run_passes(
        Model(block).to(dtype), GPU, torch.randn(2, 5, 16, dtype=dtype), passes=("resolve_rules", "fuse_router")
    )
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(done.out, done.expected, atol=tolerance, rtol=tolerance)
    return done


@pytest.mark.parametrize("case", BLOCKS)
def test_routers(case: str) -> None:
    block, what = block_of(case)
    done = run(block)
    assert [r.what.startswith(what) for r in done.context.rewrites] == [True], done.context.misses
    assert done.ops["ktfx.route.default"] == 1 and done.ops["aten.topk.default"] == 0
    call = next(n for n in done.after.graph.nodes if "ktfx.route" in str(n.target))
    assert call.args[2] == 3
    assert done.ops["aten.mul.Tensor"] == done.ops_before["aten.mul.Tensor"] - ("scale" in call.kwargs)
    assert not done.context.misses


def test_in_bfloat16() -> None:
    block, what = block_of("qwen3")
    (rewrite,) = run(block, torch.bfloat16).context.rewrites
    assert rewrite.what.startswith(what)


def test_a_softmax_in_bfloat16_is_refused() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 16))

        def forward(self, x: torch.Tensor) -> Any:
            return F.linear(x.flatten(0, 1), self.weight).softmax(-1).topk(2)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = Router()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights, ids = self.router(x)
            return weights * ids

    done = run(Block(), torch.bfloat16)
    assert not done.context.rewrites
    (miss,) = done.context.misses
    assert miss.module == "mlp.router" and "expects 'float32', the graph has torch.bfloat16" in miss.why


def test_a_top_k_outside_routers_is_left_alone() -> None:
    class Sampler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights, ids = self.head(x.flatten(0, 1)).softmax(-1).topk(2)
            return weights * ids

    done = run(Sampler())
    assert not done.context.rewrites and not done.context.misses


def test_weights_are_written_in_the_dtype_that_reads_them() -> None:
    done = run(block_of("qwen3")[0], torch.bfloat16)
    (route,) = done.after.graph.find_nodes(op="call_function", target=torch.ops.ktfx.route.default)
    assert route.kwargs["dtype"] == torch.bfloat16 and route.meta["val"][0].dtype == torch.bfloat16
    assert done.ops["aten._to_copy.default"] < done.ops_before["aten._to_copy.default"]

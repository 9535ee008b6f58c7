"""Norms, rope, activations and router without a GPU: against transformers' own code, fakes, and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.gemma2 import modeling_gemma2 as gemma
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen

import ktfx.ops.activations
import ktfx.ops.norms
import ktfx.ops.rope
import ktfx.ops.router  # noqa: F401
from ktfx.errors import KtfxError

ops = torch.ops.ktfx


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_the_models_own(dtype: torch.dtype) -> None:
    x = torch.randn(3, 7, 64, dtype=dtype)
    for kind, cls in (("llama", qwen.Qwen3MoeRMSNorm), ("gemma", gemma.Gemma2RMSNorm), ("late", gpt_oss.GptOssRMSNorm)):
        norm = cls(64, eps=1e-6).to(dtype)
        torch.nn.init.normal_(norm.weight, 1.0, 0.2)
        with torch.no_grad():
            assert torch.equal(ops.rms_norm(x, norm.weight, 1e-6, kind), norm(x)), kind
            y, total = ops.add_rms_norm(x, 2 * x, norm.weight, 1e-6, kind)
            assert torch.equal(total, x + 2 * x) and torch.equal(y, norm(x + 2 * x))


def test_rope_is_the_models_own() -> None:
    q, k = torch.randn(2, 4, 5, 32), torch.randn(2, 2, 5, 32)
    half = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    table = [torch.cat((t, t), -1) for t in half]
    for own, style, given in (
        (qwen.apply_rotary_pos_emb, "half", table),
        (gpt_oss.apply_rotary_pos_emb, "half", half),
        (deepseek.apply_rotary_pos_emb_interleave, "split", table),
    ):
        for x, expected in zip((q, k), own(q, k, *given), strict=True):
            assert torch.allclose(ops.rope(x, *half, style), expected, atol=1e-6), style
    pairs = ops.rope(q[..., :20], half[0][..., :8], half[1][..., :8], "interleaved")
    assert torch.equal(pairs[..., 16:], q[..., 16:20])
    a, c, cos, sin = q[..., 0:16:2], q[..., 1:16:2], half[0][:, None, :, :8], half[1][:, None, :, :8]
    assert torch.allclose(pairs[..., 0:16:2], a * cos - c * sin, atol=1e-6)
    assert torch.allclose(pairs[..., 1:16:2], c * cos + a * sin, atol=1e-6)


def test_routers_are_the_models_own() -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 32)
    config = qwen.Qwen3MoeConfig(hidden_size=32, num_experts=16, num_experts_per_tok=4, norm_topk_prob=True)
    router = qwen.Qwen3MoeTopKRouter(config)
    torch.nn.init.normal_(router.weight)
    with torch.no_grad():
        logits, weights, ids = router(x)
        ours = ops.route(logits, None, 4)
        assert torch.equal(ours[1], ids) and torch.allclose(ours[0], weights)
        own = gpt_oss.GptOssTopKRouter(gpt_oss.GptOssConfig(hidden_size=32, num_local_experts=8, num_experts_per_tok=3))
        torch.nn.init.normal_(own.weight)
        logits, weights, ids = own(x)
        ours = ops.route(logits, None, 3)
        assert torch.equal(ours[1], ids) and torch.allclose(ours[0], weights, atol=1e-6)


def test_silu_and_mul() -> None:
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    assert torch.allclose(ops.silu_and_mul(gate, up), torch.nn.functional.silu(gate) * up)
    clamped = ops.gated_mul(gate * 9, up * 9, "silu", "clamped", 1.702, 7.0)
    g, u = (gate * 9).clamp(max=7), (up * 9).clamp(-7, 7)
    assert torch.allclose(clamped, (u + 1) * g * torch.sigmoid(1.702 * g), atol=1e-5)


CALLS: list[tuple[str, Callable[..., Any], Callable[[int], tuple[torch.Tensor, ...]]]] = [
    ("rms_norm", lambda x, w: ops.rms_norm(x, w, 1e-6, "llama"), lambda n: (torch.randn(2, n, 8), torch.randn(8))),
    ("add", lambda x, w: ops.add_rms_norm(x, x, w, 1e-6, "late")[0], lambda n: (torch.randn(2, n, 8), torch.randn(8))),
    ("rope", lambda x, c: ops.rope(x, c, c, "half"), lambda n: (torch.randn(2, 3, n, 8), torch.randn(1, n, 4))),
    ("gated_mul", lambda g, u: ops.gated_mul(g, u), lambda n: (torch.randn(n, 8), torch.randn(n, 8))),
    ("silu_and_mul", lambda g, u: ops.silu_and_mul(g, u), lambda n: (torch.randn(n, 8), torch.randn(n, 8))),
    ("route", lambda t: ops.route(t, None, 2)[0], lambda n: (torch.randn(n, 8),)),
]


@pytest.mark.parametrize(("name", "call", "inputs"), CALLS, ids=[c[0] for c in CALLS])
def test_fakes_take_symbolic_sizes(
    name: str, call: Callable[..., Any], inputs: Callable[[int], tuple[torch.Tensor, ...]]
) -> None:
    traced = make_fx(call, tracing_mode="symbolic")(*inputs(5))
    other = inputs(7)
    assert torch.equal(traced(*other), call(*other))


def test_errors_say_what_was_expected() -> None:
    x, w = torch.randn(2, 8), torch.randn(8)
    with pytest.raises(KtfxError, match="llama, late, gemma"):
        ops.rms_norm(x, w, 1e-6, "lama")
    with pytest.raises(KtfxError, match=r"\(8,\)"):
        ops.rms_norm(x, w[:4], 1e-6, "llama")
    with pytest.raises(KtfxError, match="one shape and dtype"):
        ops.add_rms_norm(x, x[:1], w, 1e-6, "llama")
    with pytest.raises(KtfxError, match="R ≤ 8"):
        ops.rope(torch.randn(1, 1, 2, 8), torch.randn(1, 2, 8), torch.randn(1, 2, 8), "half")
    with pytest.raises(KtfxError, match="half, interleaved, split"):
        ops.rope(torch.randn(1, 1, 2, 8), torch.randn(1, 2, 4), torch.randn(1, 2, 4), "neox")
    with pytest.raises(KtfxError, match="one shape and dtype"):
        ops.gated_mul(x, x[:1])
    with pytest.raises(KtfxError, match="no gated activation 'swish'"):
        ops.gated_mul(x, x, "swish")
    for bad in ({"top_k": 9}, {"top_k": 2, "scoring": "tanh"}, {"top_k": 2, "groups": 3}):
        with pytest.raises(KtfxError, match="the model's config"):
            ops.route(x, None, **bad)

"""fuse_attention: one query token's attention over a cache that is not repeated for the query heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import tiny_model
from parity import DEVICES, check_parity, run_steps, static_cache, two_gpus_host
from pass_runs import PassRun, run_passes
from torch import nn

import ktfx

GPU = {"devices": {"gpu0": "cuda:0"}, "default_device": "gpu0", "rules": []}
HOST = {"devices": {"host": "cpu"}, "default_device": "host", "rules": []}


def repeat_kv(x: torch.Tensor, times: int) -> torch.Tensor:
    B, heads, L, D = x.shape
    return x[:, :, None].expand(B, heads, times, L, D).reshape(B, heads * times, L, D)


class Attention(nn.Module):
    """One layer's attention as transformers writes it, over keys and values given whole."""

    def __init__(self, times: int, values_times: int | None = None, **options: Any) -> None:
        super().__init__()
        self.times, self.values_times, self.options = times, times if values_times is None else values_times, options

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        k, v = repeat_kv(k, self.times), repeat_kv(v, self.values_times)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)


class WrittenOut(nn.Module):
    """One layer's attention as transformers' eager forms write it out; the options are where they differ."""

    def __init__(
        self, times: int = 2, heads: int = 4, sinks: bool = False, shift: bool = True, cap: float | None = None,
        scale: str = "times", soft: torch.dtype | None = None, widen: bool = False, dropped: int = 1,
        plain_softmax: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.times, self.shift, self.cap, self.scale, self.soft = times, shift, cap, scale, soft
        self.widen, self.dropped, self.plain_softmax = widen, dropped, plain_softmax
        self.sinks = nn.Parameter(torch.linspace(-1, 2, heads)) if sinks else None

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        k, v = repeat_kv(k, self.times), repeat_kv(v, self.times)
        wide_q, wide_k = (q.float(), k.float()) if self.widen else (q, k)
        scores = torch.matmul(wide_q, wide_k.transpose(2, 3))
        scores = {"times": scores * 0.3, "over": scores / 3.0, "none": scores}[self.scale]
        if self.cap is not None:
            scores = torch.tanh(scores / self.cap) * self.cap
        if mask is not None:
            scores = scores + mask
        if self.sinks is not None:
            sinks = self.sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
            scores = torch.cat([scores, sinks], dim=-1)
        if self.shift and (self.sinks is not None or self.cap is None):
            scores = scores - scores.max(dim=-1, keepdim=True).values
        p = F.softmax(scores, dim=-1) if self.plain_softmax else F.softmax(scores, dim=-1, dtype=self.soft or q.dtype)
        if self.sinks is not None:
            p = p[..., : -self.dropped]
        p = F.dropout(p, p=0.1, training=self.training).to(v.dtype)
        return torch.matmul(p, v)


class Model(nn.Module):
    """Reads ``input_ids`` so that the phase can be told."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, input_ids: torch.Tensor, q: Any, k: Any, v: Any, mask: Any = None) -> torch.Tensor:
        return self.attention(q, k, v, mask) + input_ids.sum()


def run(attention: nn.Module, tokens: int = 1, rules: Any = GPU, mask: str = "keep", kv_heads: int = 2) -> PassRun:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, tokens, 8, generator=generator)
    k, v = (torch.randn(2, kv_heads, 12, 8, generator=generator) for _ in range(2))
    keep = torch.arange(12).view(1, 1, 1, 12) < torch.tensor([12, 5]).view(2, 1, 1, 1)
    hidden = {"add": float("-inf"), "least": torch.finfo(torch.float32).min}
    masks = {name: torch.zeros(keep.shape).masked_fill(~keep, value) for name, value in hidden.items()}
    masks |= {"keep": keep, "none": None}
    given = (torch.ones(2, tokens, dtype=torch.int64), q, k, v, *([masks[mask]] if mask != "none" else []))
    done = run_passes(Model(attention), rules, *given, passes=("resolve_rules", "fuse_attention"))
    torch.testing.assert_close(done.out, done.expected, atol=1e-5, rtol=1e-5)
    return done


@pytest.mark.parametrize("mask", ["keep", "add", "none"])
def test_the_repeated_copies_go(mask: str) -> None:
    done = run(Attention(2), mask=mask)
    (rewrite,) = done.context.rewrites
    assert rewrite.module == "attention"
    assert rewrite.before.count("aten.clone.default") == 2 and rewrite.before[-1].startswith("aten.scaled_dot")
    assert done.ops_before["aten.clone.default"] == 2 and done.ops["aten.clone.default"] == 0
    (call,) = [n for n in done.after.graph.nodes if "attention_decode_masked" in str(n.target)]
    assert [tuple(a.meta["val"].shape) for a in call.args[:3]] == [(2, 4, 1, 8), (2, 2, 12, 8), (2, 2, 12, 8)]


def test_a_scale_of_its_own_and_no_repetition() -> None:
    done = run(Attention(1, scale=0.7), kv_heads=4)
    (call,) = [n for n in done.after.graph.nodes if "attention_decode_masked" in str(n.target)]
    assert call.args[4] == 0.7 and len(done.context.rewrites) == 1


def test_grouped_heads_left_to_sdpa() -> None:
    done = run(Attention(1, enable_gqa=True))
    (call,) = [n for n in done.after.graph.nodes if "attention_decode_masked" in str(n.target)]
    assert tuple(call.args[1].meta["val"].shape) == (2, 2, 12, 8)


@pytest.mark.parametrize(
    ("attention", "why"),
    [
        (Attention(2, is_causal=True), "causal"),
        (Attention(2, dropout_p=0.5), "drops out"),
    ],
)
def test_what_is_left_alone_says_why(attention: Attention, why: str) -> None:
    torch.manual_seed(0)
    model = Model(attention)
    ids, q = torch.ones(1, 1, dtype=torch.int64), torch.randn(1, 4, 1, 8)
    k, v = torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    done = run_passes(model, GPU, ids, q, k, v, passes=("resolve_rules", "fuse_attention"))
    assert not done.context.rewrites
    assert any(why in miss.why for miss in done.context.misses)


def test_prefill_and_the_host_keep_sdpa() -> None:
    assert not run(Attention(2), tokens=3, mask="none").context.rewrites
    assert not run(Attention(2), rules=HOST).context.rewrites


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sinks": True},
        {"shift": False},
        {"sinks": True, "shift": False, "soft": torch.float32},
        {"sinks": True, "shift": False, "plain_softmax": True},
        {"cap": 2.0},
        {"scale": "over", "soft": torch.float32},
        {"scale": "none", "cap": 3.0, "sinks": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", ["add", "none", "least"])
def test_attention_written_out(options: dict[str, Any], mask: str) -> None:
    done = run(WrittenOut(**options), mask=mask)
    (rewrite,) = done.context.rewrites
    assert rewrite.what.startswith("attention written out") and not done.context.misses
    assert done.ops_before["aten.matmul.default"] == 2 and done.ops_before["aten.clone.default"] == 2
    left = {"aten.matmul.default", "aten.softmax.int", "aten.cat.default", "aten.clone.default", "aten.dropout.default"}
    assert not left & set(done.ops)
    assert done.ops["ktfx.attention_decode_masked.default"] == 1
    assert done.ops["ktfx.mask_bounds.default"] == (mask != "none")
    (call,) = [n for n in done.after.graph.nodes if "attention_decode_masked" in str(n.target)]
    assert [tuple(a.meta["val"].shape) for a in call.args[:3]] == [(2, 4, 1, 8), (2, 2, 12, 8), (2, 2, 12, 8)]
    assert (call.args[5] is not None) == options.get("sinks", False) and call.args[6] == options.get("cap", 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"soft": torch.float32}, {"sinks": True}, {"sinks": True, "widen": True}], ids=str)
def test_half_precision_is_rounded_less_often(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """No further from float64 than the attention written out, which rounds its scores and probabilities."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 1, 8, generator=generator).to(dtype)
    k, v = (torch.randn(2, 2, 12, 8, generator=generator).to(dtype) for _ in range(2))
    mask = torch.zeros(2, 1, 1, 12, dtype=dtype)
    mask[1, ..., :5] = torch.finfo(dtype).min
    model = Model(WrittenOut(**options).to(dtype))
    done = run_passes(
        model, GPU, torch.zeros(2, 1, dtype=torch.int64), q, k, v, mask, passes=("resolve_rules", "fuse_attention")
    )
    assert len(done.context.rewrites) == 1 and done.out.dtype == done.expected.dtype == dtype
    exact = WrittenOut(**options).double()
    exact.load_state_dict(model.attention.state_dict())
    with torch.no_grad():
        wide = exact.eval()(q.double(), k.double(), v.double(), mask.double())
    error, base = ((t.double() - wide).norm() / wide.norm() for t in (done.out, done.expected))
    assert error <= base * 1.1 + 1e-9


@pytest.mark.parametrize(
    ("options", "mask", "why"),
    [
        ({"sinks": True, "dropped": 2}, "none", "drops more"),
        ({}, "keep", "no mask of floats"),
    ],
)
def test_attention_written_out_that_is_something_else(options: dict[str, Any], mask: str, why: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    if options.get("dropped", 1) == 2:
        v = v[:, :, 1:]
    masks = [torch.arange(12).view(1, 1, 1, 12) < 7] if mask == "keep" else []
    done = run_passes(
        Model(WrittenOut(**options)), GPU, torch.ones(1, 1, dtype=torch.int64), q, k, v, *masks,
        passes=("resolve_rules", "fuse_attention"),
    )  # fmt: skip
    assert not done.context.rewrites
    assert any(why in miss.why for miss in done.context.misses), done.context.misses
    torch.testing.assert_close(done.out, done.expected)


def test_probabilities_that_are_read_elsewhere_are_a_miss() -> None:
    class Watched(WrittenOut):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            k, v = repeat_kv(k, 2), repeat_kv(v, 2)
            p = torch.softmax(q @ k.transpose(2, 3) * 0.3, -1)
            return p @ v + p.amax()

    done = run(Watched(), mask="none")
    assert not done.context.rewrites
    (miss,) = done.context.misses
    assert miss.module == "attention" and "also read by" in miss.why


def test_a_product_that_follows_no_softmax_is_no_miss() -> None:
    class Linear(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            return torch.sigmoid(q @ repeat_kv(k, 2).transpose(2, 3)) @ repeat_kv(v, 2)

    done = run(Linear(), mask="none")
    assert not done.context.rewrites and not done.context.misses


def test_bounds_are_found_once_for_layers_that_share_a_mask() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = WrittenOut(sinks=True), WrittenOut()

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.first(q, k, v, mask) + self.second(q, k, v, mask[:, :, :, : k.shape[2]])

    done = run(Twice(), mask="least")
    assert len(done.context.rewrites) == 2
    assert done.ops["ktfx.mask_bounds.default"] == 1


def test_bounds_cross_to_no_other_device_and_leave_layers_equal() -> None:
    """A layer a GPU: one compile for both, and no transfer besides the hidden states, masks and tables."""
    model = tiny_model("gpt_oss", layers=2)
    rules = {"ktfx": 1, "devices": DEVICES, "default_device": "gpu0", "layers": {0: "gpu0", 1: "gpu1"}}
    counts = {}
    for passes in (["fuse_attention"], []):
        torch._dynamo.reset()
        ktfx.compile(model, {**rules, "passes": passes, "rules": []}, simulate="cpu", partition_backend="eager")
        run_steps(model, torch.tensor([[5]]), 0, static_cache(model, 40))
        graph = ktfx.state_of(model).graphs[-1]
        pairs = zip(graph.built.units, graph.built.graphs, strict=True)
        counts[bool(passes)] = (len(graph.transfers()), len({g.key for u, g in pairs if u.layer is not None}))
    assert counts[True] == counts[False] and counts[True][1] == 1


@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        ("qwen3_moe", None),
        ("deepseek_v3", None),
        ("gpt_oss", None),
        ("gemma2", "eager"),
        pytest.param("mixtral", "eager", marks=pytest.mark.slow),
    ],
)
def test_parity_in_real_models(family: str, implementation: str | None) -> None:
    model = tiny_model(family, layers=2)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    state, _ = check_parity(model, {"ktfx": 1, "devices": DEVICES, "default_device": "gpu0", "rules": []}, steps=6)
    decode = state.graphs[-1]
    (record,) = [r for r in decode.records if r.name == "fuse_attention"]
    assert decode.phase == "generate" and len(record.rewrites) == 2 and not record.misses


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_a_cache_that_grows(family: str) -> None:
    """Keys, values and mask have lengths of their own name each; they are equal all the same."""
    from transformers import DynamicCache

    torch._dynamo.reset()
    model = tiny_model(family, layers=2)
    ids = torch.tensor([[5, 6, 7], [7, 8, 9]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    want = run_steps(model, ids, 5, DynamicCache(config=model.config), mask)
    ktfx.compile(model, {"ktfx": 1, **GPU}, simulate="cpu", partition_backend="eager", cache=None)
    got = run_steps(model, ids, 5, DynamicCache(config=model.config), mask, want.tokens)
    for mine, theirs in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    decode = ktfx.state_of(model).graphs[-1]
    (record,) = [r for r in decode.records if r.name == "fuse_attention"]
    assert decode.phase == "generate" and len(record.rewrites) == 2 and not record.misses


@pytest.mark.parametrize(
    ("shape", "rewrites"), [((1, 1, 1, 12), 1), ((1, 4, 1, 12), 1), ((2, 1, 1, 12), 1), ((1, 1, 1, 1), 0), ((12,), 0)]
)
def test_masks_of_other_shapes(shape: tuple[int, ...], rewrites: int) -> None:
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    ids = torch.ones(2, 1, dtype=torch.int64)
    passes = ("resolve_rules", "fuse_attention")
    done = run_passes(Model(WrittenOut()), GPU, ids, q, k, v, torch.randn(shape), passes=passes)
    torch.testing.assert_close(done.out, done.expected, atol=1e-5, rtol=1e-5)
    assert len(done.context.rewrites) == rewrites and len(done.context.misses) == 1 - rewrites


def test_it_can_be_switched_off() -> None:
    torch._dynamo.reset()
    model = tiny_model("qwen3_moe", layers=2)
    rules = {**two_gpus_host(2), "passes": ["rewrite_experts"]}
    ktfx.compile(model, rules, simulate="cpu", partition_backend="eager")
    run_steps(model, torch.tensor([[5]]), 0, static_cache(model, 8))
    assert ktfx.state_of(model).graphs[-1].phase == "generate"
    assert not [r for record in ktfx.state_of(model).graphs[-1].records if record.name == "fuse_attention" for r in [1]]

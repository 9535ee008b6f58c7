"""absorb_mla: DeepSeek's decode reads the compressed cache as it lies; keys and values are never expanded to heads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from parity import DEVICES, cache_tensors, check_parity, compare, run_steps, static_cache
from quantised_files import gptq, write
from torch import nn

import ktfx
import ktfx.ops.mla
from ktfx.budget import plan_weights
from ktfx.errors import KtfxError
from ktfx.formats import dequantize, quantize
from ktfx.verify import relative_error

GPU: dict[str, Any] = {"ktfx": 1, "devices": DEVICES, "default_device": "gpu0", "rules": []}
TWO_GPUS: dict[str, Any] = {**GPU, "layers": {"0-0": "gpu0", "1-1": "gpu1"}}
MLA = "ktfx.mla_decode.default"
EXPANDED = ("ktfx.attention_decode_masked.default", "aten.slice_scatter.default")


def compiled(model: nn.Module, rules: Any = GPU, **options: Any) -> nn.Module:
    torch._dynamo.reset()
    return ktfx.compile(model, rules, **{"simulate": "cpu", "partition_backend": "eager", **options})


def record_of(model: nn.Module, phase: str = "generate") -> Any:
    graph = next(g for g in ktfx.state_of(model).graphs if g.phase == phase)
    return next(r for r in graph.records if r.name == "absorb_mla")


def prompt(batch: int = 2, padding: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, 90, (batch, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


def decode_once(model: nn.Module) -> None:
    """Makes the graph of one token alone."""
    run_steps(model, prompt()[0][:, :1], 0, static_cache(model, 12))
    assert [g.phase for g in ktfx.state_of(model).graphs] == ["generate"]


@pytest.mark.parametrize(
    ("family", "attention"), [("deepseek_v2", "sdpa"), ("deepseek_v3", "sdpa"), ("deepseek_v3", "eager")]
)
def test_each_layer_is_rewritten_once_and_prefill_never(family: str, attention: str) -> None:
    model = tiny_model(family, layers=2)
    model.set_attn_implementation(attention)  # type: ignore[operator]
    compiled(model)
    run_steps(model, prompt()[0], 1, static_cache(model, 12))
    decode, prefill = record_of(model), record_of(model, "prefill")
    assert [r.module for r in decode.rewrites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert decode.ops_after[MLA] == 2 and not decode.misses
    assert all(decode.ops_before[op] and not decode.ops_after[op] for op in EXPANDED)
    assert decode.ops_before["aten.linear.default"] == decode.ops_after["aten.linear.default"] + 2  # kv_b_proj's
    assert not prefill.rewrites and not prefill.ops_after[MLA]


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_parity_over_two_gpus_and_32_steps(family: str) -> None:
    state, _ = check_parity(tiny_model(family, layers=2), TWO_GPUS, batch=2)
    assert sum(r.ops_after[MLA] for r in state.graphs[-1].records if r.name == "absorb_mla") == 2


def test_left_padding_a_reset_and_a_second_conversation() -> None:
    model = tiny_model("deepseek_v3", layers=2)
    ids, mask = prompt()
    expected = run_steps(model, ids, 5, static_cache(model, 16), mask)
    compiled(model)
    cache = static_cache(model, 16)
    compare(run_steps(model, ids, 5, cache, mask, forced=expected.tokens), expected, 1e-4)
    cache.reset()
    compare(run_steps(model, ids, 5, cache, mask, forced=expected.tokens), expected, 1e-4)


def test_plain_generate_gives_eager_tokens() -> None:
    model = tiny_model("deepseek_v2", layers=2)
    ids, mask = prompt()
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **settings)  # type: ignore[operator]
    compiled(model)
    assert model.generate(ids, **settings).tolist() == expected.tolist()  # type: ignore[operator]
    assert len(record_of(model).rewrites) == 2


def test_a_cache_that_grows() -> None:
    from transformers import DynamicCache

    model = tiny_model("deepseek_v3", layers=1)
    ids, _ = prompt()
    expected = run_steps(model, ids, 4, DynamicCache(config=model.config))
    compiled(model, cache=None)
    compare(run_steps(model, ids, 4, DynamicCache(config=model.config), forced=expected.tokens), expected, 1e-4)
    assert len(record_of(model).rewrites) == 1


def test_the_cache_holds_the_latent_and_the_shared_key_alone() -> None:
    model = tiny_model("deepseek_v3", layers=1)
    config: Any = model.config
    compiled(model)
    cache = static_cache(model, 12)
    run_steps(model, prompt()[0], 2, cache)
    held = cache_tensors(cache)
    wide = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    keys, values = held[0, "keys"], held[0, "values"]
    assert (keys.numel() + values.numel()) / (2 * 12) == config.kv_lora_rank + config.qk_rope_head_dim < wide
    assert not keys[:, :, 9:].any() and keys[:, :, :9].any(-1).all()


def test_bfloat16_is_no_further_from_the_truth_than_eager() -> None:
    """Dense layers: where a router stands between, roundings of any kind may choose another expert."""
    exact_model = tiny_model("deepseek_v3", layers=2, first_k_dense_replace=2)
    with torch.no_grad():
        for parameter in exact_model.parameters():
            parameter.copy_(parameter.bfloat16().float())  # so that the error is the computation's alone
    ids, _ = prompt()
    exact = run_steps(exact_model, ids, 8, static_cache(exact_model, 16))
    model = exact_model.to(torch.bfloat16)
    eager = run_steps(model, ids, 8, static_cache(model, 16), forced=exact.tokens)
    compiled(model)
    ours = run_steps(model, ids, 8, static_cache(model, 16), forced=exact.tokens)
    assert len(record_of(model).rewrites) == 2

    def error(trace: Any) -> float:
        return sum(relative_error(a.float(), b) for a, b in zip(trace.logits[1:], exact.logits[1:], strict=True))

    assert error(ours) <= 1.5 * error(eager)


@pytest.mark.parametrize("op", [pytest.param("linear.aten", marks=pytest.mark.slow), "linear.triton"])
def test_a_projection_that_a_rule_rounds_is_dequantised_once(op: str) -> None:
    model = tiny_model("deepseek_v3", layers=1, kv_lora_rank=32)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        weight = rounded.model.layers[0].self_attn.kv_b_proj.weight  # type: ignore[union-attr]
        weight.copy_(dequantize(quantize(weight, "int8", search=True)))
    expected = run_steps(rounded, prompt()[0], 3, static_cache(rounded, 12))
    rule = {"match": {"name": "kv_b_proj$"}, "replace": {"op": op, "weights": "int8"}}
    compiled(model, {**GPU, "rules": [rule]}, verify=True)
    compare(run_steps(model, prompt()[0], 3, static_cache(model, 12), forced=expected.tokens), expected, 1e-4)
    record = record_of(model)
    assert len(record.rewrites) == 1 and not record.misses and record.ops_after[MLA] == 1
    assert record.ops_before["ktfx.linear_quant.default"] == 1 and not record.ops_after["ktfx.linear_quant.default"]
    held = {e.format: e for e in ktfx.state_of(model).store.entries() if e.request is not None}
    state = ktfx.state_of(model)
    planned = {p.format: p.nbytes for p in plan_weights(model, state.resolution) if p.name.endswith("kv_b_proj.weight")}
    assert planned["dequantised.float32:int8"] == held["dequantised.float32:int8"].nbytes == 4 * weight.numel()
    assert torch.equal(held["dequantised.float32:int8"].tensors[0], weight)
    assert "dequantised.float32:int8" not in {e.format for e in ktfx.state_of(model).quantisation_errors()}


@pytest.mark.parametrize("op", [None, pytest.param("linear.triton", marks=pytest.mark.slow)])
def test_a_projection_that_the_checkpoint_rounded(tmp_path: Path, op: str | None) -> None:
    sizes = {"hidden_size": 64, "q_lora_rank": 64, "kv_lora_rank": 64, "moe_intermediate_size": 64}
    plain = write(tmp_path, gptq(), "deepseek_v3", **sizes, v_head_dim=16, first_k_dense_replace=0)
    expected = run_steps(plain, prompt()[0], 3, static_cache(plain, 12))
    torch._dynamo.reset()
    rules = [{"match": {"name": "kv_b_proj$"}, "replace": {"op": op}}] if op else []
    model = ktfx.from_pretrained(tmp_path, {**GPU, "rules": rules}, simulate="cpu", partition_backend="eager")
    compare(run_steps(model, prompt()[0], 3, static_cache(model, 12), forced=expected.tokens), expected, 1e-4)
    record = record_of(model)
    assert len(record.rewrites) == 1 and not record.misses
    copies = [e for e in ktfx.state_of(model).store.entries() if e.request is not None]
    assert {e.format for e in copies} == {"dequantised.float32:int4zp-g32"}
    planned = [p for p in plan_weights(model, ktfx.state_of(model).resolution) if p.format.startswith("dequantised.")]
    assert [(p.format, p.nbytes) for p in planned] == [(e.format, e.nbytes) for e in copies]


def test_a_projection_that_sorts_its_inputs_says_why_it_stays(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "q_lora_rank": 64, "kv_lora_rank": 64, "moe_intermediate_size": 64}
    write(tmp_path, gptq(act_order=True), "deepseek_v3", **sizes, v_head_dim=16, first_k_dense_replace=0)
    torch._dynamo.reset()
    model = ktfx.from_pretrained(tmp_path, GPU, simulate="cpu", partition_backend="eager")
    decode_once(model)
    record = record_of(model)
    assert not record.rewrites
    assert [m.why for m in record.misses] == ["absorb_mla: its projection sorts its inputs (act-order)"]


def test_a_projection_on_another_device_says_why_it_stays() -> None:
    model = tiny_model("deepseek_v3", layers=1)
    rule = {"match": {"name": "kv_b_proj$"}, "replace": {"device": "gpu1"}}
    compiled(model, {**GPU, "rules": [rule]})
    decode_once(model)
    (miss,) = record_of(model).misses
    assert "two devices" in miss.why and miss.module == "model.layers.0.self_attn"


def test_other_models_are_left_alone_and_no_pass_no_rewrite() -> None:
    model = tiny_model("qwen3_moe", layers=1)
    compiled(model)
    decode_once(model)
    assert not record_of(model).rewrites and not record_of(model).misses
    model = tiny_model("deepseek_v3", layers=1)
    compiled(model, {**GPU, "passes": ["rewrite_experts", "fuse_attention"]})
    decode_once(model)
    assert ktfx.state_of(model).graphs[-1].records[-1].ops_after[MLA] == 0


def test_the_op_refuses_other_layouts() -> None:
    q, qr, c, kr = torch.zeros(2, 4, 1, 16), torch.zeros(2, 4, 1, 8), torch.zeros(2, 1, 9, 16), torch.zeros(2, 1, 9, 8)
    op = torch.ops.ktfx.mla_decode
    torch.library.opcheck(op.default, (q, qr, c, kr, None, 0.5))
    with pytest.raises(KtfxError, match="got latent"):
        op(q, qr, c.expand(2, 4, 9, 16), kr, None, 0.5)
    with pytest.raises(KtfxError, match="mask of shape"):
        op(q, qr, c, kr, torch.ones(2, 1, 1, 8, dtype=torch.bool), 0.5)
    with pytest.raises(KtfxError, match="bounds"):
        op(q, qr, c, kr, None, 0.5, torch.zeros(2, 2, dtype=torch.int32))

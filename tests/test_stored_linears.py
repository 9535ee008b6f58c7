"""Models whose linear layers are stored in fp8 blocks (transformers' FP8Linear): traced whole, and their bits kept."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from families import tiny_model
from torch import nn

import ktfx
from ktfx.adopt import adopt, give_up
from ktfx.formats import dequantize, from_fp8_blocks, quantize
from ktfx.stored_linears import stored_format

FP8Linear = pytest.importorskip("transformers.integrations.finegrained_fp8").FP8Linear
EAGER: dict[str, Any] = {"simulate": "cpu", "partition_backend": "eager"}


def stored(linear: nn.Linear) -> nn.Module:
    """The layer as a checkpoint of transformers' fp8 format holds it."""
    N, K = linear.weight.shape
    made = FP8Linear(K, N, block_size=(128, 128), has_bias=linear.bias is not None)
    rounded = quantize(linear.weight.detach(), "fp8")
    made.weight = nn.Parameter(rounded.data, requires_grad=False)
    made.weight_scale_inv = nn.Parameter(rounded.scales, requires_grad=False)
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach().clone())
    return made.eval()


def pair(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A small model with fp8 layers, and the same with their dequantised weights as plain layers."""
    model = tiny_model("llama", dtype=dtype, layers=2, hidden_size=160, attention_bias=True)
    plain = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            parent, _, leaf = path.rpartition(".")
            made = stored(module)
            setattr(model.get_submodule(parent), leaf, made)
            exact = dequantize(from_fp8_blocks(made.weight.data, made.weight_scale_inv.data))
            plain.get_submodule(path).weight.data.copy_(exact)
    return model, plain


def rules(**replace: Any) -> dict[str, Any]:
    found: list[dict[str, Any]] = [{"match": {"module": "linear"}, "replace": replace}] if replace else []
    return {"ktfx": 1, "devices": {"gpu0": "cuda:0", "host": "cpu"}, "default_device": "gpu0", "rules": found}


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().view(torch.uint8).clone() for n, p in model.named_parameters() if p.dtype.itemsize == 1}


@pytest.mark.parametrize("op", [None, "linear.triton", "linear.aten", "linear.cpu"])
def test_runs_on_the_stored_bits(op: str | None) -> None:
    torch._dynamo.reset()
    model, plain = pair()
    ids = torch.arange(2, 9)[None]
    given = {} if op is None else {"op": op, **({"device": "host"} if op == "linear.cpu" else {})}
    before = bits(model)
    with torch.no_grad():
        want = plain(ids, use_cache=False).logits
        ktfx.compile(model, rules(**given), verify=True, **EAGER)
        got = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)
    state = ktfx.state_of(model)
    ops = state.graphs[0].records[-1].ops_after
    quantised = op in ("linear.triton", "linear.cpu")
    assert ops["ktfx.linear_quant.default" if quantised else "ktfx.stored_linear.default"] == 14
    packed = [e for e in state.store.entries() if e.request is not None]
    if op == "linear.triton":
        assert not packed, "the kernel reads the stored tensors themselves"
        held = {e.names[0]: e.tensors[0] for e in state.store.entries() if e.device == "gpu0"}
        for name, stored_bits in before.items():
            assert torch.equal(held[name].view(torch.uint8), stored_bits)
    assert all(torch.equal(b, before[n]) for n, b in bits(model).items())


def test_another_format_is_made_of_the_dequantised_weight() -> None:
    torch._dynamo.reset()
    model, plain = pair()
    ids = torch.arange(2, 9)[None]
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, nn.Linear) and module is not plain.lm_head:
                rounded = quantize(module.weight.bfloat16(), "int4", search=True)
                module.weight.copy_(dequantize(rounded))
        want = plain(ids, use_cache=False).logits
        ktfx.compile(model, rules(op="linear.triton", weights="int4"), verify=True, **EAGER)
        got = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)


def test_the_layers_own_forward_comes_back() -> None:
    model, _ = pair()
    layers = [m for m in model.modules() if stored_format(m) is not None]
    assert len(layers) == 14
    assert adopt(model) == 14 and adopt(model) == 0
    assert all("forward" in m.__dict__ for m in layers)
    give_up(model)
    assert not any("forward" in m.__dict__ for m in layers)
    ktfx.compile(model, rules(), **EAGER)
    ktfx.restore(model)
    assert not any("forward" in m.__dict__ for m in layers)
    gc.collect()


def test_what_is_not_in_blocks_is_left_alone() -> None:
    assert stored_format(nn.Linear(8, 8)) is None
    per_tensor = FP8Linear(256, 128, block_size=None)
    assert stored_format(per_tensor) is None
    other_blocks = FP8Linear(256, 256, block_size=(64, 64))
    assert stored_format(other_blocks) is None

"""Whole checkpoints that come quantised, from their files to logits: every number is the one that the files hold."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import quantised_files as files
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import ktfx
from ktfx.cli.main import app
from ktfx.errors import KtfxWarning, WeightError
from ktfx.formats import dequantize
from ktfx.ops.experts_layout import experts_layout
from ktfx.ops.stored_experts import StoredMatrices
from ktfx.stored_experts import StoredExperts
from ktfx.stored_linears import StoredLinear, stored_weight_of
from ktfx.stored_weights import dequantize_blocks, stored_weight

EAGER: dict[str, Any] = {"simulate": "cpu", "partition_backend": "eager"}
SIZES: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64, "head_dim": 16}
DEEPSEEK = {**SIZES, "kv_lora_rank": 64, "q_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16}
DEEPSEEK |= {"v_head_dim": 16, "head_dim": 16, "first_k_dense_replace": 0}
IDS = torch.arange(2, 9)[None]


def rules(linear: dict[str, Any] | None = None, experts: dict[str, Any] | None = None) -> dict[str, Any]:
    wanted = [{"match": {"module": role}, "replace": r} for role, r in (("experts", experts), ("linear", linear)) if r]
    return {"ktfx": 1, "devices": {"gpu0": "cuda:0", "host": "cpu"}, "default_device": "gpu0", "rules": wanted}


def load(directory: Path, given: Any = None, **options: Any) -> nn.Module:
    torch._dynamo.reset()
    return ktfx.from_pretrained(directory, given or rules(), **EAGER, **options)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """What a stand-in computes with, by the name of the plain module's parameter."""
    if isinstance(module, StoredLinear):
        stored = stored_weight_of(module)
        assert stored is not None
        tensors = [module.get_parameter(name) for name in stored.parts.values()]
        if not stored.format:
            return {"weight": dequantize_blocks(tensors[0], tensors[1], stored.block, torch.float32)}
        plain = dequantize(stored_weight(stored.format, (module.out_features, module.in_features), tensors))
        order = module.input_order
        return {"weight": plain if order is None else plain[:, torch.argsort(order)]}
    assert isinstance(module, StoredExperts) and module.stored_call is not None
    call, spec = module.stored_call, module.spec
    from ktfx.ops.experts import ExpertsSpec

    format = ExpertsSpec.decode(call.spec).weights.replace("model", "")
    found = {}
    for name, names, inputs, order in (
        ("gate_up_proj", call.gate_up, spec.hidden, module.input_order),
        ("down_proj", call.down, spec.intermediate, None),
    ):
        parts = [module.get_parameter(n) for n in names]
        matrices = StoredMatrices(parts, format, inputs, call.block, name == "gate_up_proj", order)
        found[name] = torch.stack([matrices[e] for e in range(spec.num_experts)])
    return found


def check_bits(model: nn.Module, plain: nn.Module, act_order: bool = False) -> int:
    """Every stand-in holds the plain model's numbers, to the bit."""
    count = 0
    for path, module in model.named_modules():
        if not isinstance(module, StoredLinear | StoredExperts):
            continue
        for name, weight in weights_of(module).items():
            want = plain.get_submodule(path).get_parameter(name)
            if act_order and isinstance(module, StoredExperts):
                continue  # rows and columns of gate and down are in another order together; the logits tell
            assert torch.equal(weight, want), f"{path}.{name}"
        count += 1
    return count


LAYOUTS = {
    "gptq": files.gptq(),
    "gptq-symmetric-64": files.gptq(64, symmetric=True),
    "gptq-v2": files.gptq(v2=True),
    "gptq-act-order": files.gptq(act_order=True),
    "awq": files.awq(),
    "compressed-tensors": files.compressed_tensors(),
    "compressed-tensors-zero-points": files.compressed_tensors(64, symmetric=False),
    "fp8-per-tensor": files.fp8(None),
    "fp8-small-blocks": files.fp8((32, 64)),
    "fp8": files.fp8(),
}


@pytest.mark.parametrize(
    ("layout", "family"),
    [
        *((name, "qwen3_moe") for name in LAYOUTS),
        *(pytest.param(name, "deepseek_v3", marks=pytest.mark.slow) for name in ("gptq-act-order", "awq")),
        ("fp8", "deepseek_v3"),
    ],
)
def test_every_bit_and_the_logits(tmp_path: Path, layout: str, family: str) -> None:
    plain = files.write(tmp_path, LAYOUTS[layout], family, **(SIZES if family == "qwen3_moe" else DEEPSEEK))
    model = ktfx.restore(load(tmp_path))
    assert check_bits(model, plain, layout == "gptq-act-order") == (5 if family == "qwen3_moe" else 9)
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-4, rtol=1e-4)
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(("inter", "block"), [(96, (128, 128)), (192, (128, 128)), (40, (32, 64))])
def test_fp8_rows_that_end_inside_a_block(tmp_path: Path, inter: int, block: tuple[int, int]) -> None:
    """Gate and up have rows of scales of their own, also where as many would do for blocks through both."""
    plain = files.write(tmp_path, files.fp8(block), **{**SIZES, "moe_intermediate_size": inter})
    model = ktfx.restore(load(tmp_path))
    check_bits(model, plain)
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-4, rtol=1e-4)
    assert "fp8 scales per" in str(experts_layout(model.model.layers[0].mlp.experts))  # type: ignore[union-attr]


def test_groups_that_do_not_go_together(tmp_path: Path) -> None:
    """One scale a row: 64 inputs of down are one group of 64, 256 of gate and up two of 128."""
    layout = files.gptq()
    files.write(tmp_path, layout, **{**SIZES, "hidden_size": 256, "moe_intermediate_size": 32})
    load(tmp_path)
    files.write(tmp_path, files.compressed_tensors(0), **{**SIZES, "hidden_size": 256})
    with pytest.raises(WeightError, match="in several formats") as caught:
        load(tmp_path)
    assert caught.value.module == "model.layers.0.mlp.experts" and caught.value.mend


@pytest.mark.parametrize(
    ("layout", "linear", "experts"),
    [
        ("gptq", None, None),
        ("gptq", "linear.triton", "experts.triton"),
        ("awq", "linear.cpu", "experts.cpu"),
        ("compressed-tensors", "linear.triton", "experts.cpu"),
    ],
)
def test_kernels_read_them(tmp_path: Path, layout: str, linear: str | None, experts: str | None) -> None:
    plain = files.write(tmp_path, LAYOUTS[layout], **SIZES)

    def wanted(op: str | None) -> dict[str, Any] | None:
        return None if op is None else {"op": op, "weights": "int4"} | ({"device": "host"} if "cpu" in op else {})

    model = load(tmp_path, rules(wanted(linear), wanted(experts)))
    got, want = logits(model), logits(plain)
    assert float((got - want).norm() / want.norm()) < 1e-3  # the host's kernels round x to 16 bits a block
    if "cpu" not in f"{linear}{experts}":
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    state = ktfx.state_of(model)
    ops = state.graphs[0].records[-1].ops_after
    names = ("ktfx.linear_quant.default", "ktfx.routed_experts.default")
    names = names if experts else ("ktfx.stored_linear.default", "ktfx.stored_experts.default")
    assert [ops[n] for n in names] == [4, 1]
    packed = {e.format for e in state.store.entries() if e.request is not None}
    kind = "int4-g32" if layout == "compressed-tensors" else "int4zp-g32"
    on_host = {f"linear.cpu:{kind}"} if linear == "linear.cpu" else set()
    assert packed == on_host | ({f"cpu:{kind}"} if experts == "experts.cpu" else set())
    assert all(not e.error for e in state.quantisation_errors())


def test_greedy_tokens_and_what_state_dict_holds(tmp_path: Path) -> None:
    plain = files.write(tmp_path, LAYOUTS["gptq"], **SIZES)
    want = plain.generate(IDS, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    host = {"device": "host"}
    model = load(tmp_path, rules({"op": "linear.triton"}, {"op": "experts.cpu", **host}))
    assert model.generate(IDS, max_new_tokens=8, do_sample=False).tolist() == want.tolist()  # type: ignore[operator]
    experts = model.model.layers[0].mlp.experts  # type: ignore[union-attr]
    assert type(experts.gate_up_proj).__name__ == "ReleasedTensor"  # packed: read again from the files if asked for
    held = model.state_dict()
    fresh = ktfx.restore(load(tmp_path)).state_dict()
    assert held.keys() == fresh.keys()
    for name, tensor in fresh.items():
        assert torch.equal(held[name], tensor), name
    prefix = "model.layers.0.mlp.experts.gate_up_proj"
    assert {n.removeprefix(prefix) for n in held if n.startswith(prefix)} == {"", "_scale", "_zeros"}
    assert held[prefix].dtype == torch.uint8 and held[f"{prefix}_scale"].dtype == torch.float16
    for plain_copy in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(plain_copy.model.layers[0].mlp.experts.gate_up_proj) is nn.Parameter
        torch.testing.assert_close(logits(plain_copy), logits(plain), atol=1e-4, rtol=1e-4)
    again = ktfx.restore(load(tmp_path))
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.load_state_dict(held)
    torch.testing.assert_close(logits(again), logits(plain), atol=1e-4, rtol=1e-4)
    with pytest.raises(WeightError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    assert model.config.quantization_config["quant_method"] == "gptq"  # type: ignore[union-attr]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["gptq", "gptq-symmetric-64", "awq", "compressed-tensors", "fp8", "gptq-act-order"])
def test_on_a_gpu(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    """Triton's kernels over the stored tensors, on the device that they were loaded to."""
    sizes = {**SIZES, "hidden_size": 128, "moe_intermediate_size": 128}
    plain = files.write(tmp_path, LAYOUTS[layout], **sizes)
    torch._dynamo.reset()
    given = rules({"op": "linear.triton"}, {"op": "experts.triton"})
    model = ktfx.from_pretrained(tmp_path, given, dtype=dtype, partition_backend="eager")
    got, want = logits(model), logits(plain)
    errors = (got.float() - want).norm(dim=-1) / want.norm(dim=-1)
    # The median token's: in 16 bits a router may choose another expert for one.
    assert float(errors.median()) < (1e-2 if dtype == torch.float32 else 5e-2)
    store = ktfx.state_of(model).store
    assert not [e for e in store.entries() if e.request is not None], "no second copy"
    q_proj = [e for e in store.entries() if e.names[0] == "model.layers.0.self_attn.q_proj.weight"]
    assert q_proj[0].tensors[0].device.type == "cuda"


def test_act_order_of_experts_runs_without_a_kernel(tmp_path: Path) -> None:
    plain = files.write(tmp_path, LAYOUTS["gptq-act-order"], **SIZES)
    model = load(tmp_path, rules({"op": "linear.triton"}, {"op": "experts.triton"}))
    with pytest.warns(KtfxWarning, match="act-order"):
        got = logits(model)
    torch.testing.assert_close(got, logits(plain), atol=1e-4, rtol=1e-4)
    ops = ktfx.state_of(model).graphs[0].records[-1].ops_after
    assert ops["ktfx.linear_quant.default"] == 4 and ops["ktfx.stored_experts.default"] == 1


@pytest.mark.parametrize("op", ["experts.triton", "experts.cpu"])
def test_gpt_oss(tmp_path: Path, op: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16}
    plain = files.write_gpt_oss(tmp_path, **sizes)
    model = load(tmp_path, rules(None, {"op": op, "weights": "mxfp4", **({"device": "host"} if "cpu" in op else {})}))
    experts = model.model.layers[0].mlp.experts  # type: ignore[union-attr]
    for name, weight in weights_of(experts).items():
        want = plain.model.layers[0].mlp.experts.get_parameter(name).transpose(1, 2)  # type: ignore[union-attr]
        if name == "gate_up_proj":
            want = torch.cat([want[:, 0::2], want[:, 1::2]], dim=1)
        assert torch.equal(weight, want)
    got, want = logits(model), logits(plain)
    assert float((got - want).norm() / want.norm()) < 1e-3
    ops = ktfx.state_of(model).graphs[0].records[-1].ops_after
    assert ops["ktfx.routed_experts.default"] == 1
    packed = {e.format for e in ktfx.state_of(model).store.entries() if e.request is not None}
    assert packed == ({"cpu:mxfp4"} if op == "experts.cpu" else set())


def test_explain_counts_what_is_stored(tmp_path: Path) -> None:
    plain = files.write(tmp_path, files.gptq(), **SIZES)
    chosen = tmp_path / "rules.json"
    chosen.write_text(json.dumps(rules({"op": "linear.triton"}, {"op": "experts.cpu"})))
    given = ["explain", str(chosen), "--model", str(tmp_path), "--json", "--errors"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert not found["warnings"]
    assert {e["format"] for e in found["quantisation_errors"]} == {"cpu:int4zp-g32"}
    assert all(e["error"] == 0 for e in found["quantisation_errors"])
    # Four bits a value, and for each of 32 a scale of 16 bits and a zero point of 8; the rest is float32, with two
    # buffers of frequencies.
    own = {n: p.numel() for n, p in plain.named_parameters() if ".experts." not in n}
    packed = sum(size // 2 + size // 32 * 3 for name, size in own.items() if "proj" in name)
    buffers = sum(b.numel() for b in plain.buffers())
    kept = sum(size for name, size in own.items() if "proj" not in name)
    assert found["devices"]["gpu0"]["bytes"] == packed + 4 * (kept + buffers)
    configure(tmp_path, bits=8)  # which cannot be loaded, only placed
    result = CliRunner().invoke(app, given[:-1])
    assert result.exit_code == 0 and "stored quantised (gptq)" in json.loads(result.stdout)["warnings"][0]
    result = CliRunner().invoke(app, given)
    said = " ".join(result.stderr.replace("│", " ").split())  # the panel breaks lines where the path's length says
    assert result.exit_code != 0 and "its weights have 8 bits" in said


def test_a_rule_may_name_the_modules_own_class(tmp_path: Path) -> None:
    files.write(tmp_path, files.gptq(), **SIZES)
    given = rules()
    given["rules"] = [
        {"match": {"class": kind}, "replace": {"op": op}}
        for kind, op in (("Qwen3MoeExperts", "experts.triton"), ("torch.nn.Linear", "linear.triton"))
    ]
    placements = ktfx.state_of(load(tmp_path, given)).resolution.placements
    assert placements["model.layers.0.mlp.experts"].at("generate").op == "experts.triton"
    assert placements["model.layers.0.self_attn.q_proj"].at("generate").op == "linear.triton"


def test_a_bias_and_layers_that_are_not_quantised(tmp_path: Path) -> None:
    plain = files.write(tmp_path, files.awq(), **SIZES, attention_bias=True)
    kept = plain.model.layers[0].self_attn.o_proj  # type: ignore[union-attr]
    replace_tensors(tmp_path, {"model.layers.0.self_attn.o_proj.weight": kept.weight.detach()}, drop=r"o_proj.q")
    model = ktfx.restore(load(tmp_path))
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear  # type: ignore[union-attr]
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-4, rtol=1e-4)


def test_a_bias_that_the_model_has_not(tmp_path: Path) -> None:
    plain = files.write(tmp_path, files.gptq(), **SIZES)
    names = ("model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.experts.2.up_proj.bias")
    replace_tensors(tmp_path, {name: torch.zeros(64) for name in names})
    torch.testing.assert_close(logits(ktfx.restore(load(tmp_path))), logits(plain), atol=1e-4, rtol=1e-4)
    for name in names:
        replace_tensors_again(tmp_path, {n: torch.full((64,), float(n == name)) for n in names})
        with pytest.raises(WeightError, match="has no bias") as caught:
            load(tmp_path)
        assert caught.value.module == name.removesuffix(".bias") and name in str(caught.value)


def replace_tensors(directory: Path, new: dict[str, torch.Tensor], drop: str = "(?!)") -> None:
    """Put tensors into a checkpoint, and leave out those whose name holds ``drop``."""
    held: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        held |= load_file(file)
        file.unlink()
    (directory / "model.safetensors.index.json").unlink()
    held = {n: t for n, t in (held | new).items() if drop not in n}
    save_file(held, directory / "model.safetensors", metadata={"format": "pt"})


def configure(directory: Path, **entries: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= entries
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("layout", "entries", "message"),
    [
        (files.gptq(), {"bits": 8}, "its weights have 8 bits"),
        (files.gptq(), {"checkpoint_format": "marlin"}, "its checkpoint_format is 'marlin'"),
        (files.awq(), {"version": "gemv"}, "its version is 'gemv'"),
        (files.awq(), {"quant_method": "vptq"}, "its quant_method is 'vptq'"),
        (files.compressed_tensors(), {"format": "float-quantized"}, "is 'float-quantized'"),
        (files.compressed_tensors(), {"config_groups": {}}, "no config_groups"),
        (files.fp8(), {"weight_block_size": [128]}, "weight_block_size"),
        (files.fp8(), {"quant_method": "gptq", "bits": 4}, "no weight of the model is stored so"),
    ],
)
def test_what_is_not_read(tmp_path: Path, layout: files.Layout, entries: dict[str, Any], message: str) -> None:
    files.write(tmp_path, layout, **SIZES)
    configure(tmp_path, **entries)
    with pytest.raises(WeightError, match=message) as caught:
        load(tmp_path)
    assert caught.value.expected and caught.value.mend and str(tmp_path) in str(caught.value)


def test_malformed_checkpoints(tmp_path: Path) -> None:
    files.write(tmp_path, files.gptq(), **SIZES)
    q_proj = "model.layers.0.self_attn.q_proj"
    replace_tensors(tmp_path, {f"{q_proj}.qweight": torch.zeros(8, 60, dtype=torch.int32)})
    with pytest.raises(WeightError, match=r"model.safetensors: .*do not fit together") as caught:
        load(tmp_path)
    assert caught.value.module == q_proj and caught.value.expected and caught.value.mend
    stored, _ = files.gptq().store(32, 64, torch.Generator().manual_seed(0))
    replace_tensors_again(tmp_path, {f"{q_proj}.{leaf}": t for leaf, t in stored.items()})
    with pytest.raises(WeightError, match=r"is a weight \(32, 64\)") as caught:
        load(tmp_path)
    assert caught.value.expected == "(64, 64), as config.json makes the model"
    replace_tensors_again(tmp_path, {}, drop="q_proj.scales")
    with pytest.raises(WeightError, match=r"no file holds .*q_proj.scales"):
        load(tmp_path)


def replace_tensors_again(directory: Path, new: dict[str, torch.Tensor], drop: str = "(?!)") -> None:
    held = load_file(directory / "model.safetensors") | new
    kept = {n: t for n, t in held.items() if drop not in n}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


def test_experts_that_are_not_whole(tmp_path: Path) -> None:
    files.write(tmp_path, files.gptq(), **SIZES)
    replace_tensors(tmp_path, {}, drop="experts.3.up_proj")
    with pytest.raises(WeightError, match="not the up weight of expert 3") as caught:
        load(tmp_path)
    assert caught.value.module == "model.layers.0.mlp.experts"


def test_a_weight_that_is_nowhere(tmp_path: Path) -> None:
    files.write(tmp_path, files.gptq(), **SIZES)
    replace_tensors(tmp_path, {}, drop="o_proj")
    with pytest.raises(WeightError, match=r"lacks 1 weights of the model: model.layers.0.self_attn.o_proj.weight"):
        load(tmp_path)
    stray = {f"model.layers.7.self_attn.q_proj.{leaf}": t for leaf, t in stray_layer().items()}
    files.write(tmp_path, files.gptq(), **SIZES)
    replace_tensors(tmp_path, stray)
    with pytest.warns(KtfxWarning, match="1 quantised weights belong to no module"):
        load(tmp_path)


def stray_layer() -> dict[str, torch.Tensor]:
    return files.gptq().store(64, 64, torch.Generator().manual_seed(0))[0]

"""rewrite_linears: ops before and after, what is left alone and why, and the numbers against dequantised weights."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from families import tiny_model
from parity import DEVICES, compare, run_steps, static_cache
from pass_runs import PassRun, run_passes
from torch import nn

import ktfx
from ktfx.budget import plan_weights
from ktfx.debug.runtime import load_inputs, load_program, make_inputs
from ktfx.debug.session import Setup
from ktfx.debug.session import run as debug_run
from ktfx.debug.trace_dir import read_traces
from ktfx.debug.tracing import write_session
from ktfx.errors import KtfxWarning, PlacementError
from ktfx.lint import lint
from ktfx.ops import load_ops
from ktfx.ops.linear import LinearSpec, linear_kernel
from ktfx.placed_tensor import PlacedTensor
from ktfx.resolve import resolve
from ktfx.ruleset import load_ruleset
from ktfx.weight_requests import LinearRequest, request_of

EAGER: dict[str, Any] = {"simulate": "cpu", "partition_backend": "eager"}
CPU = torch.device("cpu")
GPU = {"devices": {"gpu0": "cuda:0", "host": "cpu"}, "default_device": "gpu0"}
FORMATS = ["int8", "int4", "int4-g32", "int4-g128", "int4zp", "fp8", "mxfp4"]


def rule(match: dict[str, Any], **replace: Any) -> dict[str, Any]:
    return {"match": match, "replace": replace}


class Block(nn.Module):
    """Three layers: one with a bias, one called as a function, one without."""

    def __init__(self, width: int = 64, inner: int = 96) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(width, inner)
        self.gate = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(F.linear(x, self.gate.weight)) * self.up(x))


def run(model: nn.Module, *rules: dict[str, Any], **more: Any) -> PassRun:
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    return run_passes(model, {**GPU, "rules": list(rules)}, x, passes=("resolve_rules", "rewrite_linears"), **more)


def rounded(weight: torch.Tensor, kernel: str, weights: str) -> torch.Tensor:
    """The weight that a kernel computes with."""
    load_ops()
    spec = LinearSpec(weight.shape[1], weight.shape[0], weights)
    chosen = linear_kernel(kernel)
    return chosen.dequantised(spec, chosen.pack(spec, weight.detach(), CPU)).to(weight.dtype)


def with_rounded_weights(model: nn.Module, kernel: str, weights: str, but: tuple[str, ...] = ()) -> nn.Module:
    """A copy whose linear layers hold the dequantised weights, as plain floats."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for path, module in other.named_modules():
            if isinstance(module, nn.Linear) and not path.endswith(but or ("\0",)):
                module.weight.copy_(rounded(module.weight, kernel, weights))
    return other


# ---- the graph


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("op", ["linear.triton", "linear.aten"])
def test_ops_and_values(op: str, weights: str) -> None:
    model = Block()
    done = run(model, rule({"module": "linear"}, op=op, weights=weights))
    assert done.ops_before["aten.linear.default"] == 3
    assert done.ops["aten.linear.default"] == 0 and done.ops["ktfx.linear_quant.default"] == 3
    assert sorted(r.module for r in done.context.rewrites if r.after) == ["down", "gate", "up"]
    assert not done.context.misses and not done.context.warnings
    with torch.no_grad():
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
        want = with_rounded_weights(model, "reference", weights)(x)
    torch.testing.assert_close(done.out, want, atol=1e-5, rtol=1e-5)
    assert float((done.out - done.expected).norm() / done.expected.norm()) > 1e-4, "nothing was rounded"


def test_a_record_names_module_rule_and_nodes() -> None:
    done = run(Block(), rule({"name": "^up$"}, op="linear.triton", weights="int8"))
    (made,) = [r for r in done.context.rewrites if r.after]
    assert (made.module, made.rule, made.before) == ("up", "rule 1", ("aten.linear.default",))
    assert made.what == "torch.nn.modules.linear.Linear → linear.triton (int8)"
    node = done.node(made.nodes_after[0])
    assert node.args[2] is not None, "the bias goes along"
    (weight,) = {w.request for w in done.context.packed.values()}
    assert weight == LinearRequest("linear.triton", LinearSpec(64, 96, "int8"), (("weight", "up.weight"),))
    assert request_of(weight.kernel, weight.spec_text, weight.parts) == weight


@pytest.mark.parametrize("rules", [[], [rule({"module": "linear"}, op="linear.aten")]])
def test_without_a_format_nothing_changes(rules: list[dict[str, Any]]) -> None:
    done = run(Block(), *rules)
    assert done.ops == done.ops_before and not done.context.packed


def test_a_kernel_over_the_models_own_format_reads_the_parameter_itself() -> None:
    done = run(Block(), rule({"module": "linear"}, op="linear.triton"))
    assert done.ops["ktfx.linear_quant.default"] == 3 and not done.context.packed
    torch.testing.assert_close(done.out, done.expected)


class Spelled(nn.Module):
    """The same product in the spellings that models use."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(64, 32)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, b, flat = self.proj.weight, self.proj.bias, x.reshape(-1, 64)
        match self.how:
            case "linear":
                return F.linear(x, w, bias=b)
            case "T":
                return x @ w.T
            case "transpose":
                return torch.matmul(x, w.transpose(-1, -2))
            case "permute":
                return torch.mm(flat, w.permute(1, 0))
            case "addmm":
                return torch.addmm(b, flat, w.t())
            case "scaled":
                return torch.addmm(b, flat, w.t(), alpha=2)
            case _:
                return torch.mm(flat, w.t()) + x.reshape(-1, 64) @ w.t()


@pytest.mark.parametrize("how", ["linear", "T", "transpose", "permute", "addmm", "twice"])
def test_every_spelling(how: str) -> None:
    done = run(Spelled(how), rule({"module": "linear"}, op="linear.triton", weights="fp8"))
    count = 2 if how == "twice" else 1
    assert done.ops["ktfx.linear_quant.default"] == count and len(done.context.packed) == 2, "packed once"
    products = ("aten.linear.default", "aten.matmul.default", "aten.mm.default", "aten.addmm.default")
    assert not any(done.ops[p] for p in products)
    error = (done.out - done.expected).norm() / done.expected.norm()
    assert 1e-4 < error < 0.05


def test_a_product_that_is_none_of_a_linear_layer_stays() -> None:
    done = run(Spelled("scaled"), rule({"module": "linear"}, op="linear.triton", weights="fp8"))
    assert done.ops["aten.addmm.default"] == 1 and not done.ops["ktfx.linear_quant.default"]
    assert done.context.misses


def test_a_layer_that_does_not_run_is_a_miss() -> None:
    class Unused(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x)

    done = run(Unused(), rule({"name": "^(up|down)$"}, op="linear.triton", weights="int4"))
    assert [m.module for m in done.context.misses] == ["down"]
    assert "this graph does not run it" in done.context.misses[0].why


def test_sizes_that_are_no_multiple_of_a_group() -> None:
    for weights in FORMATS:
        model = nn.Sequential(nn.Linear(50, 33))
        x = torch.randn(3, 50)
        rules = {**GPU, "rules": [rule({"name": "^0$"}, op="linear.triton", weights=weights)]}
        done = run_passes(model, rules, x, passes=("resolve_rules", "rewrite_linears"))
        with torch.no_grad():
            want = F.linear(x, rounded(model[0].weight, "reference", weights), model[0].bias)
        torch.testing.assert_close(done.out, want, atol=1e-5, rtol=1e-5)


# ---- what cannot be


def test_triton_on_the_host() -> None:
    """Named: an error. By role, or with a fallback: the model's own operation, a warning and a miss."""
    replace = {"op": "linear.triton", "weights": "int4", "device": "host"}
    with pytest.raises(PlacementError, match=r"rule 1, module 'up': .*host is the host.*linear.cpu") as error:
        run(Block(), rule({"name": "^up$"}, **replace))
    assert "fallback: aten" in str(error.value)
    for rules in (rule({"module": "linear"}, **replace), rule({"name": "."}, fallback="aten", **replace)):
        done = run(Block(), rules)
        assert done.ops["aten.linear.default"] == 3
        assert len(done.context.warnings) == len(done.context.misses) == 3
        assert "up: linear.triton (int4) → linear.aten on host" in "\n".join(done.context.warnings)
        torch.testing.assert_close(done.out, done.expected)


def test_a_weight_dtype_that_the_kernel_does_not_take() -> None:
    model = nn.Sequential(nn.Linear(64, 32)).double()
    rules = {**GPU, "rules": [rule({"name": "^0$"}, op="linear.triton", weights="int4")]}
    with pytest.raises(PlacementError, match="float64"):
        run_passes(model, rules, torch.randn(3, 64).double(), passes=("resolve_rules", "rewrite_linears"))


def test_lint_says_so_beforehand() -> None:
    load_ops()
    file = {"ktfx": 1, **GPU, "rules": [rule({"name": "^up$"}, op="linear.triton", device="host", weights="int4")]}
    (found,) = [f for f in lint(file, Block()) if f.code == "layout"]
    assert found.severity == "error" and "linear.cpu" in found.message and found.module == "up"


def test_passes_that_leave_it_out_are_a_warning() -> None:
    rules = {"ktfx": 1, **GPU, "passes": ["rewrite_experts"]}
    rules["rules"] = [rule({"module": "linear"}, op="linear.triton", weights="int4")]
    with pytest.warns(
        KtfxWarning, match="linear.triton has no effect but its device: `passes:` leaves out rewrite_lin"
    ):
        ktfx.compile(Block().eval(), rules, **EAGER)


# ---- what a rule means


def test_a_format_without_an_op_means_the_devices_kernel() -> None:
    rules = [rule({"name": "^up$"}, weights="int4"), rule({"name": "."}, weights="int8", device="host")]
    placed = resolve(load_ruleset({"ktfx": 1, **GPU, "rules": rules}), Block()).placements
    assert (placed["up"].generate.op, placed["down"].prefill.op) == ("linear.triton", "linear.cpu")


def test_a_format_where_it_means_nothing_is_noted() -> None:
    rules = [rule({"module": "norm"}, weights="int4")]
    notes = resolve(load_ruleset({"ktfx": 1, **GPU, "rules": rules}), tiny_model("llama")).notes
    assert notes[0].code == "inert" and "weights: int4 has no effect on 'model.layers.0.input_layernorm'" in str(
        notes[0]
    )


def test_explain_counts_the_bytes_it_really_takes() -> None:
    load_ops()
    model = Block()
    rules = [rule({"name": "^(up|down)$"}, op="linear.triton", weights="int4")]
    resolution = resolve(load_ruleset({"ktfx": 1, **GPU, "rules": rules}), model)
    plans = {p.name: p for p in plan_weights(model, resolution)}
    assert plans["up.weight"].format == "linear.triton:int4"
    assert plans["up.weight"].nbytes == 96 * 64 // 2 + 96 * 4  # half a byte each, one float32 scale a row of 64
    assert (plans["up.bias"].nbytes, plans["gate.weight"].nbytes) == (96 * 4, 96 * 64 * 4)
    ktfx.compile(model.eval(), {"ktfx": 1, **GPU, "rules": rules}, **EAGER)
    with torch.no_grad():
        model(torch.randn(1, 4, 64))
    packed = {e.names[0]: e.nbytes for e in ktfx.state_of(model).store.entries() if e.request is not None}
    assert packed == {n: plans[n].nbytes for n in ("up.weight", "down.weight")}


# ---- whole models


def linears(op: str, weights: str, **more: Any) -> dict[str, Any]:
    """Two GPUs, a layer each, every linear layer and the head by a kernel."""
    return {
        "ktfx": 1,
        "devices": DEVICES,
        "default_device": "gpu0",
        "layers": {"0": "gpu0", "1": "gpu1"},
        "rules": [rule({"module": role}, op=op, weights=weights, **more) for role in ("linear", "head")],
    }


class Layers(nn.Module):
    """A stack that is quick to trace."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def check(model: nn.Module, rules: dict[str, Any], kernel: str, weights: str, steps: int = 3, **options: Any) -> Any:
    """Logits of every step and the cache, against the eager model over dequantised weights."""
    torch._dynamo.reset()
    ids = torch.randint(2, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    other = with_rounded_weights(model, kernel, weights)
    want = run_steps(other, ids, steps, static_cache(other, 20))
    ktfx.compile(model, rules, **{**EAGER, **options})
    got = run_steps(model, ids, steps, static_cache(model, 20), forced=want.tokens)
    state = ktfx.state_of(model)
    compare(got, want, 2e-4)
    ktfx.restore(model)
    return state


QUICK = [("qwen3_moe", "int4"), ("deepseek_v2", "fp8"), ("gpt_oss", "int8")]
ALL = [(f, w) for f in ("qwen3_moe", "deepseek_v2", "gpt_oss") for w in ("int4", "int8", "fp8")]


@pytest.mark.parametrize(
    ("family", "weights"), [*QUICK, *(pytest.param(*c, marks=pytest.mark.slow) for c in ALL if c not in QUICK)]
)
def test_families_against_dequantised_weights(family: str, weights: str) -> None:
    model = tiny_model(family, layers=2)
    state = check(model, linears("linear.triton", weights), "triton", weights)
    layers = sum(isinstance(m, nn.Linear) for m in model.modules())
    assert {g.phase for g in state.graphs} == {"prefill", "generate"}
    for graph in state.graphs:
        (record,) = [r for r in graph.records if r.name == "rewrite_linears"]
        assert len(record.rewrites) == layers and not record.misses
        assert record.ops_after["ktfx.linear_quant.default"] == layers
        assert graph.built.written_back == 0
    packed = [e for e in state.store.entries() if e.request is not None]
    own = [e for e in packed if not e.format.startswith("dequantised.")]  # kv_b_proj's, which absorb_mla takes apart
    assert len(own) == layers, "prefill and decode share one copy"
    assert len(packed) - len(own) == (2 if family.startswith("deepseek") else 0)
    assert {e.device for e in packed} == {"gpu0", "gpu1"}


@pytest.mark.parametrize("family", [pytest.param("qwen3_moe", marks=pytest.mark.slow), "gpt_oss"])
def test_on_the_host_by_its_own_kernel(family: str) -> None:
    model = tiny_model(family, layers=2)
    state = check(model, linears("linear.cpu", "int4", device="host"), "cpu", "int4")
    assert {e.device for e in state.store.entries() if e.request is not None} == {"host"}


@pytest.mark.parametrize("op", [pytest.param("linear.triton", marks=pytest.mark.slow), "linear.cpu"])
def test_inductor_takes_the_op(op: str) -> None:
    torch._dynamo.reset()
    model = Block().eval()
    host = {"device": "host"} if op == "linear.cpu" else {}
    rules = {"ktfx": 1, **GPU, "rules": [rule({"module": "linear"}, op=op, weights="int8", **host)]}
    with torch.no_grad():
        for rows in (1, 5, 9):
            x = torch.randn(2, rows, 64)
            want = with_rounded_weights(model, "reference", "int8")(x)
            ktfx.compile(model, rules, simulate="cpu")
            torch.testing.assert_close(model(x), want, atol=1e-4, rtol=1e-4)
            ktfx.restore(model)


@pytest.mark.parametrize("op", ["linear.triton", "linear.cpu"])
def test_verify(op: str) -> None:
    """Each pass's graph against the one before: the kernels' weights stand in for the model's."""
    host = {"device": "host"} if op == "linear.cpu" else {}
    torch._dynamo.reset()
    model = Layers(2).eval()
    rules = {"ktfx": 1, **GPU, "rules": [rule({"module": "linear"}, op=op, weights="int4", **host)]}
    ktfx.compile(model, rules, verify=True, **EAGER)
    with torch.no_grad():
        for length in (5, 1):
            model(torch.randn(2, length, 64))


def test_verify_finds_a_kernel_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = linear_kernel("triton")
    broken = copy.copy(kernel)
    object.__setattr__(broken, "forward", lambda *args: kernel.forward(*args) * 1.01)
    monkeypatch.setitem(ktfx.ops.linear._KERNELS, "triton", broken)
    model = Block().eval()
    rules = {"ktfx": 1, **GPU, "rules": [rule({"name": "^up$"}, op="linear.triton", weights="int4")]}
    ktfx.compile(model, rules, verify=True, **EAGER)
    with torch.no_grad(), pytest.raises(ktfx.KtfxError, match="rewrite_linears"):
        model(torch.randn(2, 4, 64))


@pytest.mark.parametrize("verify", [False, True])
def test_a_tied_head_is_rounded_and_the_embedding_is_not(verify: bool) -> None:
    torch._dynamo.reset()
    model = tiny_model("llama", layers=1, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rules = {"ktfx": 1, "devices": DEVICES, "default_device": "gpu0"}
    rules["rules"] = [rule({"module": "head"}, op="linear.triton", weights="int4", device="gpu1")]
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        hidden = model.model(ids, use_cache=False).last_hidden_state
        want = F.linear(hidden, rounded(model.lm_head.weight, "triton", "int4"))
        ktfx.compile(model, rules, verify=verify, **EAGER)
        got = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    state = ktfx.state_of(model)
    held = {(e.format, e.device) for e in state.store.entries() if "embed_tokens" in e.names[0]}
    assert held == {("model", "gpu0"), ("linear.triton:int4", "gpu1")}
    (record,) = [r for r in state.graphs[0].records if r.name == "rewrite_linears"]
    assert "also read by aten.embedding" in record.misses[0].why


def test_phases_may_differ() -> None:
    """Prefill by the model's own arithmetic, decode by int4: two copies, each graph its own."""
    torch._dynamo.reset()
    model = tiny_model("llama", layers=1)
    rules = {"ktfx": 1, "devices": DEVICES, "default_device": "gpu0"}
    decode = {"op": "linear.triton", "weights": "int4"}
    rules["rules"] = [rule({"module": "linear"}, prefill={"op": "linear.aten"}, generate=decode)]
    ktfx.compile(model, rules, **EAGER)
    run_steps(model, torch.arange(2, 9)[None], 2, static_cache(model, 16))
    counts = {
        g.phase: sum(r.ops_after["ktfx.linear_quant.default"] for r in g.records if r.name == "rewrite_linears")
        for g in ktfx.state_of(model).graphs
    }
    assert counts == {"prefill": 0, "generate": 7}


def test_equal_layers_are_compiled_once() -> None:
    torch._dynamo.reset()
    rules = {"ktfx": 1, "devices": DEVICES, "default_device": "gpu0"}
    rules["rules"] = [rule({"module": "linear"}, op="linear.triton", weights="int4")]
    distinct = []
    for layers in (3, 6):
        model = Layers(layers).eval()
        ktfx.compile(model, rules, **EAGER)
        with torch.no_grad():
            model(torch.randn(2, 5, 64))
        built = ktfx.state_of(model).graphs[0].built
        distinct.append(len(built.distinct))
        assert len(built.units) >= layers
    assert distinct[0] == distinct[1]


def test_merge_linears_leaves_them_alone() -> None:
    torch._dynamo.reset()
    model = tiny_model("llama", layers=1)
    rules = linears("linear.triton", "int8")
    rules["layers"] = {"0": "gpu0"}
    rules["rules"][0]["match"] = {"name": "self_attn\\.[kv]_proj$"}
    ids = torch.arange(2, 9)[None]
    for order in (["merge_linears", "rewrite_linears"], ["rewrite_linears", "merge_linears"]):
        ktfx.compile(model, {**rules, "passes": order}, verify=True, **EAGER)
        with torch.no_grad():
            model(ids, use_cache=False)
        ops = ktfx.state_of(model).graphs[0].records[-1].ops_after
        assert ops["ktfx.linear_quant.default"] == 3, "k, v, and the head"
        assert ops["aten.linear.default"] == 4, "q, o, down, and gate and up in one"
        ktfx.restore(model)


def test_a_changed_parameter_reaches_the_packed_copy() -> None:
    torch._dynamo.reset()
    model, x = Block().eval(), torch.randn(1, 4, 64)
    rules = {"ktfx": 1, **GPU, "rules": [rule({"module": "linear"}, op="linear.triton", weights="int8")]}
    with torch.no_grad():
        ktfx.compile(model, rules, **EAGER)
        before = model(x)
        model.down.weight.mul_(2.0)
        torch.testing.assert_close(model(x), 2 * before, atol=1e-4, rtol=1e-4)


def test_released_weights() -> None:
    """The host's memory of moved weights is given back; the numbers and the state_dict stay."""
    model = tiny_model("llama", layers=2)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    torch._dynamo.reset()
    ids = torch.arange(2, 9)[None]
    with torch.no_grad():
        want = with_rounded_weights(model, "triton", "int4")(ids, use_cache=False).logits
        ktfx.compile(model, linears("linear.triton", "int4"), release_host=True, **EAGER)
        got = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    # What is packed has no second place on the GPU: its own numbers stay on the host, the norms' move.
    assert not isinstance(model.model.layers[0].mlp.up_proj.weight, PlacedTensor)
    assert isinstance(model.model.layers[0].input_layernorm.weight, PlacedTensor)
    formats = {n: e.format for e in ktfx.state_of(model).store.entries() for n in e.names if e.device != "host"}
    assert formats["model.layers.0.mlp.up_proj.weight"] == "linear.triton:int4"


def test_a_dumped_graph_packs_and_runs_again(tmp_path: Path) -> None:
    torch._dynamo.reset()
    file = tmp_path / "rules.yaml"
    rules = linears("linear.triton", "int4")
    file.write_text(yaml.safe_dump({**rules, "layers": {0: "gpu0"}}))
    model = tiny_model("llama", layers=1)
    session = debug_run(Setup(rules=str(file), simulate="cpu", phase="prefill", tokens=5), model)
    write_session(session, tmp_path / "trace", save_inputs=True)
    (trace,) = read_traces(tmp_path / "trace")
    forward, declared = load_program(trace.passes[-1].folder / "after.py")
    with torch.no_grad():
        logits = list(forward(*make_inputs(declared, load_inputs(trace.folder / "inputs.pt"))))[-1]
    assert "linear.triton" in (trace.passes[-1].folder / "after.py").read_text()
    torch.testing.assert_close(logits[:, -1], session.outputs.logits[0], atol=1e-4, rtol=1e-4)


# ---- KTransformers files


KT_RULES = [
    {
        "match": {"name": r"^lm_head$", "class": "torch.nn.Linear"},
        "replace": {
            "class": "ktransformers.operators.linear.KTransformersLinear",
            "kwargs": {"generate_device": "cuda:0", "generate_op": "KLinearQ8", "prefill_op": "KLinearTorch"},
        },
    },
    {
        "match": {"name": r"^model\.layers\.(?!.*self_attn\.kv_b_proj).*$", "class": "torch.nn.Linear"},
        "replace": {
            "class": "ktransformers.operators.linear.KTransformersLinear",
            "kwargs": {
                "generate_device": "cuda:0",
                "prefill_device": "cuda:0",
                "generate_op": "KLinearMarlin",
                "prefill_op": "KLinearMarlin",
            },
        },
    },
]


def test_a_ktransformers_file_runs_its_linear_operators() -> None:
    torch._dynamo.reset()
    weights = "int4"
    rules = copy.deepcopy(KT_RULES)
    model = tiny_model("deepseek_v2", layers=2)
    other = with_rounded_weights(model, "triton", weights, but=("kv_b_proj", "lm_head"))
    ids = torch.arange(2, 9)[None]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", KtfxWarning)
        want = other(ids, use_cache=False).logits
        ktfx.compile(model, rules, **EAGER)
        got = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
    (record,) = [r for r in ktfx.state_of(model).graphs[0].records if r.name == "rewrite_linears"]
    linear_layers = [p for p, m in model.named_modules() if isinstance(m, nn.Linear)]
    kept = [p for p in linear_layers if p.endswith(("kv_b_proj", "lm_head"))]
    assert len(record.rewrites) == len(linear_layers) - len(kept) and kept
    assert {r.what.partition("→ ")[2] for r in record.rewrites} == {f"linear.triton ({weights})"}


@pytest.mark.parametrize(
    ("operator", "weights"), [("VLinearMarlin", "int4"), ("KLinearFP8", "fp8"), ("KLinearQ8", "int8")]
)
def test_the_other_operators(operator: str, weights: str) -> None:
    rules = copy.deepcopy(KT_RULES[1:])
    rules[0]["match"]["name"] = "^up$"
    rules[0]["replace"]["kwargs"] |= {"generate_op": operator, "prefill_op": operator}
    x = torch.randn(2, 5, 64)
    done = run_passes(Block(), load_ruleset(rules), x, passes=("resolve_rules", "rewrite_linears"))
    assert [r.what.partition("→ ")[2] for r in done.context.rewrites if r.after] == [f"linear.triton ({weights})"]


def test_klinear_cpuinfer_is_linear_cpu() -> None:
    torch._dynamo.reset()
    rules = copy.deepcopy(KT_RULES[1:])
    cpu = {"generate_device": "cpu", "generate_op": "KLinearCPUInfer", "prefill_device": "cuda:0"}
    rules[0]["replace"]["kwargs"] = cpu | {"prefill_op": "KLinearTorch"}
    model = tiny_model("llama", layers=1)
    want = run_steps(model, torch.arange(2, 9)[None], 3, static_cache(model, 16))
    ktfx.compile(model, rules, **EAGER)
    got = run_steps(model, torch.arange(2, 9)[None], 3, static_cache(model, 16))
    compare(got, want, 1e-4)
    by_phase = {g.phase: next(r for r in g.records if r.name == "rewrite_linears") for g in ktfx.state_of(model).graphs}
    assert len(by_phase["generate"].rewrites) == 7 and not by_phase["prefill"].rewrites


# ---- a real GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("weights", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_real_gpu(weights: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model = tiny_model("qwen3_moe", layers=2, dtype=dtype)
    ids = torch.randint(2, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    rules = {"ktfx": 1, "devices": {"gpu0": "cuda:0", "host": "cpu"}, "default_device": "gpu0"}
    rules["rules"] = [rule({"module": r}, op="linear.triton", weights=weights) for r in ("linear", "head")]
    other = with_rounded_weights(model, "triton", weights)
    want = run_steps(other, ids, 6, static_cache(other, 20))
    ktfx.compile(model, rules, partition_backend="inductor")
    got = run_steps(model, ids, 6, static_cache(model, 20), forced=want.tokens)
    compare(got, want, 2e-3 if dtype == torch.float32 else 5e-2)

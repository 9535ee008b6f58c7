"""The ways in: torch.compile by name, ktfx.compile, every cache, and what a caller may do to a compiled model."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from families import hand_written, tiny_model
from parity import DEVICES, FLOAT32_TOLERANCE, check_parity, compare, run_steps, static_cache, two_gpus_host
from torch import nn

import ktfx
from ktfx.errors import CaptureError, KtfxError, KtfxWarning, OptionError, PlacementError, VerifyError
from ktfx.placed_tensor import PlacedTensor
from ktfx.verify import relative_error

RULES = two_gpus_host(2)
HEAD_ON_GPU1 = {"match": {"module": "head"}, "replace": {"device": "gpu1"}}
# Two GPUs and the host with a single layer, for tests that compile many graphs.
ONE_LAYER = {**RULES, "layers": {0: "gpu0"}, "rules": [*RULES["rules"], HEAD_ON_GPU1]}
EAGER = {"simulate": "cpu", "partition_backend": "eager"}


@pytest.fixture
def model():
    torch._dynamo.reset()
    return tiny_model("qwen3_moe", layers=2)


@pytest.fixture(scope="module")
def generating():
    """A model and its compiled twin, for all tests that do no more than generate: the graphs are made once."""
    torch._dynamo.reset()
    return tiny_model("qwen3_moe", layers=2), compiled(tiny_model("qwen3_moe", layers=2))


def ids(length: int = 7, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 90, (batch, length), generator=torch.Generator().manual_seed(seed))


def compiled(model: nn.Module, **options):
    return ktfx.compile(model, RULES, **{**EAGER, **options})


def test_torch_compile_by_name_without_importing_ktfx():
    """The entry point is found after installation; no options: the shipped rules for the machine."""
    script = """
import sys, torch
sys.path.insert(0, "tests")
from families import hand_written
model = hand_written()
assert "ktfx" not in sys.modules
fast = torch.compile(model, backend="ktfx", options={"partition_backend": "eager"})
ids = torch.arange(5)[None]
with torch.no_grad():
    want, got = model(ids), fast(ids)
assert torch.allclose(got, want, rtol=1e-4, atol=1e-5), (got - want).abs().max()
import ktfx
assert ktfx.state_of(model).ruleset.origin.file.endswith("generic-host.yaml") or torch.cuda.is_available()
print("fine")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "fine" in done.stdout, done.stderr[-2000:]


def test_torch_compile_route_with_plain_parameters(model):
    """Plain torch.compile leaves the parameters alone; caches on the logical device are written back."""
    fast = torch.compile(model, backend="ktfx", options={"rules": RULES, **EAGER})
    cache, reference = static_cache(model, 16), static_cache(model, 16)
    want = run_steps(model, ids(), 3, reference)
    got = run_steps(fast, ids(), 3, cache, forced=want.tokens)
    compare(got, want, FLOAT32_TOLERANCE)
    assert not any(isinstance(p, PlacedTensor) for p in model.parameters())


def test_generate_prefill_and_decode_compile_and_tokens_are_equal(generating):
    eager, fast = generating
    want = eager.generate(ids(), max_new_tokens=10, do_sample=False)
    assert torch.equal(fast.generate(ids(), max_new_tokens=10, do_sample=False), want)
    assert {g.phase for g in ktfx.state_of(fast).graphs} == {"prefill", "generate"}


def test_sampling_gives_the_same_tokens_under_the_same_seed(generating):
    eager, fast = generating
    torch.manual_seed(3)
    want = eager.generate(ids(), max_new_tokens=10, do_sample=True, top_k=20)
    torch.manual_seed(3)
    assert torch.equal(fast.generate(ids(), max_new_tokens=10, do_sample=True, top_k=20), want)


def test_one_physical_copy_for_prefill_and_decode(generating):
    _, fast = generating
    fast.generate(ids(), max_new_tokens=10, do_sample=False)
    store = ktfx.state_of(fast).store
    total = sum(e.nbytes for e in store.entries() if e.format == "model")
    unique = sum(p.numel() * p.element_size() for p in {id(p): p for p in fast.parameters()}.values())
    buffers = sum(b.numel() * b.element_size() for b in fast.buffers())
    assert unique <= total <= unique + 2 * buffers
    assert store.duplicates() == []


def test_second_conversation_and_other_lengths(model):
    prompts = [ids(n, seed=n) for n in (5, 9, 13, 21)]
    want = [model.generate(p, max_new_tokens=5, do_sample=False) for p in prompts]
    compiled(model)
    got = [model.generate(p, max_new_tokens=5, do_sample=False) for p in prompts]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(ktfx.state_of(model).graphs) <= 5, "lengths after the second must not compile again"


def test_beam_search(model):
    want = model.generate(ids(), max_new_tokens=6, num_beams=3, do_sample=False)
    compiled(model)
    assert torch.equal(model.generate(ids(), max_new_tokens=6, num_beams=3, do_sample=False), want)


def test_batch_with_left_padding(model):
    tokens = ids(8, batch=3)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    mask[1, :1] = 0
    tokens[mask == 0] = 0
    want = model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False)
    compiled(model)
    assert torch.equal(model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False), want)


def test_cache_reset_and_reuse(model):
    want = run_steps(model, ids(), 4, static_cache(model, 16))
    compiled(model)
    cache = static_cache(model, 16)
    run_steps(model, ids(seed=9), 4, cache)
    cache.reset()
    compare(run_steps(model, ids(), 4, cache, forced=want.tokens), want, FLOAT32_TOLERANCE)


def test_dynamic_cache(model):
    from transformers import DynamicCache

    want = run_steps(model, ids(), 4, DynamicCache(config=model.config))
    compiled(model)
    got = run_steps(model, ids(), 4, DynamicCache(config=model.config), forced=want.tokens)
    compare(got, want, FLOAT32_TOLERANCE)


def test_user_made_initialised_static_cache_is_placed(model):
    def make():
        cache = static_cache(model, 16)
        cache.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))
        return cache

    want = run_steps(model, ids(), 3, make())
    compiled(model)
    cache = make()
    compare(run_steps(model, ids(), 3, cache, forced=want.tokens), want, FLOAT32_TOLERANCE)
    names = [layer.keys.device_name for layer in cache.layers]
    assert names == ["gpu0", "gpu1"]


def test_chunked_prefill():
    torch._dynamo.reset()
    model = tiny_model("qwen3_moe", layers=1)
    want = model.generate(ids(12), max_new_tokens=5, do_sample=False)
    ktfx.compile(model, ONE_LAYER, **EAGER)
    got = model.generate(ids(12), max_new_tokens=5, do_sample=False, prefill_chunk_size=5)
    assert torch.equal(got, want)


def test_hand_written_loop_without_a_cache(model):
    with torch.no_grad():
        want = model(ids(), use_cache=False).logits
        compiled(model)
        assert relative_error(model(ids(), use_cache=False).logits, want) < FLOAT32_TOLERANCE


def test_inference_mode(model):
    with torch.inference_mode():
        want = model(ids(), use_cache=False).logits
        compiled(model)
        assert relative_error(model(ids(), use_cache=False).logits, want) < FLOAT32_TOLERANCE


def test_inputs_as_embeddings(model):
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids())
        want = model(inputs_embeds=embeds, use_cache=False).logits
        compiled(model)
        got = model(inputs_embeds=embeds, use_cache=False).logits
    assert relative_error(got, want) < FLOAT32_TOLERANCE
    assert ktfx.state_of(model).graphs[-1].phase == "prefill"


def test_several_compiled_models_in_one_process():
    torch._dynamo.reset()
    models = [tiny_model(name, layers=1) for name in ("qwen3_moe", "mixtral")]
    want = [m.generate(ids(), max_new_tokens=4, do_sample=False) for m in models]
    for model in models:
        ktfx.compile(model, ONE_LAYER, **EAGER)
    for _ in range(2):
        got = [m.generate(ids(), max_new_tokens=4, do_sample=False) for m in models]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_model_that_transformers_does_not_know():
    torch._dynamo.reset()
    model = hand_written()
    rules = {**RULES, "layers": {0: "gpu0", "1-2": "gpu1"}}
    with torch.no_grad():
        want = model(ids(6, batch=2))
        ktfx.compile(model, rules, **EAGER)
        assert relative_error(model(ids(6, batch=2)), want) < FLOAT32_TOLERANCE
    state = ktfx.state_of(model)
    assert state.resolution.placements["layers.1.block_sparse_moe.cond_ffn"].role == "experts"
    assert {u.device for u in state.graphs[0].built.units} == {"gpu0", "gpu1", "host"}


def test_compile_config_route_is_skipped_on_a_cpu_model(model):
    """transformers compiles in generate() on GPUs only: with a logical cpu the documented way is ktfx.compile."""
    from transformers import CompileConfig

    want = model.generate(ids(), max_new_tokens=4, do_sample=False, cache_implementation="static")
    config = CompileConfig(backend="ktfx", mode=None)
    got = model.generate(ids(), max_new_tokens=4, do_sample=False, cache_implementation="static", compile_config=config)
    assert torch.equal(got, want)
    with pytest.raises(KtfxError):
        ktfx.state_of(model)


def test_mode_of_compile_config_is_accepted(model):
    from ktfx.options import parse_options

    assert parse_options({}, "reduce-overhead").mode == "reduce-overhead"
    with pytest.raises(OptionError, match="unknown mode"):
        parse_options({}, "fastest")


# --- weights -------------------------------------------------------------------------------------------------------


def test_a_weight_wanted_on_two_devices_is_listed_as_a_duplicate():
    torch._dynamo.reset()
    model = tiny_model("qwen3_moe", layers=2, tie_word_embeddings=True)
    rules = {**RULES, "rules": [*RULES["rules"], HEAD_ON_GPU1]}
    state, _ = check_parity(model, rules, steps=3)
    (name, copies), *rest = state.store.duplicates()
    assert name == "model.embed_tokens.weight" and {c.device for c in copies} == {"gpu0", "gpu1"} and not rest
    assert all(c.nbytes == model.model.embed_tokens.weight.numel() * 4 for c in copies)


@pytest.mark.parametrize("how", ["replace", "in_place", "data_and_refresh"])
def test_changed_parameters_are_noticed(model, how):
    compiled(model)
    with torch.no_grad():
        before = model(ids(), use_cache=False).logits
        weight = model.model.layers[1].mlp.experts.down_proj
        if how == "replace":
            model.model.layers[1].mlp.experts.down_proj = nn.Parameter(weight.detach() * 3)
        elif how == "in_place":
            weight.mul_(3)
        else:
            weight.data.fill_(0.25)
            assert ktfx.refresh(model) > 0
        got = model(ids(), use_cache=False).logits
        ktfx.restore(model)
        want = model(ids(), use_cache=False).logits
    assert relative_error(before, want) > 1e-3
    assert relative_error(got, want) < FLOAT32_TOLERANCE


def test_release_host_and_state_dict(model, tmp_path):
    want_state = {k: v.clone() for k, v in model.state_dict().items()}
    want = model.generate(ids(), max_new_tokens=5, do_sample=False)
    compiled(model, release_host=True)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert isinstance(weight, PlacedTensor) and weight.device_name == "gpu0" and weight.device.type == "cpu"
    assert torch.equal(model.generate(ids(), max_new_tokens=5, do_sample=False), want)
    state = model.state_dict()
    assert not any(isinstance(v, PlacedTensor) for v in state.values())
    assert all(torch.equal(state[k], v) for k, v in want_state.items())
    model.save_pretrained(tmp_path)
    ktfx.restore(model)
    assert not any(isinstance(p, PlacedTensor) for p in model.parameters())
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.generate(ids(), max_new_tokens=5, do_sample=False), want)


def test_from_pretrained_loads_straight_to_places(model, tmp_path):
    want = model.generate(ids(), max_new_tokens=5, do_sample=False)
    model.save_pretrained(tmp_path)
    loaded = ktfx.from_pretrained(tmp_path, RULES, **EAGER)
    assert loaded.model.layers[1].self_attn.q_proj.weight.device_name == "gpu1"
    assert torch.equal(loaded.generate(ids(), max_new_tokens=5, do_sample=False), want)
    assert ktfx.state_of(loaded).store.duplicates() == []


def test_restore_brings_everything_back(model):
    forward, implementation = model.forward, model.generation_config.cache_implementation
    compiled(model)
    assert model.forward != forward
    ktfx.restore(model)
    assert model.forward == forward and model.generation_config.cache_implementation == implementation
    assert "forward" not in model.__dict__


# --- what is refused -----------------------------------------------------------------------------------------------


def raised(call):
    """The KtfxError behind what torch.compile raises."""
    with pytest.raises(Exception) as caught:
        call()
    error = caught.value
    return getattr(error, "inner_exception", error)


def test_gradients_are_refused(model):
    compiled(model)
    error = raised(lambda: model(ids(), use_cache=False))
    assert isinstance(error, CaptureError) and "torch.no_grad()" in str(error)


def test_training_mode_is_refused(model):
    with pytest.raises(CaptureError, match="training mode"):
        compiled(model.train())


def test_unknown_option_names_the_near_one(model):
    with pytest.raises(OptionError, match="did you mean 'simulate'"):
        ktfx.compile(model, RULES, simulat="cpu")
    error = raised(lambda: torch.compile(model, backend="ktfx", options={"rule": RULES})(ids(), use_cache=False))
    assert "did you mean 'rules'" in str(error)


def test_eager_experts_say_what_to_set(model):
    model.set_experts_implementation("eager")
    compiled(model)
    with torch.no_grad():
        error = raised(lambda: model(ids(), use_cache=False))
    assert isinstance(error, CaptureError) and "set_experts_implementation('grouped_mm')" in str(error)


def test_a_graph_break_inside_a_layer_names_the_module(model):
    attention = model.model.layers[1].self_attn
    plain = attention.forward

    def breaking(*args, **kwargs):
        torch._dynamo.graph_break()
        return plain(*args, **kwargs)

    attention.forward = breaking
    compiled(model)
    with torch.no_grad():
        error = raised(lambda: model(ids(), use_cache=False))
    assert isinstance(error, CaptureError)
    assert "model.layers.0" in str(error) and "graph_breaks" in str(error) and "test_backend.py" in str(error)


def test_a_graph_break_between_layers_is_slow_but_right(model):
    want = run_steps(model, ids(), 4, static_cache(model, 16))
    layer = model.model.layers[1]
    plain = layer.forward

    @torch._dynamo.disable
    def breaking(*args, **kwargs):
        return plain(*args, **kwargs)

    layer.forward = breaking
    compiled(model)
    got = run_steps(model, ids(), 4, static_cache(model, 16), forced=want.tokens)
    compare(got, want, FLOAT32_TOLERANCE)


def test_accelerate_hooks_are_refused(model):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(model.model.layers[0], AlignDevicesHook())
    compiled(model)
    with torch.no_grad():
        error = raised(lambda: model(ids(), use_cache=False))
    assert "accelerate" in str(error) and "remove_hook_from_module" in str(error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_a_device_that_does_not_exist(model):
    with pytest.raises(PlacementError, match="simulate"):
        ktfx.compile(model, RULES)


def test_a_device_too_small_is_said_before_anything_moves(model):
    with pytest.raises(PlacementError, match=r"gpu1 would hold .* and has room for 1\.0 KiB"):
        compiled(model, memory={"gpu1": "1KiB"})
    assert not hasattr(model, "_ktfx_compiled")


def test_verify_passes_on_a_right_model(model):
    compiled(model, verify=True)
    with torch.no_grad():
        got = model(ids(), use_cache=False).logits
        ktfx.restore(model)
        assert relative_error(got, model(ids(), use_cache=False).logits) < FLOAT32_TOLERANCE


def test_verify_names_the_pass_and_node_of_a_wrong_rewrite(model):
    from ktfx.pass_manager import Pass, register_pass

    @register_pass
    class WrongEpsilon(Pass):
        name = "wrong_epsilon"

        def run(self, gm, context):
            for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.rsqrt.default):
                if "layers.1.post" in node.meta["ktfx"].module:
                    add = node.args[0]
                    add.args = (add.args[0], 0.5)

    rules = {**RULES, "passes": ["rewrite_experts", "wrong_epsilon"]}
    ktfx.compile(model, rules, verify=True, **EAGER)
    with torch.no_grad():
        error = raised(lambda: model(ids(), use_cache=False))
    assert isinstance(error, VerifyError)
    assert "wrong_epsilon" in str(error) and "model.layers.1.post_attention_layernorm" in str(error)


def test_a_named_op_that_cannot_take_the_layout_is_an_error_a_role_falls_back(model):
    named = {
        **RULES,
        "rules": [
            {
                "match": {"name": r"^model\.layers\.1\.mlp\.experts$"},
                "replace": {"op": "experts.reference", "weights": "int4", "device": "host"},
            }
        ],
    }
    generic = {
        **RULES,
        "rules": [{"match": {"module": "experts"}, "replace": {"op": "experts.reference", "weights": "int4"}}],
    }
    ktfx.compile(model, named, **EAGER)
    with torch.no_grad():
        error = raised(lambda: model(ids(), use_cache=False))
        assert isinstance(error, PlacementError) and "rule 1" in str(error) and "fallback: aten" in str(error)
        ktfx.restore(model)
        want = model(ids(), use_cache=False).logits
        ktfx.compile(model, generic, **EAGER)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = model(ids(), use_cache=False).logits
    assert relative_error(got, want) < FLOAT32_TOLERANCE
    assert any(issubclass(w.category, KtfxWarning) and "experts.aten" in str(w.message) for w in caught)


def test_an_op_that_is_not_built_is_never_ignored_in_silence(model):
    strict = {**RULES, "rules": [{"match": {"name": "norm$"}, "replace": {"op": "norm.triton"}}]}
    with pytest.raises(PlacementError, match=r"rule 1, module '.*norm': norm.triton is not built yet"):
        ktfx.compile(model, strict, **EAGER)
    generic = {**RULES, "rules": [{"match": {"module": "norm"}, "replace": {"op": "norm.triton"}}]}
    with pytest.warns(KtfxWarning, match=r"norm.triton is not built yet: \d+ modules"):
        ktfx.compile(model, generic, **EAGER)


def test_devices_are_the_tutorials():
    assert DEVICES["host"] == "cpu"


def test_each_model_has_a_recompile_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """All models share one forward (transformers' decorators): without a code object each, the second would not fit."""
    torch._dynamo.reset()
    monkeypatch.setattr("ktfx.api.RECOMPILE_LIMIT", 1)
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        for _ in range(2):
            model = tiny_model("qwen3_moe", layers=1)
            ktfx.compile(model, partition_backend="eager", simulate="cpu")
            model(ids(), use_cache=False)
            assert len(ktfx.state_of(model).graphs) == 1


def test_one_graph_too_many_is_an_error_not_an_uncompiled_run(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("ktfx.api.RECOMPILE_LIMIT", 1)
    model = tiny_model("qwen3_moe", layers=1)
    ktfx.compile(model, partition_backend="eager", simulate="cpu")
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(KtfxError, match="has 1 already"):
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False)

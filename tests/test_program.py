"""What the compiled program is made of: transfers, units, sharing, folded cache updates, the passes' records."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from families import hand_written, tiny_model
from parity import DEVICES, run_steps, static_cache, two_gpus_host

import ktfx
from ktfx.errors import OptionError, PassError, RuleError
from ktfx.graph import info, op_name
from ktfx.ops.transfer import is_transfer, transfer_ends
from ktfx.pass_manager import Pass, build_pipeline, register_pass, registered_passes
from ktfx.program.program import Transfer

EAGER = {"simulate": "cpu", "partition_backend": "eager"}
ONE_GPU = {"ktfx": 1, "devices": DEVICES, "default_device": "gpu0", "rules": []}


def compiled_graphs(layers: int, rules, **options):
    torch._dynamo.reset()
    model = tiny_model("qwen3_moe", layers=layers)
    ktfx.compile(model, rules, **{**EAGER, **options})
    run_steps(model, torch.arange(2, 7)[None], 1, static_cache(model, 12))
    return model, ktfx.state_of(model)


def two_gpus(layers: int):
    return {**two_gpus_host(layers), "rules": []}


PLACEMENTS = {"one GPU": lambda n: ONE_GPU, "two GPUs": two_gpus, "host experts": two_gpus_host}


@pytest.mark.parametrize(
    "placement", ["two GPUs", *(pytest.param(p, marks=pytest.mark.slow) for p in ("host experts", "one GPU"))]
)
def test_what_is_compiled_does_not_grow_with_depth(placement):
    sizes = []
    for layers in (4, 6):
        _, state = compiled_graphs(layers, PLACEMENTS[placement](layers))
        sizes.append([(len(g.built.distinct), sum(c.nodes for c in g.built.distinct)) for g in state.graphs])
        assert all(len(g.built.units) > layers for g in state.graphs)
    assert sizes[0] == sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_is_compiled_at_4_and_12_layers_is_equal(placement):
    sizes = []
    for layers in (4, 12):
        _, state = compiled_graphs(layers, PLACEMENTS[placement](layers))
        sizes.append([(len(g.built.distinct), sum(c.nodes for c in g.built.distinct)) for g in state.graphs])
    assert sizes[0] == sizes[1]


@pytest.fixture(scope="module")
def traced():
    """One model with experts on the host and two GPUs, every pass's graph kept."""
    return compiled_graphs(4, two_gpus_host(4, "experts.cpu"), keep_graphs=True)


def test_each_value_crosses_once_per_target(traced):
    _, state = traced
    for graph in state.graphs:
        final = graph.records[-1].graph_after.graph
        crossings = Counter((n.args[0].name, transfer_ends(n)[1]) for n in final.nodes if is_transfer(n))
        assert crossings and max(crossings.values()) == 1


def test_no_weight_crosses(traced):
    """Weights are bound where they are read; only activations, tokens and logits move."""
    model, state = traced
    largest = max(p.numel() for p in model.parameters()) * 4
    moved = [s for g in state.graphs for s in g.built.program.steps if isinstance(s, Transfer)]
    assert moved and max(s.nbytes for s in moved) < largest


def test_the_runs_are_the_layers_borders(traced):
    """Per layer: attention on its GPU, experts on the host, and on: 2 runs a layer and one at the end."""
    _, state = traced
    expected = ["gpu0", "host"] * 2 + ["gpu1", "host"] * 2 + ["gpu1"]
    for graph in state.graphs:
        runs = list(graph.runs)
        # Layer 1's residual add runs with layer 1, on gpu0, before gpu1 takes over; the head is gpu0's by default.
        assert [r for r in runs if r == "host"] == ["host"] * 4
        assert len(runs) <= len(expected) + 2


def test_caches_are_updated_in_place(traced):
    _, state = traced
    for graph in state.graphs:
        assert graph.built.folded == 12 and graph.built.written_back == 0  # 4 layers × keys, values, length


def test_the_record_says_what_each_pass_did(traced):
    _, state = traced
    records = {r.name: r for r in state.graphs[0].records}
    rewrites = records["rewrite_experts"].rewrites
    assert [r.module for r in rewrites] == [f"model.layers.{i}.mlp.experts" for i in range(4)]
    first = rewrites[0]
    assert first.rule == "rule 1" and first.after == ("ktfx.routed_experts.default",)
    assert "transformers.grouped_mm_fallback.default" in first.before
    before, after = records["rewrite_experts"].ops_before, records["rewrite_experts"].ops_after
    assert before["transformers.grouped_mm_fallback.default"] == 8
    assert after["transformers.grouped_mm_fallback.default"] == 0 and after["ktfx.routed_experts.default"] == 4


def test_every_node_knows_its_module_device_and_rule(traced):
    _, state = traced
    for node in state.graphs[0].records[-1].graph_after.graph.nodes:
        if op_name(node) == "ktfx.routed_experts.default":
            assert info(node).device == "host" and info(node).rule == "rule 1" and info(node).layer is not None
        if node.op == "call_function" and isinstance(node.meta["val"], torch.Tensor):
            assert info(node).device in ("gpu0", "gpu1", "host")


def test_a_transfer_is_a_copy_also_when_simulated():
    x = torch.arange(4.0)
    step = Transfer(0, 1, torch.device("cpu"), wait=True)
    slots = [x, None]
    step.run(slots)
    assert torch.equal(slots[1], x) and slots[1].data_ptr() != x.data_ptr()


def test_the_pipeline_puts_required_passes_in():
    from ktfx.errors import Origin
    from ktfx.ruleset import PassRequest

    names = [p.name for p in build_pipeline([PassRequest("rewrite_experts", {}, Origin("f"))])]
    assert names == ["resolve_rules", "rewrite_experts", "assign_devices", "insert_transfers", "partition_by_device"]
    with pytest.raises(RuleError, match="did you mean 'rewrite_experts'"):
        build_pipeline([PassRequest("rewrite_expert", {}, Origin("f", 3))])
    with pytest.raises(RuleError, match="no option 'size'"):
        build_pipeline([PassRequest("rewrite_experts", {"size": 3}, Origin("f", 3))])
    with pytest.raises(RuleError, match="order that cannot work"):
        build_pipeline(
            [PassRequest("insert_transfers", {}, Origin("f")), PassRequest("assign_devices", {}, Origin("f"))]
        )
    assert set(names) <= set(registered_passes())


def test_a_pass_that_changes_an_output_or_leaves_no_meta_is_refused():
    @register_pass
    class ForgetsMeta(Pass):
        name = "test_forgets_meta"

        def run(self, gm, context):
            node = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0]
            with gm.graph.inserting_after(node):
                extra = gm.graph.call_function(torch.ops.aten.clone.default, (node,))
            node.replace_all_uses_with(extra, delete_user_cb=lambda user: user is not extra)

    torch._dynamo.reset()
    model = hand_written()
    ktfx.compile(model, {**ONE_GPU, "passes": ["test_forgets_meta"]}, **EAGER)
    with torch.no_grad(), pytest.raises(PassError, match=r"without meta[\s\S]*insert_call"):
        model(torch.arange(5)[None])


def test_an_unknown_partition_backend():
    with pytest.raises(OptionError, match="did you mean 'inductor'"):
        ktfx.compile(hand_written(), ONE_GPU, simulate="cpu", partition_backend="inductr")


def test_a_graph_reused_for_another_layer_binds_that_layers_weights():
    """Plain torch.compile cuts at breaks and reuses one layer's graph for the next: numbers must stay right."""
    torch._dynamo.reset()
    model = hand_written()
    for layer in model.layers:
        plain = layer.forward

        def broken(x, plain=plain):
            torch._dynamo.graph_break()
            return plain(x)

        layer.forward = broken
    ids = torch.arange(6)[None]
    fast = torch.compile(model, backend="ktfx", options={"rules": ONE_GPU, **EAGER})
    with torch.no_grad():
        assert torch.allclose(fast(ids), model(ids), rtol=1e-4, atol=1e-5)
        assert torch.allclose(fast(ids), model(ids), rtol=1e-4, atol=1e-5)

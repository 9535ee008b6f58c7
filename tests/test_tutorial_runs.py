"""The multi-GPU tutorial's snippets run: logits as the model's own, every layer's experts where the snippet says.

``test_kt_compat`` checks what the snippets resolve to; here the compiled graphs are asked what ran where.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from parity import FLOAT32_TOLERANCE, Trace, compare, run_steps, static_cache
from torch import nn

import ktfx
from ktfx.formats import dequantize, quantize
from ktfx.graph import info
from ktfx.program.program import Transfer
from ktfx.state import GraphReport, ModelState

TUTORIAL = Path(__file__).parent / "data" / "tutorial"
LENGTH, STEPS = 7, 3
routed_experts = torch.ops.ktfx.routed_experts.default

# (device, op) of a layer's experts.
HOST = ("cpu", "experts.cpu")
TRITON = ("cuda:0", "experts.triton")
OWN = ("cuda:0", "aten")


def snippet(*names: str) -> str:
    """Snippets of the tutorial as printed, one after the other."""
    return "\n".join((TUTORIAL / f"{name}.yaml").read_text(encoding="utf-8") for name in names)


ALL = tuple(sorted(path.stem for path in TUTORIAL.glob("*.yaml")))


@cache
def deepseek(name: str, layers: int) -> nn.Module:
    return tiny_model(name, layers=layers)


def ids() -> torch.Tensor:
    return torch.randint(2, 90, (1, LENGTH), generator=torch.Generator().manual_seed(1))


def eager(model: nn.Module) -> Trace:
    return run_steps(model, ids(), STEPS, static_cache(model, LENGTH + STEPS + 1))


def with_int4_experts(model: nn.Module, layers: range) -> nn.Module:
    """The model with the experts of these layers rounded to int4 and back: what KExpertsMarlin computes with."""
    rounded = copy.deepcopy(model)
    for layer in layers:
        experts = rounded.model.layers[layer].mlp.experts
        for weight in (experts.gate_up_proj, experts.down_proj):
            weight.data.copy_(dequantize(quantize(weight.data, "int4", search=True)))
    return rounded


def run(model: nn.Module, rules: str, expected: Trace, tmp_path: Path) -> ModelState:
    """Compile by the text of a rule file, compare prefill and decode with ``expected``, return what ktfx knows."""
    file = tmp_path / "tutorial.yaml"
    file.write_text(rules, encoding="utf-8")
    torch._dynamo.reset()
    ktfx.compile(model, file, simulate="cpu", partition_backend="eager")
    try:
        cache = static_cache(model, LENGTH + STEPS + 1)
        compare(run_steps(model, ids(), STEPS, cache, forced=expected.tokens), expected, FLOAT32_TOLERANCE)
        state = ktfx.state_of(model)
        assert [graph.phase for graph in state.graphs] == ["prefill", "generate"]
        return state
    finally:
        ktfx.restore(model)


def experts_ran(graph: GraphReport) -> dict[int, tuple[str, str]]:
    """layer → device and op of its routed experts, from the nodes of the units that were compiled."""
    found: dict[int, set[tuple[str, str]]] = {}
    for unit in graph.built.units:
        for node in unit.nodes:
            path = info(node).module.split(".")
            if path[3:5] == ["mlp", "experts"]:
                op = f"experts.{node.args[4]}" if node.target is routed_experts else "aten"
                found.setdefault(int(path[2]), set()).add((unit.device, op))
    # Around a rewritten call only views are left.
    return {layer: max(places, key=lambda p: p[1] != "aten") for layer, places in found.items()}


def devices_of(graph: GraphReport, module: str, layer: int) -> set[str]:
    """Where the nodes of ``model.layers.N.module`` ran; of the layer itself (the residual stream) for an empty one."""
    path = f"model.layers.{layer}" + (f".{module}" if module else "")
    return {unit.device for unit in graph.built.units for node in unit.nodes if info(node).module == path}


def routes_from_host(graph: GraphReport) -> list[str]:
    """Where the experts' results go from the host, in the order of the layers."""
    steps = [s for s in graph.built.program.steps if isinstance(s, Transfer)]
    return [s.target_name for s in steps if s.source_name == "cpu" and s.nbytes == expert_bytes(graph)]


def expert_bytes(graph: GraphReport) -> int:
    return (LENGTH if graph.phase == "prefill" else 1) * 32 * 4


def check(model: nn.Module, rules: str, expected: Trace, placed: dict[int, tuple[str, str]], tmp_path: Path) -> Any:
    state = run(model, rules, expected, tmp_path)
    for graph in state.graphs:
        assert experts_ran(graph) == placed, graph.phase
    return state


# ---- quick: the snippets whose regular expressions hold for a few layers as printed


@pytest.mark.parametrize(
    ("name", "place"), [("2-experts-one-gpu", TRITON), ("4-experts-on-host", HOST)], ids=lambda v: v[:1]
)
def test_snippet_for_every_layer_runs_on_a_few(name: str, place: tuple[str, str], tmp_path: Path) -> None:
    model = deepseek("deepseek_v3", 2)
    state = check(model, snippet(name), eager(model), {1: place}, tmp_path)
    for graph in state.graphs:
        assert graph.partitions()["cpu"] == (1 if place is HOST else 0)
        assert routes_from_host(graph) == (["cuda:0"] if place is HOST else [])


def test_new_rule_before_the_old_one_runs_layers_4_to_8_in_int4(tmp_path: Path) -> None:
    model = deepseek("deepseek_v2", 6)
    expected = eager(with_int4_experts(model, range(4, 6)))
    placed = {layer: TRITON if 4 <= layer <= 8 else HOST for layer in range(1, 6)}
    check(model, snippet("5-new-rule-before-old"), expected, placed, tmp_path)


def test_a_transfer_map_moves_the_stream_and_its_caches_stay_with_the_attention(tmp_path: Path) -> None:
    model = deepseek("deepseek_v3", 2)
    rules = snippet("1-transfer-map").replace("30:", "1:")
    state = check(model, rules, eager(model), {1: OWN}, tmp_path)
    for graph in state.graphs:
        assert [devices_of(graph, "", layer) for layer in range(2)] == [{"cuda:0"}, {"cuda:1"}]
        assert devices_of(graph, "self_attn", 1) == {"cuda:0"}, "weights and attention follow their own rules"


# ---- 60 layers, as printed


def sixty(choose: Any) -> dict[int, tuple[str, str]]:
    return {layer: choose(layer) for layer in range(1, 60)}


SNIPPETS_ALONE = {
    "1-transfer-map": sixty(lambda layer: OWN),
    "2-experts-one-gpu": sixty(lambda layer: TRITON),
    "3-experts-two-gpus": sixty(lambda layer: HOST),
    "4-experts-on-host": sixty(lambda layer: HOST if layer < 30 else OWN),
    "5-new-rule-before-old": sixty(lambda layer: TRITON if 4 <= layer <= 8 else HOST if layer < 30 else OWN),
}


@cache
def expected_of_sixty(int4: bool) -> Trace:
    model = deepseek("deepseek_v2", 60)
    return eager(with_int4_experts(model, range(4, 9)) if int4 else model)


def check_sixty(rules: str, placed: dict[int, tuple[str, str]], int4: bool, tmp_path: Path) -> ModelState:
    return check(deepseek("deepseek_v2", 60), rules, expected_of_sixty(int4), placed, tmp_path)


def stream(graph: GraphReport) -> list[set[str]]:
    """Where each layer's sums ran: in the layer or, with all layers on one device, in the norms that took them."""
    norm = "post_attention_layernorm"
    return [devices_of(graph, "", layer) or devices_of(graph, norm, layer) for layer in range(60)]


SPLIT_STREAM = [{"cuda:0"}] * 30 + [{"cuda:1"}] * 30


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ALL)
def test_snippet_alone_with_sixty_layers(name: str, tmp_path: Path) -> None:
    state = check_sixty(snippet(name), SNIPPETS_ALONE[name], name.startswith("5"), tmp_path)
    for graph in state.graphs:
        assert stream(graph) == (SPLIT_STREAM if name.startswith("1") else [{"cuda:0"}] * 60)
        if name.startswith("3"):
            # Its out_device sends layers 30 to 59 to the second GPU; without the map the stream is on the first.
            results = routes_from_host(graph)
            assert results == ["cuda:0"] * 29 + ["cuda:1"] * 30


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_gpus_with_sixty_layers_and_layers_4_to_8_moved_to_the_first(tmp_path: Path) -> None:
    """What the tutorial builds up to: the map, the new rule for layers 4 to 8 before the old ones."""
    new_rule = snippet("5-new-rule-before-old").split("\n\n")[0] + "\n"
    rules = snippet("1-transfer-map") + new_rule + snippet("3-experts-two-gpus")
    state = check_sixty(rules, sixty(lambda layer: TRITON if 4 <= layer <= 8 else HOST), True, tmp_path)
    for graph in state.graphs:
        assert stream(graph) == SPLIT_STREAM
        assert routes_from_host(graph) == ["cuda:0"] * 24 + ["cuda:1"] * 30
        assert len(graph.built.distinct) <= 16, "equal layers are compiled once"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_snippets_merged_with_sixty_layers(tmp_path: Path) -> None:
    """In the tutorial's order the rule for one GPU is the first that matches any experts."""
    state = check_sixty(snippet(*ALL), sixty(lambda layer: TRITON), False, tmp_path)
    for graph in state.graphs:
        assert stream(graph) == SPLIT_STREAM


# ---- prefill and generate on different devices

BY_PHASE = r"""
- match:
    name: "^model\\.layers\\..*\\.mlp\\.experts$"
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs:
      prefill_device: "cuda:1"
      prefill_op: "KExpertsTorch"
      generate_device: "cpu"
      generate_op: "KExpertsCPU"
      out_device: "cuda:0"
  recursive: False
- match:
    name: "^(model\\.layers\\.1\\.|model\\.embed_tokens|lm_head)"
  replace:
    class: "default"
    kwargs:
      prefill_device: "cuda:0"
      generate_device: "cuda:1"
"""


def test_each_phase_runs_on_its_own_device(tmp_path: Path) -> None:
    """Caches lie where the attention generates; prefill computes elsewhere and writes them there."""
    model = deepseek("deepseek_v3", 2)
    state = run(model, BY_PHASE, eager(model), tmp_path)
    prefill, generate = state.graphs
    assert experts_ran(prefill) == {1: ("cuda:1", "aten")}
    assert experts_ran(generate) == {1: HOST}
    for graph, device in ((prefill, "cuda:0"), (generate, "cuda:1")):
        assert devices_of(graph, "self_attn", 1) == {device}
        assert devices_of(graph, "self_attn.o_proj", 1) == {device}
        assert devices_of(graph, "self_attn", 0) == {"cuda:0"}
    crossing = {(s.source_name, s.target_name) for s in prefill.built.program.steps if isinstance(s, Transfer)}
    assert ("cuda:0", "cuda:1") in crossing, "the cache of layer 1"
    assert any(name == "lm_head.weight" for name, _ in state.store.duplicates()), "two phases want it on two devices"

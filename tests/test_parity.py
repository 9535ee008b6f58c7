"""Every family and placement against the model's own eager run: logits of each step and every cache tensor.

With two real GPUs the same tests run on cuda:0 and cuda:1; otherwise the devices are simulated by the cpu, every
transfer is a real copy, and the sources of all copies are overwritten with NaN half way through.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, LAYERS, hand_written, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import BFLOAT16_TOLERANCE, DEVICES, check_parity, run_steps, static_cache, two_gpus_host
from torch import nn

import ktfx
from ktfx.verify import relative_error

TWO_GPUS = torch.cuda.is_available() and torch.cuda.device_count() >= 2
SIMULATE: str | None = None if TWO_GPUS else "cpu"
# Eager and compiled attention round differently on a GPU against the cpu's eager run.
TOLERANCE = 1e-4


def check(model: nn.Module, rules: Any, **options: Any) -> Any:
    state, _ = check_parity(model, rules, simulate=SIMULATE, tolerance=TOLERANCE, **options)
    return state


# Ten families of experts and a dense one at each `make test`; those that share their layout with one of them, slow.
ALIKE = {"olmoe", "qwen2_moe", "glm4_moe", "ernie4_5_moe", "dots1", "minimax_m2"}


@pytest.mark.parametrize(
    "name", [pytest.param(f.name, marks=pytest.mark.slow) if f.name in ALIKE else f.name for f in FAMILIES]
)
def test_every_family_with_experts_on_the_host_and_two_gpus(name):
    """32 decode steps: past the window of the sliding models (16). Two layers hold one of each kind."""
    state = check(tiny_model(name, layers=2), two_gpus_host(2, "experts.cpu"), steps=32)
    assert {g.phase for g in state.graphs} == {"prefill", "generate"}
    devices = {u.device for g in state.graphs for u in g.built.units}
    assert devices == ({"gpu0", "gpu1"} if name == "llama" else {"gpu0", "gpu1", "host"})


SPLIT = ["gpu0", "gpu1"]
PLACEMENTS: dict[str, dict[str, Any]] = {
    "all_host": {
        "default_device": "host",
        "rules": [{"match": {"module": "experts"}, "replace": {"op": "experts.cpu"}}],
    },
    "one_gpu": {"default_device": "gpu0", "rules": []},
    "two_gpus": {"default_device": "gpu0", "layers": SPLIT, "rules": []},
    "experts_on_host": {
        "default_device": "gpu0",
        "rules": [{"match": {"module": "experts"}, "replace": {"op": "experts.aten", "device": "host"}}],
    },
    "alternate_layers": {"default_device": "gpu0", "layers": {0: "gpu0", 1: "gpu1", 2: "gpu0"}, "rules": []},
    "embedding_and_head_elsewhere": {
        "default_device": "gpu0",
        "rules": [
            {"match": {"module": "embedding"}, "replace": {"device": "host"}},
            {"match": {"module": "head"}, "replace": {"device": "gpu1"}},
            {"match": {"module": "norm"}, "replace": {"device": "gpu1"}},
        ],
    },
    "prefill_and_generate_differ": {
        "default_device": "gpu0",
        "rules": [
            {
                "match": {"module": "experts"},
                "replace": {
                    "prefill": {"op": "experts.aten", "device": "gpu1"},
                    "generate": {"op": "experts.cpu", "device": "host"},
                },
            }
        ],
    },
    "experts_by_triton": {
        "default_device": "gpu0",
        "layers": SPLIT,
        "rules": [{"match": {"module": "experts"}, "replace": {"op": "experts.triton"}}],
    },
}


def rules_of(name: str) -> dict[str, Any]:
    return {"ktfx": 1, "devices": DEVICES, **PLACEMENTS[name]}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement(placement):
    layers = 3 if placement == "alternate_layers" else 2
    state = check(tiny_model("qwen3_moe", layers=layers), rules_of(placement), steps=8)
    for graph in state.graphs:
        assert graph.built.written_back == 0, "a cache was copied instead of updated in place"


@pytest.mark.parametrize("placement", ["two_gpus", pytest.param("experts_on_host", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", [pytest.param("gpt_oss", marks=pytest.mark.slow), "deepseek_v3"])
def test_placements_of_other_layouts(placement, family):
    check(tiny_model(family), rules_of(placement), steps=8)


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_bfloat16_is_no_worse_than_eager_by_more_than_half(family):
    """Both against a float32 run of the same weights: ‖out−ref‖/‖ref‖."""
    torch._dynamo.reset()
    model = tiny_model(family, dtype=torch.bfloat16)
    reference = tiny_model(family)
    reference.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    ids = torch.randint(2, 90, (1, 9), generator=torch.Generator().manual_seed(2))
    want = run_steps(reference, ids, 8, static_cache(reference, 24))
    eager = run_steps(model, ids, 8, static_cache(model, 24), forced=want.tokens)
    ktfx.compile(model, two_gpus_host(LAYERS, "experts.cpu"), simulate=SIMULATE, partition_backend="eager")
    got = run_steps(model, ids, 8, static_cache(model, 24), forced=want.tokens)
    for mine, theirs, exact in zip(got.logits, eager.logits, want.logits, strict=True):
        error, base = relative_error(mine, exact), relative_error(theirs, exact)
        assert error <= max(1.5 * base, 1e-3), (error, base)
        assert error <= max(BFLOAT16_TOLERANCE, 1.5 * base)


def test_inductor_two_gpus_and_host():
    """The default backend: compiled partitions, symbolic lengths, caches updated in place."""
    torch._dynamo.reset()
    state = check(tiny_model("qwen3_moe"), two_gpus_host(LAYERS, "experts.cpu"), steps=4, partition_backend="inductor")
    assert all(g.built.written_back == 0 for g in state.graphs)


@pytest.mark.slow
def test_past_a_forced_graph_break():
    model = tiny_model("qwen3_moe")
    layer = model.model.layers[1]
    plain = layer.forward

    @torch._dynamo.disable
    def breaking(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    layer.forward = breaking
    with pytest.warns(ktfx.KtfxWarning, match="in pieces"):
        check(model, two_gpus_host(LAYERS), steps=32, poison=False)


def test_a_model_of_no_library_on_every_device():
    torch._dynamo.reset()
    model = hand_written()
    ids = torch.randint(2, 90, (2, 6), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = model(ids)
        for placement in ("two_gpus", "experts_on_host", "alternate_layers"):
            ktfx.compile(model, rules_of(placement), simulate=SIMULATE, partition_backend="eager")
            assert relative_error(model(ids), want) <= TOLERANCE
            ktfx.restore(model)
            torch._dynamo.reset()


_MODULES = (
    *(f"layers.{i}.{part}" for i in range(LAYERS) for part in ("attention", "ffn_norm", "block_sparse_moe")),
    *(f"layers.{i}.block_sparse_moe.cond_ffn" for i in range(LAYERS)),
    "tok_embeddings",
    "norm",
    "output",
)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(st.sampled_from(["gpu0", "gpu1", "host"]), min_size=len(_MODULES), max_size=len(_MODULES)))
def test_random_placements(places):
    torch._dynamo.reset()
    model = hand_written()
    rules = {
        "ktfx": 1,
        "devices": DEVICES,
        "default_device": "gpu0",
        "rules": [
            {"match": {"name": f"^{m.replace('.', chr(92) + '.')}$"}, "replace": {"device": d}}
            for m, d in zip(_MODULES, places, strict=True)
        ],
    }
    ids = torch.randint(2, 90, (1, 5), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = model(ids)
        ktfx.compile(model, rules, simulate=SIMULATE, partition_backend="eager")
        assert relative_error(model(ids), want) <= TOLERANCE

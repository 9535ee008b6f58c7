"""Sliding-window layers of a static cache at full length: direct decode steps that equal eager past the window."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import tiny_model
from parity import DEVICES, FLOAT32_TOLERANCE, compare, run_steps, static_cache, two_gpus_host
from test_cuda_graphs import StandIn, on_gpus
from torch import nn

import ktfx
from ktfx import direct
from ktfx.cache_argument import cache_keyword
from ktfx.errors import OptionError
from ktfx.program.cuda_graphs import CudaRecorder
from ktfx.sliding_cache import lengthen_sliding_layers

ONE_GPU = {"ktfx": 1, "devices": DEVICES, "default_device": "gpu0", "rules": []}
EAGER = {"simulate": "cpu", "partition_backend": "eager"}
WINDOW = 16  # of the tiny families
SLOW_GEMMA = pytest.param("gemma3_text", marks=pytest.mark.slow)


@dataclass
class Counted:
    """Direct calls that ran, and that went the long way after all."""

    ran: int = 0
    refused: int = 0


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    count, run = Counted(), direct.DirectCall.run

    def counting(self: Any, kwargs: dict[str, Any]) -> Any:
        output = run(self, kwargs)
        count.ran += output is not None
        count.refused += output is None
        return output

    monkeypatch.setattr(direct.DirectCall, "run", counting)
    return count


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    recorder = StandIn()
    monkeypatch.setattr(direct, "CudaRecorder", lambda: recorder)
    monkeypatch.setattr(direct, "cuda_device_of", on_gpus)
    return recorder


def two_layers(family: str, **overrides: Any) -> nn.Module:
    """One layer that slides and one that does not."""
    return tiny_model(family, layers=2, **overrides)


def prompt(batch: int = 1, length: int = 7) -> torch.Tensor:
    return torch.randint(2, 90, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield


@pytest.mark.parametrize("family", ["gpt_oss", "gemma3_text"])
def test_forty_steps_past_the_window_and_a_second_conversation(counted: Counted, family: str) -> None:
    model = two_layers(family)
    steps, length = WINDOW + 40, 80
    want = run_steps(model, prompt(), steps, static_cache(model, length))
    other = run_steps(model, prompt() + 1, 12, static_cache(model, length))
    ktfx.compile(model, ONE_GPU, **EAGER)
    cache = static_cache(model, length)
    compare(run_steps(model, prompt(), steps, cache, forced=want.tokens), want, FLOAT32_TOLERANCE)
    assert counted.ran >= steps - 3 and counted.refused == 0
    assert not any(layer.is_sliding for layer in cache.layers)
    assert {layer.keys.shape[2] for layer in cache.layers} == {length}
    cache.reset()
    ran = counted.ran
    compare(run_steps(model, prompt() + 1, 12, cache, forced=other.tokens), other, FLOAT32_TOLERANCE)
    assert counted.ran >= ran + 11
    graphs = [g.phase for g in ktfx.state_of(model).graphs]
    assert graphs.count("generate") == 1, "a step past the window was compiled again"


@pytest.mark.slow
def test_a_prompt_longer_than_the_window(counted: Counted) -> None:
    model = two_layers("gpt_oss")
    long = prompt(length=WINDOW + 9)
    want = run_steps(model, long, 8, static_cache(model, 64))
    ktfx.compile(model, ONE_GPU, **EAGER)
    compare(run_steps(model, long, 8, static_cache(model, 64), forced=want.tokens), want, FLOAT32_TOLERANCE)
    assert counted.ran >= 5


@pytest.mark.parametrize("family", ["gpt_oss", SLOW_GEMMA])
def test_left_padding(counted: Counted, family: str) -> None:
    model = two_layers(family)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, :4] = 0
    steps = WINDOW + 33
    want = run_steps(model, prompt(2), steps, static_cache(model, 64), mask)
    ktfx.compile(model, ONE_GPU, **EAGER)
    compare(run_steps(model, prompt(2), steps, static_cache(model, 64), mask, want.tokens), want, FLOAT32_TOLERANCE)
    # The mask grows with every step, which makes every step a form of its own.
    assert counted.ran == 0 and ktfx.state_of(model).graphs[-1].phase == "generate"


@pytest.mark.parametrize("family", ["gpt_oss", SLOW_GEMMA, pytest.param("llama4_text", marks=pytest.mark.slow)])
def test_generate_makes_its_masks_by_the_long_layers(counted: Counted, family: str) -> None:
    """Batch 2 with left padding: generate() hands each step ready masks, one a kind of layer."""
    # Llama 4's layers that look at a chunk; the last of four is full.
    model = tiny_model(family, layers=4, attention_chunk_size=WINDOW) if family == "llama4_text" else two_layers(family)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, :4] = 0
    settings: dict[str, Any] = {"max_new_tokens": WINDOW + 33, "do_sample": False, "attention_mask": mask}
    want = model.generate(prompt(2), cache_implementation="static", disable_compile=True, **settings)
    ktfx.compile(model, ONE_GPU, **EAGER)
    assert torch.equal(model.generate(prompt(2), **settings), want)
    assert counted.ran >= WINDOW + 33 - 5
    ktfx.restore(model)
    assert "prepare_inputs_for_generation" not in model.__dict__


@pytest.mark.parametrize("given", [pytest.param(False, marks=pytest.mark.slow), True])
def test_chunked_prefill_and_a_cache_of_the_callers(counted: Counted, given: bool) -> None:
    model = two_layers("gpt_oss")
    settings: dict[str, Any] = {"max_new_tokens": WINDOW + 8, "do_sample": False, "prefill_chunk_size": 5}
    settings["attention_mask"] = torch.ones(1, 23, dtype=torch.int64)
    text = prompt(length=23)
    want = model.generate(text, cache_implementation="static", disable_compile=True, **settings)
    ktfx.compile(model, ONE_GPU, **EAGER)
    if given:
        settings[cache_keyword(model.forward)] = static_cache(model, 64)
        settings.pop("prefill_chunk_size")
    assert torch.equal(model.generate(text, **settings), want)
    assert counted.ran >= WINDOW


@pytest.mark.slow
def test_beam_search() -> None:
    model = two_layers("gpt_oss")
    settings: dict[str, Any] = {"max_new_tokens": WINDOW + 6, "do_sample": False, "num_beams": 3}
    want = model.generate(prompt(), cache_implementation="static", disable_compile=True, **settings)
    ktfx.compile(model, ONE_GPU, **EAGER)
    assert torch.equal(model.generate(prompt(), **settings), want)


@pytest.mark.parametrize("family", ["gpt_oss", SLOW_GEMMA])
def test_replayed_from_graphs(stand_in: StandIn, family: str) -> None:
    model = two_layers(family)
    steps = WINDOW + 33
    want = run_steps(model, prompt(), steps, static_cache(model, 64))
    ktfx.compile(model, two_gpus_host(2, "experts.aten"), **EAGER)
    cache = static_cache(model, 64)
    compare(run_steps(model, prompt(), steps, cache, forced=want.tokens), want, FLOAT32_TOLERANCE)
    assert stand_in.replays >= (steps - 6) * stand_in.asked > 0


def test_generate_replays_its_masks_too(stand_in: StandIn) -> None:
    model = two_layers("gpt_oss")
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, :4] = 0
    settings: dict[str, Any] = {"max_new_tokens": WINDOW + 20, "do_sample": False, "attention_mask": mask}
    want = model.generate(prompt(2), cache_implementation="static", disable_compile=True, **settings)
    ktfx.compile(model, two_gpus_host(2, "experts.aten"), **EAGER)
    assert torch.equal(model.generate(prompt(2), **settings), want)
    assert stand_in.replays > WINDOW


def test_windows_alone_if_asked(counted: Counted) -> None:
    model = two_layers("gpt_oss")
    want = run_steps(model, prompt(), WINDOW + 8, static_cache(model, 64))
    ktfx.compile(model, ONE_GPU, sliding_cache="window", **EAGER)
    assert "prepare_inputs_for_generation" not in model.__dict__
    cache = static_cache(model, 64)
    compare(run_steps(model, prompt(), WINDOW + 8, cache, forced=want.tokens), want, FLOAT32_TOLERANCE)
    assert {layer.keys.shape[2] for layer in cache.layers} == {WINDOW, 64}
    with pytest.raises(OptionError, match="sliding_cache"):
        ktfx.compile(model, ONE_GPU, sliding_cache="ful", **EAGER)


def test_a_ready_mask_keeps_the_layers_it_was_sized_by() -> None:
    model = two_layers("gpt_oss")
    cache, text = static_cache(model, 64), prompt()
    keyword = cache_keyword(model.forward)
    inputs = model.prepare_inputs_for_generation(text, attention_mask=torch.ones_like(text), **{keyword: cache})
    assert isinstance(inputs["attention_mask"], dict)
    with torch.no_grad():
        want = model(**{**inputs, keyword: static_cache(model, 64)}).logits
        ktfx.compile(model, ONE_GPU, **EAGER)
        got = model(**inputs).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert any(layer.is_sliding for layer in cache.layers)


def test_caches_that_stay_as_they_are() -> None:
    from transformers import DynamicCache

    sliding = two_layers("gpt_oss", layer_types=["sliding_attention"] * 2)
    linear = tiny_model("qwen3_next")
    mixed = two_layers("gpt_oss")
    ktfx.compile(mixed, ONE_GPU, sliding_cache="window", **EAGER)
    placed = static_cache(mixed, 64)
    run_steps(mixed, prompt(), 0, placed)
    offloaded = static_cache(mixed, 64)
    offloaded.offloading = True  # asked for when it is made, it wants a stream of a GPU
    for cache in (
        static_cache(sliding, 64),
        static_cache(linear, 64),
        placed,
        DynamicCache(config=mixed.config),
        offloaded,
        None,
    ):
        before = copy.copy(getattr(cache, "layers", None))
        assert lengthen_sliding_layers(cache) == 0
        assert getattr(cache, "layers", None) == before


def test_layers_that_were_built_early_are_built_again() -> None:
    model = two_layers("gpt_oss")
    cache = static_cache(model, 64)
    cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    assert lengthen_sliding_layers(cache) == 1
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(2, 2, 64, 8)] * 2


@pytest.mark.parametrize("length", [5, WINDOW, WINDOW + 9])
def test_a_cache_filled_by_the_model_itself_goes_on(counted: Counted, length: int) -> None:
    """An eager prefill, shorter and longer than the window, then compiled steps on the same cache."""
    model = two_layers("gpt_oss")
    want = run_steps(model, prompt(length=length), 6, static_cache(model, 64))
    cache = static_cache(model, 64)
    first = run_steps(model, prompt(length=length), 0, cache, forced=want.tokens)
    ktfx.compile(model, ONE_GPU, **EAGER)
    after = run_steps(model, torch.tensor(first.tokens), 5, cache, forced=want.tokens[1:])
    after.logits, after.tokens = first.logits + after.logits, first.tokens + after.tokens
    compare(after, want, FLOAT32_TOLERANCE)
    assert counted.ran >= 3 and not any(layer.is_sliding for layer in cache.layers)


@pytest.mark.slow
def test_a_model_whose_layers_all_slide_still_equals_eager() -> None:
    model = two_layers("gpt_oss", layer_types=["sliding_attention"] * 2)
    want = run_steps(model, prompt(), WINDOW + 4, static_cache(model, 64))
    ktfx.compile(model, ONE_GPU, **EAGER)
    got = run_steps(model, prompt(), WINDOW + 4, static_cache(model, 64), forced=want.tokens)
    compare(got, want, FLOAT32_TOLERANCE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["gpt_oss", "gemma3_text"])
def test_on_a_real_gpu(counted: Counted, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    recorders: list[CudaRecorder] = []

    def recorder() -> CudaRecorder:
        recorders.append(CudaRecorder())
        return recorders[-1]

    monkeypatch.setattr(direct, "CudaRecorder", recorder)
    rules: dict[str, Any] = {"ktfx": 1, "default_device": "cuda:0", "rules": []}
    if family == "gpt_oss":
        rules["rules"] = [{"match": {"module": "experts"}, "replace": {"op": "experts.triton"}}]
    model = two_layers(family)
    steps = WINDOW + 33
    want = run_steps(model, prompt(2), steps, static_cache(model, 64))
    ktfx.compile(model, rules)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*without a CUDA graph", ktfx.KtfxWarning)
        compare(run_steps(model, prompt(2), steps, static_cache(model, 64), forced=want.tokens), want, 1e-3)
    assert counted.ran >= steps - 3 and len(recorders) == 1
    (record,) = [r for r in ktfx.state_of(model).graphs[-1].records if r.name == "fuse_attention"]
    assert len(record.rewrites) == 2

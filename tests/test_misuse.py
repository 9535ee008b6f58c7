"""What users may do to a compiled model, and should not: right numbers or a clear KtfxError."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from pathlib import Path

import pytest
import torch
from families import tiny_model
from parity import BFLOAT16_TOLERANCE, FLOAT32_TOLERANCE, run_steps, static_cache, two_gpus_host, with_cache
from torch import nn

import ktfx
from ktfx.cache_argument import cache_keyword
from ktfx.errors import CaptureError, OptionError, RuleError, WeightError
from ktfx.verify import relative_error

RULES = two_gpus_host(2)
EAGER = {"simulate": "cpu", "partition_backend": "eager"}


@pytest.fixture
def model():
    torch._dynamo.reset()
    return tiny_model("qwen3_moe", layers=2)


def ids(length: int = 7, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 90, (batch, length), generator=torch.Generator().manual_seed(seed))


def compiled(model: nn.Module, **options) -> nn.Module:
    return ktfx.compile(model, RULES, **{**EAGER, **options})


def logits(model: nn.Module, tokens: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids() if tokens is None else tokens, use_cache=False).logits


def same(model: nn.Module, expected: torch.Tensor) -> bool:
    return relative_error(logits(model), expected) < FLOAT32_TOLERANCE


# ---- calls that cannot be answered


def test_bad_inputs_are_told_by_the_callers_names(model):
    compiled(model)
    with torch.no_grad():
        with pytest.raises(CaptureError, match=r"input_ids is empty: its shape is \(1, 0\)"):
            model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=2)
        with pytest.raises(CaptureError, match=r"input_ids is torch\.float32"):
            model(ids().float(), use_cache=False)
        with pytest.raises(CaptureError, match=r"(?s)inputs_embeds is \(1, 5, 33\).*\(batch, length, 32\)"):
            model(inputs_embeds=torch.zeros(1, 5, 33), use_cache=False)
        with pytest.raises(CaptureError, match="holds the token 5000") as caught:
            model(input_ids=torch.full((1, 7), 5000), use_cache=False)
    assert "0 to 95" in str(caught.value)


def test_a_static_cache_that_is_too_short_or_of_another_batch(model):
    compiled(model)
    with pytest.raises(CaptureError, match="16 positions: 0 are used, and the call brings 40 more"):
        run_steps(model, ids(40), 0, static_cache(model, 16))
    cache = static_cache(model, 9)
    with pytest.raises(CaptureError, match="9 positions: 9 are used, and the call brings 1 more"):
        run_steps(model, ids(), 5, cache)
    cache.reset()
    with torch.no_grad(), pytest.raises(CaptureError, match="a batch of 1, and the call has one of 2"):
        model(input_ids=ids(1, batch=2), **with_cache(model, cache))


def test_training_mode_is_noticed_on_repeated_calls_too(model):
    compiled(model)
    for _ in range(3):
        logits(model)
    model.train()
    with pytest.raises(CaptureError, match=r"training mode after it was compiled"):
        logits(model)
    model.eval()
    logits(model)


def test_a_pass_that_does_not_exist_is_said_before_anything_is_traced(model):
    with pytest.raises(RuleError, match="did you mean 'rewrite_experts'"):
        ktfx.compile(model, {**RULES, "passes": ["rewrite_expert"]}, **EAGER)
    with pytest.raises(RuleError, match="no option 'devic'"):
        ktfx.compile(model, {**RULES, "passes": [{"fuse_norms": {"devic": "cuda"}}]}, **EAGER)
    assert "forward" not in model.__dict__ and not hasattr(model, "_ktfx_compiled")


# ---- the model changed after it was compiled


def test_replaced_modules_are_refused_until_the_model_is_compiled_again(model):
    compiled(model)
    for _ in range(3):
        logits(model)
    model.model.layers[1].self_attn.q_proj = WithAdapter(model.model.layers[1].self_attn.q_proj)
    with pytest.raises(CaptureError, match=r"'model\.layers\.1\.self_attn\.q_proj'.*replaced"):
        logits(model)
    plain = copy.deepcopy(model)
    compiled(model)
    assert same(model, logits(plain))
    ktfx.restore(model)
    model.lm_head = nn.Linear(32, 96, bias=False)  # a model that is no longer compiled may change
    logits(model)


class WithAdapter(nn.Module):
    """A linear layer with a low-rank update beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.base = base
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def test_other_models_compiled_later_cost_no_graph(model):
    """The watch over modules must not become a guard."""
    compiled(model)
    logits(model)
    other = compiled(tiny_model("qwen3_moe", layers=2))
    logits(other)
    logits(model, ids(seed=2))
    assert len(ktfx.state_of(model).graphs) == 1


def test_a_graph_compiled_after_a_change_has_the_new_numbers(model):
    """The second form of call finds the first one's copies in the store."""
    compiled(model)
    logits(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.mul_(3)
            layer.self_attn.q_proj.weight = nn.Parameter(layer.self_attn.q_proj.weight * 2)
        got = model(input_ids=ids(1), use_cache=False).logits
        assert len(ktfx.state_of(model).graphs) == 2
        ktfx.restore(model)
        want = model(input_ids=ids(1), use_cache=False).logits
    assert relative_error(got, want) < FLOAT32_TOLERANCE


@pytest.mark.slow
def test_replaced_data_is_noticed(model):
    compiled(model)
    model.generate(ids(), max_new_tokens=3, do_sample=False)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data = layer.self_attn.q_proj.weight.data + 0.3
    got = model.generate(ids(), max_new_tokens=8, do_sample=False)
    ktfx.restore(model)
    assert torch.equal(got, model.generate(ids(), max_new_tokens=8, do_sample=False))


def test_a_model_converted_to_another_dtype_is_refused_until_compiled_again(model):
    compiled(model)
    for _ in range(3):
        logits(model)
    model.to(torch.bfloat16)
    with pytest.raises(WeightError, match=r"(?s)bfloat16; it was compiled as .*float32.*compile the model again"):
        logits(model)
    compiled(model)
    got = logits(model)
    assert got.dtype == torch.bfloat16
    ktfx.restore(model)
    assert relative_error(got, logits(model)) < BFLOAT16_TOLERANCE


# ---- copies


def test_a_deep_copy_is_a_plain_model_of_its_own(model):
    want = logits(model)
    compiled(model)
    logits(model)
    twin = copy.deepcopy(model)
    assert "forward" not in twin.__dict__ and not hasattr(twin, "_ktfx_compiled")
    assert twin.generation_config.cache_implementation is None
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    assert relative_error(logits(twin), want) > 0.1
    assert same(model, want), "the original runs its own weights"
    compiled(twin)
    assert relative_error(logits(twin), want) > 0.1


@pytest.mark.parametrize("release_host", [False, True])
def test_pickled_and_saved_whole(model, release_host):
    want = logits(model)
    compiled(model, release_host=release_host)
    logits(model)
    for twin in (pickle.loads(pickle.dumps(model)), saved_and_loaded(model), copy.deepcopy(model)):
        assert "forward" not in twin.__dict__
        assert same(twin, want)
    assert same(model, want)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# ---- generation in all its forms


def test_threads_take_turns(model):
    prompts = [ids(seed=n) for n in range(3)]
    want = [model.generate(p, max_new_tokens=6, do_sample=False) for p in prompts]
    compiled(model)
    got: dict[int, torch.Tensor] = {}

    def answer(n: int) -> None:
        got[n] = model.generate(prompts[n], max_new_tokens=6, do_sample=False)

    threads = [threading.Thread(target=answer, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[n], want[n]) for n in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["prompt_lookup", "assistant"])
def test_assisted_decoding(model, how):
    prompt = ids(6).repeat(1, 2)
    options = {"max_new_tokens": 8, "do_sample": False}
    if how == "prompt_lookup":
        options["prompt_lookup_num_tokens"] = 3
    else:
        options["assistant_model"] = tiny_model("qwen3_moe", layers=1)
    want = model.generate(prompt, **options)
    compiled(model)
    assert torch.equal(model.generate(prompt, **options), want)
    assert ktfx.state_of(model).graphs, "it ran compiled"
    assert model.generation_config.cache_implementation == "static"


@pytest.mark.slow
def test_generation_goes_on_with_a_cache_that_the_caller_kept(model):
    def two_turns() -> torch.Tensor:
        first = model.generate(
            ids(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True, cache_implementation="dynamic"
        )
        prompt = torch.cat([first.sequences, ids(3, seed=4)], dim=1)
        keyword = cache_keyword(model.forward)
        kept = {keyword: first[keyword]}
        return model.generate(prompt, **kept, max_new_tokens=4, do_sample=False)

    want = two_turns()
    compiled(model)
    assert torch.equal(two_turns(), want)
    ktfx.restore(model)
    assert "generate" not in model.__dict__


# ---- model directories


def damaged(model: nn.Module, folder: Path, file: str, content: bytes | None) -> Path:
    """The model saved to ``folder``, one of its files replaced (None: removed)."""
    model.save_pretrained(folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    return folder


BAD_HEADER = b'{"a": {"dtype": "F32"}}'


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", None, "holds no weights"),
        ("model.safetensors", b"", "truncated: 0 bytes"),
        ("model.safetensors", b"\xff" * 64, "truncated or no safetensors file"),
        ("model.safetensors", len(BAD_HEADER).to_bytes(8, "little") + BAD_HEADER, "broken header"),
        ("model.safetensors.index.json", b"{", "no index of weights"),
        ("model.safetensors.index.json", b"[]", "no index of weights"),
        ("config.json", None, "has no config.json"),
        ("config.json", b"{", "config.json cannot be read"),
        ("config.json", b'{"model_type": "qwen33_moe"}', "config.json cannot be read"),
    ],
)
def test_damaged_model_directories(model, tmp_path, file, content, message):
    with pytest.raises(WeightError, match=message):
        ktfx.from_pretrained(damaged(model, tmp_path, file, content), RULES, **EAGER)


def test_truncated_weights_and_unknown_options_of_from_pretrained(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="dtype='bfloat61'"):
        ktfx.from_pretrained(tmp_path, RULES, dtype="bfloat61", **EAGER)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(WeightError, match="is truncated"):
        ktfx.from_pretrained(tmp_path, RULES, direct_calls=False, **EAGER)

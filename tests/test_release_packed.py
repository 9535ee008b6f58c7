"""Packed experts exist once: their own memory is given back, and whoever reads a parameter still gets its numbers."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
from families import tiny_model
from torch import nn

import ktfx
from ktfx.errors import KtfxError, KtfxWarning, OptionError, WeightError
from ktfx.ops.experts import ExpertsSpec, plain_layout
from ktfx.ops.experts_cpu import CPU_KERNEL
from ktfx.release import CheckpointSource, PackedSource
from ktfx.released_tensor import ReleasedTensor
from ktfx.verify import relative_error

EAGER = {"simulate": "cpu", "partition_backend": "eager"}
IDS = torch.randint(2, 90, (1, 7), generator=torch.Generator().manual_seed(1))
DOWN = "model.layers.0.mlp.experts.down_proj"


def rules(weights: str = "model") -> dict:
    return {
        "ktfx": 1,
        "devices": {"gpu0": "cuda:0", "host": "cpu"},
        "default_device": "gpu0",
        "rules": [{"match": {"module": "experts"}, "replace": {"op": "experts.cpu", "weights": weights}}],
    }


@pytest.fixture
def model():
    torch._dynamo.reset()
    return tiny_model("qwen3_moe", layers=2)


def tokens(model: nn.Module) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=4, do_sample=False)


def experts_parameters(model: nn.Module) -> list[torch.Tensor]:
    return [p for name, p in model.named_parameters() if ".experts." in name]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_pack_is_the_only_copy_and_gives_every_bit_back(family, tmp_path):
    torch._dynamo.reset()
    model = tiny_model(family, layers=2)
    want_state = {k: v.clone() for k, v in model.state_dict().items()}
    want = tokens(model)
    ktfx.compile(model, rules(), release_host=True, **EAGER)
    released = experts_parameters(model)
    assert released and all(isinstance(p, ReleasedTensor) for p in released)
    assert all(isinstance(p.source, PackedSource) for p in released)
    assert torch.equal(tokens(model), want)
    store = ktfx.state_of(model).store
    assert store.kept_originals() == {} and store.duplicates() == []
    state = model.state_dict()
    assert all(type(v) is torch.Tensor and torch.equal(v, want_state[k]) for k, v in state.items())
    model.save_pretrained(tmp_path)
    assert torch.equal(tokens(type(model).from_pretrained(tmp_path)), want)
    ktfx.restore(model)
    assert not any(isinstance(p, ReleasedTensor) for p in model.parameters())
    assert torch.equal(tokens(model), want)


def test_eager_code_reads_right_numbers_and_cannot_write(model):
    own = model.get_parameter(DOWN).detach().clone()
    ktfx.compile(model, rules(), release_host=True, **EAGER)
    weight = model.get_parameter(DOWN)
    with torch.no_grad():
        assert torch.equal(weight * 1, own) and torch.equal(weight[-1] + 0, own[-1])
        assert torch.equal(weight.transpose(1, 2)[2] + 0, own.transpose(1, 2)[2])
        assert all(torch.equal(a + 0, b) for a, b in zip(weight.unbind(0), own.unbind(0), strict=True))
        for write in (lambda: weight.mul_(2), lambda: weight[0].zero_()):
            with pytest.raises(KtfxError, match="released"):
                write()


def test_a_parameter_set_anew_is_noticed(model):
    ktfx.compile(model, rules(), release_host=True, **EAGER)
    with torch.no_grad():
        before = model(IDS, use_cache=False).logits
        new = model.get_parameter(DOWN).fetch() * 3
        model.model.layers[0].mlp.experts.down_proj = nn.Parameter(new)
        got = model(IDS, use_cache=False).logits
        ktfx.restore(model)
        assert torch.equal(model.get_parameter(DOWN), new)
        want = model(IDS, use_cache=False).logits
    assert relative_error(before, want) > 1e-3 > 1e-5 > relative_error(got, want)


def test_a_format_that_rounds_is_refused_before_anything_is_changed(model):
    want = {k: v.clone() for k, v in model.state_dict().items()}
    forward = model.forward
    with pytest.raises(WeightError, match="int4, which rounds") as caught:
        ktfx.compile(model, rules("int4"), release_host=True, **EAGER)
    assert caught.value.module == "model.layers.0.mlp.experts" and "'exact'" in str(caught.value)
    assert model.forward == forward and all(torch.equal(v, want[k]) for k, v in model.state_dict().items())
    with pytest.raises(OptionError, match="release_host"):
        ktfx.compile(model, rules(), release_host="all", **EAGER)


def test_exact_keeps_what_rounds_and_says_so(model):
    with pytest.warns(KtfxWarning, match="stay beside their packed copies"):
        ktfx.compile(model, rules("int4"), release_host="exact", **EAGER)
    tokens(model)
    kept = ktfx.state_of(model).store.kept_originals()
    own = {n: p.numel() * 4 for n, p in model.named_parameters() if ".experts." in n}
    assert kept == own


def test_lossy_gives_back_what_the_kernels_compute_with(model):
    own = model.get_parameter(DOWN).detach().clone()
    ktfx.compile(model, rules("int4"), release_host="lossy", **EAGER)
    state = ktfx.state_of(model)
    (entry,) = [e for e in state.store.entries() if DOWN in e.names]
    found = model.state_dict()[DOWN]
    assert torch.equal(found, entry.request.model_weights(entry.tensors)["down"])
    assert 0 < relative_error(found, own) < 0.3


@pytest.mark.slow
def test_from_pretrained_reads_rounded_weights_from_their_checkpoint(model, tmp_path):
    want_state = {k: v.clone() for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    ktfx.compile(model, rules("int4"), **EAGER)
    want = tokens(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", KtfxWarning)
        loaded = ktfx.from_pretrained(tmp_path, rules("int4"), **EAGER)
    released = experts_parameters(loaded)
    assert released and all(isinstance(p.source, CheckpointSource) for p in released)
    assert torch.equal(tokens(loaded), want)
    assert all(torch.equal(v, want_state[k]) for k, v in loaded.state_dict().items())
    (file,) = tmp_path.glob("*.safetensors")
    os.utime(file, ns=(0, 0))
    with pytest.raises(WeightError, match="was changed or removed"):
        loaded.state_dict()


def test_weights_changed_since_they_were_loaded_do_not_come_from_the_file(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        loaded.get_parameter(DOWN).mul_(2)
    with pytest.raises(WeightError, match="neither in the packed copy"):
        ktfx.compile(loaded, rules("int4"), release_host=True, **EAGER)
    assert torch.equal(loaded.get_parameter(DOWN), model.get_parameter(DOWN) * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_unpacking_is_the_inverse_of_packing(dtype, transposed, interleaved):
    E, H, inter = 3, 37, 21  # multiples of nothing
    spec = ExpertsSpec(E, H, inter, transposed=transposed, interleaved=interleaved, has_bias=True)
    shapes = {"gate_up": (E, 2 * inter, H), "down": (E, H, inter)}
    tensors = {
        name: torch.randn(E, *(shape[:0:-1] if transposed else shape[1:])).to(dtype) for name, shape in shapes.items()
    } | {f"{name}_bias": torch.randn(shape[:2]).to(dtype) for name, shape in shapes.items()}
    packed = CPU_KERNEL.pack(spec, tensors, torch.device("cpu"))
    for name, tensor in tensors.items():
        for few in (range(E), range(1, 2), range(0)):
            got = CPU_KERNEL.restored(spec, packed, name, few)
            assert got.dtype == dtype and torch.equal(got, tensor[few.start : few.stop])
    plain = plain_layout(spec, tensors)
    assert all(torch.equal(t, plain[n].float()) for n, t in CPU_KERNEL.dequantised(spec, packed).items())


_MEMORY = """
import sys, warnings
sys.path.insert(0, "tests")
warnings.simplefilter("ignore")
import torch
from families import tiny_model
import ktfx
from test_release_packed import EAGER, rules

def status(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) << 10

weights, layers = sys.argv[1], 6
model = tiny_model("qwen3_moe", layers=layers, hidden_size=512, moe_intermediate_size=1024, num_experts=8)
experts = [p for n, p in model.named_parameters() if ".experts." in n]
layer = sum(p.numel() * 4 for p in experts) // layers
experts.clear()
ktfx.compile(tiny_model("qwen3_moe", layers=1), rules(weights), release_host="lossy", **EAGER)  # loads all code
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts anew
ktfx.compile(model, rules(weights), release_host="lossy", **EAGER)
packed = sum(e.nbytes for e in ktfx.state_of(model).store.entries())
print(layer, layers, packed, status("VmHWM") - before, status("VmRSS") - before)
"""


@pytest.mark.parametrize("weights", ["model", pytest.param("int4", marks=pytest.mark.slow)])
def test_memory_never_holds_a_second_copy_of_more_than_a_layer(weights):
    """Six layers of 48 MiB: at the peak one packed layer more than before, at the end the packed bytes alone."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, weights], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    layer, layers, packed, peak, after = map(int, done.stdout.split())
    slack = layer // 2
    assert layer == 48 << 20 and packed >= layer * layers // 8
    assert peak < packed // layers + slack, f"{peak >> 20} MiB above the model's own memory at the peak"
    assert after < packed - layer * layers + slack, f"{after >> 20} MiB more than before at the end"

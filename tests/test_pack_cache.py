"""Packed weights on disk: found again, refused when they are others or damaged, never half written."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from families import tiny_model
from safetensors import safe_open
from safetensors.torch import save_file

import ktfx
from ktfx.errors import KtfxWarning, OptionError
from ktfx.ops.experts import ExpertsSpec
from ktfx.ops.experts_cpu import CPU_KERNEL
from ktfx.pack_cache import PackCache, cache_path, fingerprint, header_of, save_packed
from ktfx.weight_requests import PackedRequest

SPEC = ExpertsSpec(3, 40, 24, weights="int4", has_bias=True)
TENSORS = {
    "gate_up": torch.randn(3, 48, 40).bfloat16(),
    "down": torch.randn(3, 40, 24).bfloat16(),
    "gate_up_bias": torch.randn(3, 48).bfloat16(),
    "down_bias": torch.randn(3, 40).bfloat16(),
}
PARTS = tuple((name, f"experts.{name}") for name in TENSORS)
REQUEST = PackedRequest("cpu", SPEC, PARTS)
HOST = torch.device("cpu")


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_second_time_comes_from_the_file(tmp_path):
    first = PackCache(tmp_path)
    packed = first.packed(REQUEST, TENSORS, HOST)
    second = PackCache(tmp_path)
    again = second.packed(REQUEST, TENSORS, HOST)
    assert same(packed, again) and same(packed, REQUEST.pack(TENSORS, HOST))
    assert (first.read, first.written, second.read, second.written) == (0, 1, 1, 0)
    assert second.report() == {"directory": str(tmp_path), "read": 1, "written": 0, "damaged": []}
    path = cache_path(tmp_path, header_of(REQUEST, TENSORS))
    assert list(tmp_path.iterdir()) == [path], "a partial file is left"
    x, ids, weights = torch.randn(4, 40), torch.randint(0, 3, (4, 2)), torch.rand(4, 2)
    calls = [CPU_KERNEL.forward(SPEC, x, ids, weights, p) for p in (packed, again)]
    assert torch.equal(*calls)


@pytest.mark.parametrize("change", ["number", "part", "format", "group", "activations", "dtype"])
def test_other_weights_or_another_spec_are_packed_for_themselves(tmp_path, change):
    cache = PackCache(tmp_path)
    cache.packed(REQUEST, TENSORS, HOST)
    tensors, spec = {k: t.clone() for k, t in TENSORS.items()}, SPEC
    if change == "number":
        tensors["down"][2, 39, 23] += 1
    elif change == "part":
        tensors["down_bias"][0, 0] += 1
    elif change == "dtype":
        tensors = {k: t.half() for k, t in tensors.items()}
    else:
        key, value = {
            "format": ("weights", "mxfp4"),
            "group": ("weights", "int4-g32"),
            "activations": ("activations", "int8"),
        }[change]
        spec = ExpertsSpec(**{**SPEC.__dict__, key: value})
    request = PackedRequest("cpu", spec, PARTS)
    assert same(cache.packed(request, tensors, HOST), request.pack(tensors, HOST))
    assert (cache.read, cache.written) == (0, 2)


def test_strides_do_not_change_the_fingerprint():
    spread = {k: t.transpose(0, 1).contiguous().transpose(0, 1) for k, t in TENSORS.items()}
    assert not spread["down"].is_contiguous()
    assert fingerprint(TENSORS) == fingerprint(spread) and len(fingerprint(spread)) == 64


@pytest.mark.parametrize("damage", ["flip", "truncate", "garbage", "other weights", "wrong shape", "missing tensor"])
def test_a_damaged_file_is_packed_anew_with_a_warning(tmp_path, damage):
    cache = PackCache(tmp_path)
    want = cache.packed(REQUEST, TENSORS, HOST)
    told = header_of(REQUEST, TENSORS)
    path = cache_path(tmp_path, told)
    data = bytearray(path.read_bytes())
    with safe_open(path, framework="pt") as file:
        tensors, header = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    if damage == "flip":
        data[-200] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-100])
    elif damage == "garbage":
        path.write_bytes(b"not safetensors")
    elif damage == "other weights":
        save_packed(path, {**told, "weights": "0" * 64}, want)
    else:
        tensors |= {"0": tensors["0"][:2].contiguous()} if damage == "wrong shape" else {}
        if damage == "missing tensor":
            del tensors["0"]
        save_file(tensors, path, metadata=header)
    with pytest.warns(KtfxWarning, match="cannot be used"):
        assert same(cache.packed(REQUEST, TENSORS, HOST), want)
    assert cache.damaged == [str(path)] and cache.written == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(cache.packed(REQUEST, TENSORS, HOST), want)
    assert cache.read == 1


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "f.safetensors"
    packed, told = REQUEST.pack(TENSORS, HOST), header_of(REQUEST, TENSORS)
    save_packed(path, told, packed)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        save_packed(path, told, packed)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    empty = PackCache(tmp_path / "other")
    with pytest.warns(KtfxWarning, match="cannot be written"):
        assert same(empty.packed(REQUEST, TENSORS, HOST), packed)
    assert empty.written == 0


@pytest.mark.parametrize("release", [pytest.param(False, marks=pytest.mark.slow), "lossy"])
def test_a_model_compiled_again_reads_its_packs(tmp_path, release):
    ids = torch.randint(2, 90, (1, 7), generator=torch.Generator().manual_seed(1))
    rules = {
        "ktfx": 1,
        "devices": {"gpu0": "cuda:0", "host": "cpu"},
        "default_device": "gpu0",
        "rules": [{"match": {"module": "experts"}, "replace": {"op": "experts.cpu", "weights": "int4"}}],
    }
    counts, logits = [], []
    for _ in range(2):
        torch._dynamo.reset()
        model = tiny_model("qwen3_moe", layers=2)
        ktfx.compile(
            model, rules, simulate="cpu", partition_backend="eager", pack_cache=tmp_path / "c", release_host=release
        )
        with torch.no_grad():
            logits.append(model(ids, use_cache=False).logits)
        cache = ktfx.state_of(model).store.pack_cache
        counts.append((cache.read, cache.written))
    assert counts == [(0, 2), (2, 0)] and torch.equal(*logits)


def test_a_directory_that_cannot_be_is_an_option_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="pack_cache"):
        ktfx.compile(torch.nn.Linear(2, 2), {}, pack_cache=tmp_path / "file" / "below")
    with pytest.raises(OptionError, match="pack_cache"):
        ktfx.compile(torch.nn.Linear(2, 2), {}, pack_cache=7)

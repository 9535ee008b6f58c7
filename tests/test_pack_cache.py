"""Packed weights on disk: found again, refused when they are others or damaged, never half written."""

import os

import pytest
import torch

from ktfx.ops.experts import ExpertsSpec
from ktfx.ops.experts_cpu import CPU_KERNEL
from ktfx.pack_cache import cache_path, cached, fingerprint, load_packed, save_packed

SPEC = ExpertsSpec(3, 40, 24, weights="int4", has_bias=True)
TENSORS = {
    "gate_up": torch.randn(3, 48, 40).bfloat16(),
    "down": torch.randn(3, 40, 24).bfloat16(),
    "gate_up_bias": torch.randn(3, 48).bfloat16(),
    "down_bias": torch.randn(3, 40).bfloat16(),
}
METAS = CPU_KERNEL.packed_meta(SPEC, torch.bfloat16)


def pack():
    return CPU_KERNEL.pack(SPEC, TENSORS, torch.device("cpu"))


def test_the_second_time_comes_from_the_file(tmp_path):
    first = cached(tmp_path, SPEC, "w", METAS, pack)
    again = cached(tmp_path, SPEC, "w", METAS, lambda: pytest.fail("packed again"))
    assert len(first) == len(again) and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [p.name for p in tmp_path.iterdir()] == [cache_path(tmp_path, SPEC, "w").name], "a partial file is left"
    x, ids, weights = torch.randn(4, 40), torch.randint(0, 3, (4, 2)), torch.rand(4, 2)
    assert torch.equal(
        CPU_KERNEL.forward(SPEC, x, ids, weights, again), CPU_KERNEL.forward(SPEC, x, ids, weights, first)
    )


def test_another_spec_or_other_weights_are_not_taken(tmp_path):
    path = tmp_path / "f.safetensors"
    save_packed(path, SPEC, "w", pack())
    assert load_packed(path, SPEC, "w", METAS) is not None
    assert load_packed(path, SPEC, "v", METAS) is None
    assert load_packed(path, ExpertsSpec(3, 40, 24, weights="int4-g32", has_bias=True), "w", METAS) is None
    assert load_packed(path, SPEC, "w", METAS[:-1]) is None
    assert load_packed(tmp_path / "none", SPEC, "w", METAS) is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "garbage"])
def test_a_damaged_file_is_packed_anew(tmp_path, damage):
    cached(tmp_path, SPEC, "w", METAS, pack)
    path = cache_path(tmp_path, SPEC, "w")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-200] ^= 1
    elif damage == "truncate":
        del data[-100:]
    else:
        data = bytearray(b"not safetensors")
    path.write_bytes(data)
    calls = []
    packed = cached(tmp_path, SPEC, "w", METAS, lambda: calls.append(1) or pack())
    assert calls and all(torch.equal(a, b) for a, b in zip(packed, pack(), strict=True))
    assert load_packed(path, SPEC, "w", METAS) is not None


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "f.safetensors"
    save_packed(path, SPEC, "w", pack())
    before = path.read_bytes()

    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        save_packed(path, SPEC, "w", pack())
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_fingerprint_follows_the_files(tmp_path):
    a = tmp_path / "a"
    a.write_bytes(b"one")
    first = fingerprint([a], "layers.0")
    assert fingerprint([a], "layers.0") == first != fingerprint([a], "layers.1")
    a.write_bytes(b"three")
    assert fingerprint([a], "layers.0") != first

"""fuse_norms: the three kinds of RMS norm in both dtypes, sums before them, what is left alone and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pass_runs import PassRun, run_passes
from torch import nn

from ktfx.errors import PassError

GPU = {"devices": {"gpu0": "cuda:0", "host": "cpu"}, "default_device": "gpu0", "rules": []}
TOLERANCE = {torch.float32: dict(atol=1e-5, rtol=1e-5), torch.bfloat16: dict(atol=2e-2, rtol=2e-2)}


class Norm(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.eps = 1e-5

    def unit(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class LlamaRMSNorm(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * self.unit(x.to(torch.float32)).to(x.dtype)


class LateRMSNorm(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * self.unit(x.to(torch.float32))).to(x.dtype)


class LateCastRMSNorm(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.unit(x.float()) * self.weight.float()).type_as(x)


class GemmaRMSNorm(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.unit(x.float()) * (1.0 + self.weight.float())).type_as(x)


class WholeRMSNorm(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (8,), self.weight, self.eps)


class ScalelessRMSNorm(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.unit(x.float()).type_as(x)


class Stream(nn.Module):
    """Two norms with a residual sum before the second, as decoder layers have it."""

    def __init__(self, kind: type[Norm]) -> None:
        super().__init__()
        self.first_norm, self.second_norm = kind(), kind()
        self.proj = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.proj(self.first_norm(x))
        return x + self.proj(self.second_norm(x))


class Model(nn.Module):
    def __init__(self, kind: type[Norm]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Stream(kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


def run(kind: type[Norm], dtype: torch.dtype = torch.float32, rules: dict[str, Any] = GPU, **more: Any) -> PassRun:
    done = run_passes(
        Model(kind).to(dtype), rules, torch.randn(2, 3, 8, dtype=dtype), passes=("resolve_rules", "fuse_norms"), **more
    )
    torch.testing.assert_close(done.out, done.expected, **TOLERANCE[dtype])
    return done


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (LlamaRMSNorm, "llama"),
        (LateRMSNorm, "late"),
        (LateCastRMSNorm, "late"),
        (WholeRMSNorm, "late"),
        (GemmaRMSNorm, "gemma"),
    ],
)
def test_kinds(kind: type[Norm], name: str, dtype: torch.dtype) -> None:
    done = run(kind, dtype)
    assert done.ops["ktfx.rms_norm.default"] == 1 and done.ops["ktfx.add_rms_norm.default"] == 1
    assert done.ops["aten.rsqrt.default"] == 0 and done.ops["aten._to_copy.default"] == 0
    # In float32 nothing is rounded between, so llama and late are one.
    names = {"llama", "late"} if dtype == torch.float32 and name != "gemma" else {name}
    calls = [n for n in done.after.graph.nodes if "rms_norm" in str(n.target)]
    assert {n.args[-1] for n in calls} <= names and {n.args[-2] for n in calls} == {1e-5}
    assert [r.module for r in done.context.rewrites] == ["model.first_norm", "model.second_norm", "model.second_norm"]
    assert not done.context.misses


def test_the_graph(golden: Callable[[str, str], None]) -> None:
    golden("fuse_norms.diff", run(LlamaRMSNorm, torch.bfloat16).diff())


def test_sums_may_stay() -> None:
    from ktfx.passes.fuse_norms import FuseNorms

    done = run(LlamaRMSNorm, options={"fuse_norms": FuseNorms.Options(residual=False)})
    assert done.ops["ktfx.rms_norm.default"] == 2 and done.ops["ktfx.add_rms_norm.default"] == 0


def test_on_the_host_the_compiler_fuses() -> None:
    done = run(LlamaRMSNorm, rules={"rules": []})
    assert not done.context.rewrites and not done.context.misses
    from ktfx.passes.fuse_norms import FuseNorms

    done = run(LlamaRMSNorm, rules={"rules": []}, options={"fuse_norms": FuseNorms.Options(device="any")})
    assert len(done.context.rewrites) == 3


def test_each_device_by_its_own() -> None:
    rules = {**GPU, "rules": [{"match": {"name": "second_norm$"}, "replace": {"device": "host"}}]}
    done = run(LlamaRMSNorm, rules=rules)
    assert [r.module for r in done.context.rewrites] == ["model.first_norm"]


def test_a_norm_without_weight_is_a_miss() -> None:
    done = run(ScalelessRMSNorm, torch.bfloat16)
    assert not done.context.rewrites
    assert [m.module for m in done.context.misses] == ["model.first_norm", "model.second_norm"]
    assert "nearest at" in done.context.misses[0].why


def test_symbolic_length() -> None:
    assert len(run(LlamaRMSNorm, torch.bfloat16, dynamic_dims=(1,)).context.rewrites) == 3


def test_bisection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTFX_BISECT_LIMIT", "1")
    done = run(LlamaRMSNorm)
    assert [r.number for r in done.context.rewrites] == [1]


def test_an_unknown_device() -> None:
    from ktfx.passes.fuse_norms import FuseNorms

    with pytest.raises(PassError, match=r"no device 'cudda'.*did you mean 'cuda'"):
        run(LlamaRMSNorm, options={"fuse_norms": FuseNorms.Options(device="cudda")})


@pytest.mark.slow
def test_sums_at_layer_borders_stay_where_layers_lie_on_several_devices() -> None:
    from families import tiny_model
    from parity import run_steps, static_cache, two_gpus_host

    import ktfx

    def sums(rules: dict[str, Any]) -> tuple[int, str]:
        torch._dynamo.reset()
        model = tiny_model("qwen3_moe", layers=4)
        ktfx.compile(model, rules, simulate="cpu", partition_backend="eager")
        run_steps(model, torch.arange(2, 7)[None], 1, static_cache(model, 12))
        (record,) = [r for r in ktfx.state_of(model).graphs[-1].records if r.name == "fuse_norms"]
        made = [r for r in record.rewrites if r.what.startswith("sum")]
        return len(made), " ".join(m.why for m in record.misses)

    one = {"ktfx": 1, "devices": {"gpu0": "cuda:0"}, "default_device": "gpu0", "rules": []}
    assert sums(one)[0] == 8, "two a layer: inside it, and at its end"
    assert sums({**two_gpus_host(4), "rules": []})[0] == 4, "inside each layer alone"

"""The error report: measured from what kernels really keep, before and after a compile, and in ``ktfx explain``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import tiny_model
from parity import DEVICES
from typer.testing import CliRunner

import ktfx
from ktfx.cli.main import app
from ktfx.formats import quantize, relative_error
from ktfx.ops import load_ops
from ktfx.quantisation_errors import planned_errors
from ktfx.resolve import resolve
from ktfx.ruleset import load_ruleset

RULES: dict[str, Any] = {
    "ktfx": 1,
    "devices": DEVICES,
    "default_device": "gpu0",
    "rules": [
        {"match": {"name": "q_proj$"}, "replace": {"op": "linear.triton", "weights": "int8"}},
        {"match": {"name": "lm_head$"}, "replace": {"op": "linear.triton"}},
        {"match": {"module": "linear"}, "replace": {"op": "linear.cpu", "weights": "int4-g32"}},
        {"match": {"module": "experts"}, "replace": {"op": "experts.triton", "weights": "fp8"}},
    ],
}


def test_the_figures_are_those_of_the_formats() -> None:
    load_ops()
    model = tiny_model("qwen3_moe", layers=1)
    found = {e.name: e for e in planned_errors(model, resolve(load_ruleset(RULES), model))}
    prefix = "model.layers.0"
    q = model.get_parameter(f"{prefix}.self_attn.q_proj.weight").detach()
    up = model.get_parameter(f"{prefix}.mlp.experts.gate_up_proj").detach()
    one = found[f"{prefix}.self_attn.q_proj.weight"]
    assert (one.format, one.module) == ("linear.triton:int8", f"{prefix}.self_attn.q_proj")
    assert one.error == pytest.approx(relative_error(q, quantize(q, "int8", search=True)), rel=1e-5)
    k = model.get_parameter(f"{prefix}.self_attn.k_proj.weight").detach()
    rounded = relative_error(k, quantize(k, "int4-g32", search=True))
    assert found[f"{prefix}.self_attn.k_proj.weight"].error == pytest.approx(rounded, rel=1e-5)
    experts = found[f"{prefix}.mlp.experts.gate_up_proj"]
    assert experts.error == pytest.approx(relative_error(up, quantize(up, "fp8")), rel=1e-5)
    assert len(found) == 6, "q, k, v, o, and the experts' two; the head keeps every bit"


def test_after_a_compile() -> None:
    torch._dynamo.reset()
    model = tiny_model("qwen3_moe", layers=1)
    planned = {(e.name, e.format): e.error for e in planned_errors(model, resolve(load_ruleset(RULES), model))}
    ktfx.compile(model, RULES, simulate="cpu", partition_backend="eager")
    assert ktfx.state_of(model).quantisation_errors() == []
    with torch.no_grad():
        model(torch.arange(2, 9)[None], use_cache=False)
    found = ktfx.state_of(model).quantisation_errors()
    assert {(e.name, e.format): e.error for e in found} == pytest.approx(planned)
    assert {e.device for e in found} == {"gpu0", "host"}


@pytest.mark.parametrize("family", ["gpt_oss"])
def test_transposed_and_interleaved_experts(family: str) -> None:
    load_ops()
    model = tiny_model(family, layers=1)
    rules = {**RULES, "rules": RULES["rules"][3:]}
    errors = [e.error for e in planned_errors(model, resolve(load_ruleset(rules), model))]
    assert len(errors) == 2 and all(e is not None and 0.01 < e < 0.05 for e in errors)


def test_explain(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(RULES, sort_keys=False))
    shown = CliRunner().invoke(app, ["explain", str(file), "--errors"])
    assert shown.exit_code == 0, shown.output
    assert "relative error" in shown.output and "linear.cpu:int4-g32" in shown.output
    data = CliRunner().invoke(app, ["explain", str(file), "--errors", "--json"])
    entries = json.loads(data.stdout)["quantisation_errors"]
    assert all(0 < e["error"] < 0.2 for e in entries)
    without = CliRunner().invoke(app, ["explain", str(file), "--json"])
    assert "quantisation_errors" not in json.loads(without.stdout)

"""``ktfx passes``, ``ktfx pipeline`` and ``ktfx diff``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from debug_models import tiny_session
from typer.testing import CliRunner

from ktfx.cli.main import app
from ktfx.debug.pipeline import pass_rows, resolved_pipeline
from ktfx.debug.tracing import write_session
from ktfx.errors import RuleError
from ktfx.pass_manager import DEFAULT_PIPELINE

FILE = """\
ktfx: 1
devices: {gpu0: cuda:0, host: cpu}
default_device: gpu0
passes:
  - rewrite_experts
  - partition_by_device:
      layers_per_unit: 2
rules:
  - match: {module: experts}
    replace: {op: experts.reference, device: host}
"""


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trace")
    write_session(tiny_session(), directory)
    return directory


def test_passes_lists_every_registered_pass_with_its_options() -> None:
    rows = {r.name: r for r in pass_rows()}
    assert list(rows)[: len(DEFAULT_PIPELINE)] == list(DEFAULT_PIPELINE)
    row = rows["partition_by_device"]
    assert row.file.endswith("passes/partition_by_device.py") and row.line > 1
    assert row.requires == ("insert_transfers",) and row.required and row.numerics_preserving
    option = row.options[0]
    assert (option.name, option.type, option.default) == ("layers_per_unit", "int", 1)
    assert option.description.startswith("how many layers")
    result = CliRunner().invoke(app, ["passes", "--json"])
    assert {r["name"] for r in json.loads(result.stdout)} == set(rows)


def test_pipeline_names_the_line_of_every_value(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(FILE)
    steps = resolved_pipeline(str(path))
    assert [s.name for s in steps] == [
        "resolve_rules",
        "rewrite_experts",
        "assign_devices",
        "insert_transfers",
        "partition_by_device",
    ]
    by_name = {s.name: s for s in steps}
    assert by_name["rewrite_experts"].origin.startswith(f"{path}:5")
    assert by_name["resolve_rules"].origin == "required"
    value = by_name["partition_by_device"].options[0]
    assert value.value == 2 and value.origin.startswith(f"{path}:7")
    path.write_text(
        FILE.replace("passes:\n  - rewrite_experts\n  - partition_by_device:\n      layers_per_unit: 2\n", "")
    )
    steps = resolved_pipeline(str(path))
    assert {s.origin for s in steps} == {"default pipeline"}
    assert "partition_by_device.py:" in steps[-1].options[0].origin


def test_pipeline_refuses_what_a_compile_would(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(FILE.replace("layers_per_unit", "layers_per_unti"))
    with pytest.raises(RuleError, match="did you mean 'layers_per_unit'"):
        resolved_pipeline(str(path))
    result = CliRunner().invoke(app, ["pipeline", str(path), "--json"])
    assert result.exit_code == 3 and json.loads(result.stdout)["error"]["kind"] == "RuleError"


def test_diff_of_a_pass(traced: Path) -> None:
    result = CliRunner().invoke(app, ["diff", str(traced), "rewrite_experts", "--phase", "prefill", "--json"])
    (found,) = json.loads(result.stdout)["comparisons"]
    ops = {o["op"]: (o["before"], o["after"]) for o in found["ops"]}
    assert ops["ktfx.routed_experts.default"] == (0, 2)
    assert len(found["rewrites"]) == 2
    assert found["added_in"] == {"model.layers.0.mlp.experts": 1, "model.layers.1.mlp.experts": 1}
    assert "model_layers_0_mlp_experts" in found["added"] and "histc" in found["removed"]
    shown = CliRunner().invoke(app, ["diff", str(traced), "2", "--phase", "prefill"])
    assert "ktfx.routed_experts.default" in shown.stdout and "rewrite 1:" in shown.stdout
    wrong = CliRunner().invoke(app, ["diff", str(traced), "rewrite_expert"])
    assert wrong.exit_code == 2 and "rewrite_experts" in wrong.output


def test_diff_of_two_traces(traced: Path, tmp_path: Path) -> None:
    same = CliRunner().invoke(app, ["diff", str(traced), str(traced), "--json"])
    assert all(not c["added"] and not c["removed"] and not c["text"] for c in json.loads(same.stdout)["comparisons"])
    edited = tmp_path / "edited"
    write_session(tiny_session(), edited)
    manifest = json.loads((edited / "prefill" / "trace.json").read_text())
    node = next(n for n in manifest["graph"]["nodes"] if n["name"] == "softmax")
    node["text"] = node["text"].replace("-1", "0")
    (edited / "prefill" / "trace.json").write_text(json.dumps(manifest))
    result = CliRunner().invoke(app, ["diff", str(traced), str(edited), "--phase", "prefill", "--json"])
    first = json.loads(result.stdout)["comparisons"][0]
    assert first["changed"] == ["softmax"] and "softmax" in first["text"]

"""Planted faults: a wrong rewrite in one layer of 48 is found by bisect, by numerics and by verify."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from planted import FAULTS, LAYERS, inputs, planted_model, planted_rules, planted_session
from typer.testing import CliRunner

import ktfx
from ktfx.cli.main import app
from ktfx.debug.bisect import bisect, command_oracle, numerics_oracle
from ktfx.debug.numerics import numerics, plot
from ktfx.debug.replay import PassFailure, Replay
from ktfx.debug.session import Session
from ktfx.errors import KtfxError, OptionError, PassError, VerifyError
from ktfx.graph import info
from ktfx.pass_manager import build_pipeline
from ktfx.ruleset import load_ruleset
from ktfx.verify import check_passes

LAYER = 31


@functools.cache
def _captured() -> Session:
    """One capture serves every fault: the passes are replayed on it."""
    return planted_session("none", LAYERS, LAYER)


def _replay(fault: str) -> Replay:
    session = _captured()
    replay = Replay.of(session.state, session.compiled[0])
    rules = load_ruleset(planted_rules(fault, LAYER))
    object.__setattr__(replay.state.ruleset, "passes", rules.passes)
    return replay


@pytest.fixture(autouse=True)
def _no_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("KTFX_BISECT_LIMIT", raising=False)
    monkeypatch.delenv("KTFX_BISECT_PASSES", raising=False)
    yield


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=pytest.mark.slow) if f == "wrong_literal" else f for f in FAULTS]
)
def test_bisect_finds_the_rewrite_in_log2_runs(fault: str) -> None:
    oracle = numerics_oracle([_replay(fault)])
    found = bisect(oracle)
    assert found.number == LAYER + 1 and found.total == LAYERS
    assert f"'layers.{LAYER}." in found.what
    assert found.pass_name == "plant"
    assert len(found.probes) <= 3 + math.ceil(math.log2(LAYERS))
    assert found.phase == "prefill"
    assert found.variables == {"KTFX_BISECT_LIMIT": str(LAYER + 1), "KTFX_BISECT_PASSES": "1"}
    assert found.variables_before == {"KTFX_BISECT_LIMIT": str(LAYER), "KTFX_BISECT_PASSES": "1"}


@pytest.mark.parametrize("fault", FAULTS)
def test_numerics_names_the_first_pass_and_module(fault: str) -> None:
    report = numerics(_replay(fault))
    found = report.first_over
    assert found is not None
    name, border, _ = found
    assert name == "plant" and border is not None
    assert border.module.startswith(f"layers.{LAYER}.")
    json.dumps(report.to_json(), allow_nan=False)
    if fault != "wrong_device":
        before = report.columns[[c.name for c in report.columns].index("plant") - 1]
        assert all(error <= report.tolerances[key] for key, error in before.errors.items())


def test_numerics_passes_a_right_pipeline_and_plots_it() -> None:
    report = numerics(_replay("none"))
    assert report.first_over is None
    assert any(f"layers.{LAYER}.attention" == b.module for b in report.borders)
    assert all(set(c.errors) == {b.key for b in report.borders} for c in report.columns)
    drawing = plot(report)
    assert drawing.count("<polyline") == len(report.columns) + 1


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_finds_the_layer_of_48(fault: str) -> None:
    """What ``verify=True`` runs on the first call, on the one capture of the whole model."""
    replay = _replay(fault)
    args: list[object] = [None] * (1 + max(e.index for e in replay.context().captured.inputs.values()))
    for name, entry in replay.context().captured.inputs.items():
        if entry.index >= 0:
            args[entry.index] = replay.values[name]
    with pytest.raises((VerifyError, PassFailure)) as raised:
        run = replay.run()
        check_passes(run.records, args, run.context, replay.state.store)
    assert "plant" in str(raised.value)
    if fault == "lost_cache_update":
        # The graph's values are all right; the write of this layer's cache is not.
        assert f"output {LAYER} differs" in str(raised.value)
    else:
        assert f"layers.{LAYER}." in str(raised.value)


@pytest.mark.parametrize("fault", ["wrong_literal", "lost_cache_update"])
def test_verify_refuses_the_compiled_model(fault: str) -> None:
    layers, layer = 6, 4
    model = planted_model(layers)
    with pytest.raises((VerifyError, PassError)) as raised, torch.no_grad():
        ktfx.compile(model, planted_rules(fault, layer), simulate="cpu", partition_backend="eager", verify=True)
        model(*inputs())
    assert "plant" in str(raised.value)
    if fault != "lost_cache_update":
        assert f"layers.{layer}" in str(raised.value)


def test_a_right_model_has_nothing_to_bisect() -> None:
    oracle = numerics_oracle([_replay("none")])
    with pytest.raises(OptionError, match="the result is good"):
        bisect(oracle)


def test_bisect_names_a_pass_that_counts_no_rewrites() -> None:
    from ktfx.debug.bisect import Verdict

    asked = []

    def oracle(limit: int | None, passes: int | None) -> Verdict:
        asked.append((limit, passes))
        return Verdict(passes is not None and passes < 3, "", 4, 0, {-3: "fuse_nothing"})

    found = bisect(oracle)
    assert (found.number, found.pass_number, found.pass_name) == (None, 3, "fuse_nothing")
    assert found.variables == {"KTFX_BISECT_PASSES": "3"}


@pytest.mark.parametrize("wrong", [1, 2, 511, 512, 999, 1000])
def test_a_thousand_rewrites_take_about_ten_runs(wrong: int) -> None:
    from ktfx.debug.bisect import Verdict

    def oracle(limit: int | None, passes: int | None) -> Verdict:
        ran = 1000 if limit is None else min(limit, 1000)
        return Verdict(ran < wrong or passes == 0, "", 1, 1000, {n: f"number {n}" for n in range(1, 1001)})

    found = bisect(oracle)
    assert found.number == wrong and found.what == f"number {wrong}"
    assert len(found.probes) <= 13


def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTFX_BISECT_PASSES", "three")
    with pytest.raises((KtfxError, Exception), match="is no number"):
        _replay("none").run()


def test_the_passes_that_are_replayed_are_those_of_the_rules() -> None:
    names = [p.name for p in build_pipeline(_replay("wrong_literal").state.ruleset.passes)]
    run = _replay("wrong_literal").run()
    assert [r.name for r in run.records] == names
    assert run.count == LAYERS
    assert {info(n).layer for n in run.final.graph.nodes} >= set(range(LAYERS))


@pytest.mark.slow
def test_bisect_by_a_commands_exit_code() -> None:
    script = Path(__file__).parent / "planted_script.py"
    oracle = command_oracle([sys.executable, str(script), "wrong_literal", "5", "3"])
    found = bisect(oracle)
    assert found.number == 4 and "'layers.3." in found.what and found.pass_name == "plant"


@pytest.mark.slow
def test_numerics_command_on_the_demo_model(tmp_path: Path) -> None:
    drawing = tmp_path / "errors.svg"
    result = CliRunner().invoke(
        app, ["numerics", "demo", "--rules", "generic-host", "--tokens", "4", "--json", "--plot", str(drawing)]
    )
    assert result.exit_code == 0, result.output
    (graph,) = json.loads(result.stdout)["graphs"]
    assert graph["ok"] and graph["phase"] == "prefill"
    assert "rewrite_experts" in [p["name"] for p in graph["passes"]]
    assert drawing.read_text().startswith("<svg")

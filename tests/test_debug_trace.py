"""The trace on disk: programs that run and agree, diffs, reports, and files of others left alone."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import pytest
import torch
from debug_models import rules_file, tiny_model, tiny_session
from hypothesis import given
from hypothesis import strategies as st

from ktfx.debug.graph_diff import text_diff
from ktfx.debug.runtime import load_inputs, load_program, make_inputs
from ktfx.debug.trace_dir import find_pass, read_traces
from ktfx.debug.tracing import write_session
from ktfx.errors import OptionError
from ktfx.verify import relative_error


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trace")
    write_session(tiny_session(), directory, save_inputs=True)
    return directory


def _outputs(program: Path, inputs: Path | None) -> list[object]:
    forward, declared = load_program(program)
    with torch.no_grad():
        return list(forward(*make_inputs(declared, load_inputs(inputs) if inputs else None)))


@pytest.mark.parametrize("saved", [True, False])
def test_every_dumped_program_runs_and_computes_the_same(traced: Path, saved: bool) -> None:
    for trace in read_traces(traced):
        inputs = trace.folder / "inputs.pt" if saved else None
        first = _outputs(trace.passes[0].folder / "before.py", inputs)
        assert any(isinstance(v, torch.Tensor) and float(v.double().norm()) > 0 for v in first)
        for entry in trace.passes:
            after = _outputs(entry.folder / "after.py", inputs)
            assert len(after) == len(first)
            for want, got in zip(first, after, strict=True):
                if isinstance(want, torch.Tensor):
                    assert isinstance(got, torch.Tensor)
                    assert relative_error(got, want) < 1e-5, (entry.folder, got.shape)


def test_saved_inputs_give_what_the_model_computed(traced: Path) -> None:
    session = tiny_session()
    trace = read_traces(traced)[0]
    logits = _outputs(trace.passes[-1].folder / "after.py", trace.folder / "inputs.pt")[-1]
    assert isinstance(logits, torch.Tensor)
    assert relative_error(logits[:, -1], session.outputs.logits[0]) < 1e-5


def test_programs_show_shapes_modules_devices_rules_and_source_lines(traced: Path) -> None:
    folder = find_pass(read_traces(traced)[0], "insert_transfers").folder
    text = (folder / "after.py").read_text()
    assert "# ── model.layers.0.mlp.experts (Qwen3MoeExperts) on host, rule 1" in text
    assert "modeling_qwen3_moe.py:" in text
    assert "# f32[1, 5, 64]" in text
    assert "ktfx.transfer.default(" in text


def test_the_diff_holds_the_rewrite_and_reports_count_it(traced: Path) -> None:
    entry = find_pass(read_traces(traced)[0], "2")
    diff = (entry.folder / "graph.diff").read_text()
    assert "\n+    model_layers_0_mlp_experts = ktfx.routed_experts.default(" in diff
    assert "\n-    topk" not in diff
    report = json.loads((entry.folder / "report.json").read_text())
    assert [r["module"] for r in report["rewrites"]] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    first = report["rewrites"][0]
    assert first["line"] == 6 and first["file"] == str(rules_file())
    assert first["yaml"][0].strip().startswith("- match: {module: experts}")
    assert set(first["nodes_before"]) <= {n.name for n in entry.before.nodes}
    assert set(first["nodes_after"]) <= {n.name for n in entry.after.nodes}


def _patched(old: list[str], diff: str) -> list[str]:
    """What `patch` makes of a text; every context and removed line must be where the diff says."""
    new: list[str] = []
    at = 0
    for line in diff.splitlines()[2:]:
        if line.startswith("@@"):
            start, _, length = line.split()[1][1:].partition(",")
            place = int(start) - (1 if length != "0" else 0)
            new += old[at:place]
            at = place
        elif line.startswith("+"):
            new.append(line[1:])
        else:
            assert old[at] == line[1:]
            at += 1
            if line.startswith(" "):
                new.append(line[1:])
    return [*new, *old[at:]]


@given(st.lists(st.sampled_from("abcdefgh")), st.lists(st.sampled_from("abcdefgh")), st.integers(0, 3))
def test_a_diff_turns_one_text_into_the_other(old: list[str], new: list[str], context: int) -> None:
    diff = text_diff("\n".join(["title", *old]), "\n".join(["title", *new]), "old", "new", context)
    assert _patched(old, diff) == new
    assert (diff == "") == (old == new)


def test_a_diff_of_lines_that_are_unique_is_the_usual_one() -> None:
    old = [f"line {i}" for i in range(60)]
    new = [*old[:5], "added", *old[5:20], *old[23:40], "another", *old[41:]]
    found = text_diff("\n".join(["t", *old]), "\n".join(["t", *new]), "old", "new")
    assert found.splitlines() == list(difflib.unified_diff(old, new, "old", "new", lineterm=""))


def test_a_trace_read_back_is_the_graphs_that_were_written(traced: Path) -> None:
    from ktfx.debug.snapshot import snapshot

    for trace, graph in zip(read_traces(traced), tiny_session().graphs, strict=True):
        assert graph.context is not None
        for entry, record in zip(trace.passes, graph.records, strict=True):
            assert record.graph_after is not None
            want = snapshot(record.graph_after, graph.context.captured.inputs)
            assert [n.text for n in entry.after.nodes] == [n.text for n in want.nodes]
            assert [n.device for n in entry.after.nodes] == [n.device for n in want.nodes]


def test_a_second_trace_replaces_its_own_files_and_touches_no_other(tmp_path: Path) -> None:
    session = tiny_session()
    write_session(session, tmp_path)
    mine = tmp_path / "prefill" / "notes.txt"
    mine.write_text("keep me")
    write_session(session, tmp_path)
    assert mine.read_text() == "keep me"
    other = tmp_path / "other"
    other.mkdir()
    (other / "index.json").write_text("{}")
    with pytest.raises(OptionError, match="not of an earlier trace"):
        write_session(session, other)
    assert (other / "index.json").read_text() == "{}" and len(list(other.iterdir())) == 1


def test_a_directory_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is no trace"):
        read_traces(tmp_path)


def test_timeline_has_every_step_of_one_run(traced: Path) -> None:
    for trace, graph in zip(read_traces(traced), tiny_session().graphs, strict=True):
        timeline = trace.manifest["timeline"]
        assert len(timeline) == len(graph.built.program.steps)
        assert any(entry["step"].startswith("transfer") for entry in timeline)


def test_torch_trace_gets_every_pass(tmp_path: Path) -> None:
    import logging

    from torch._logging._internal import trace_log

    import ktfx

    seen: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            metadata = getattr(record, "metadata", {}) or {}
            if "artifact" in metadata:
                seen.append(metadata["artifact"]["name"])

    listener = Listener()
    trace_log.addHandler(listener)
    model = tiny_model(1)
    try:
        ktfx.compile(model, {"ktfx": 1, "default_device": "cpu"}, partition_backend="eager")
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]), use_cache=False)
    finally:
        trace_log.removeHandler(listener)
    ours = [name for name in seen if name.startswith("ktfx_")]
    assert ours[:2] == ["ktfx_prefill_000_captured", "ktfx_prefill_001_resolve_rules"]
    assert ours[-1].endswith("partition_by_device")

"""Repro directories are whole or absent and never overwrite; reduce keeps the same error; stats name what differed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from debug_models import tiny_session
from torch._functorch import config as functorch_config
from typer.testing import CliRunner

from ktfx.cli.main import app
from ktfx.debug.failure import Failure
from ktfx.debug.reduce import reduce
from ktfx.debug.repro import failure_of, read_repro, write_repro
from ktfx.debug.runtime import load_program, make_inputs
from ktfx.debug.session import Setup
from ktfx.debug.stats import CacheLookup, graph_stats, missed_because, remember_keys, remembered_keys, sharing
from ktfx.errors import OptionError

RULES = {
    "ktfx": 1,
    "default_device": "cpu",
    "rules": [
        {"match": {"name": "lm_head"}, "replace": {"device": "cpu"}},
        {
            "match": {"name": r"^model\.layers\.0\.mlp\.experts$"},
            "replace": {"op": "experts.reference", "weights": "int4"},
        },
    ],
}
FAILURE = Failure("PlacementError", "layer 3 cannot", "Traceback …")


def test_a_failure_is_written_whole_and_can_be_read_and_run(tmp_path: Path) -> None:
    setup = Setup(rules=RULES, layers=1, tiny=True, tokens=4)
    found = failure_of(setup, tmp_path / "graphs")
    assert found is not None
    failure, graph = found
    assert failure.kind == "PlacementError" and "int4" in failure.message
    path = write_repro(setup, failure, tmp_path / "repro", found=graph)
    written = {p.name for p in path.iterdir()}
    assert written >= {"repro.json", "rules.yaml", "pipeline.json", "graph.py", "error.txt", "run.sh"}
    assert {p.name for p in tmp_path.iterdir()} <= {"repro", "graphs"}
    forward, inputs = load_program(path / "graph.py")
    assert len(forward(*make_inputs(inputs))) > 0
    again = read_repro(path)
    assert again.setup == replace(setup, rules=again.setup.rules) and again.setup.rules == RULES
    assert failure_of(again.setup)[0].message == failure.message  # type: ignore[index]
    with pytest.raises(OptionError, match="exists"):
        write_repro(setup, failure, path)
    assert json.loads((path / "repro.json").read_text())["error"]["pattern"] == again.pattern
    assert "ktfx repro demo --tiny --rules rules.yaml --layers 1" in (path / "run.sh").read_text()


def test_nothing_is_left_behind_if_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("ktfx.debug.repro._write_about", broken)
    monkeypatch.setattr("ktfx.debug.repro._captured", lambda setup: (None, "no model"))
    with pytest.raises(OSError, match="disk full"):
        write_repro(Setup(), FAILURE, tmp_path / "repro")
    assert list(tmp_path.iterdir()) == []


def test_reduce_keeps_only_what_the_same_error_needs() -> None:
    def run(setup: Setup) -> Failure | None:
        assert isinstance(setup.rules, dict)
        if len(setup.rules["rules"]) == 0 or "cpu" not in str(setup.rules["rules"][-1]):
            return None
        if (setup.layers or 9) < 3:
            return Failure("PassError", "something else", "")
        return FAILURE

    rules = {"ktfx": 1, "rules": [{"match": {"name": str(i)}} for i in range(3)] + [{"replace": {"device": "cpu"}}]}
    setup = Setup(rules=rules, layers=8, tokens=16, phase="both", backend="inductor")
    small, failure, attempts = reduce(setup, FAILURE.pattern, run=run)
    assert failure == FAILURE
    assert (small.layers, small.tokens, small.phase, small.backend, small.tiny) == (3, 2, "prefill", "eager", True)
    assert isinstance(small.rules, dict) and small.rules["rules"] == [{"replace": {"device": "cpu"}}]
    assert any(not a.kept and "something else" in a.why for a in attempts)


def test_reduce_refuses_what_does_not_fail_as_it_did() -> None:
    with pytest.raises(OptionError, match="does not fail as it did: it did not fail"):
        reduce(Setup(), FAILURE.pattern, run=lambda setup: None)


def test_the_pattern_leaves_numbers_open() -> None:
    import re

    assert re.search(FAILURE.pattern, "PlacementError: layer 17 cannot")
    assert not re.search(FAILURE.pattern, "PlacementError: layer 17 can")


def test_stats_count_matches_passes_and_partitions() -> None:
    session = tiny_session()
    found = graph_stats(session.graphs[0], session.state)
    assert [(r["rule"], r["modules"], r["rewrites"]) for r in found["rules"]] == [("rule 1", 2, 2), ("rule 2", 1, 0)]
    assert found["units"] == len(session.graphs[0].built.units)
    assert sum(p["used_by"] for p in found["partitions"]) == found["units"]
    assert [p["name"] for p in found["passes"]] == [r.name for r in session.graphs[0].records]


def test_a_missed_key_names_the_part_that_differs() -> None:
    then = [CacheLookup("a", {"gm": ("1", "x + y"), "torch_version": ("2", "2.13")})]
    parts = {"gm": ("1", "x + y"), "torch_version": ("3", "2.14")}
    now = [CacheLookup("b", parts), CacheLookup("a", then[0].parts, "hit"), CacheLookup("b", parts)]
    missed, again = missed_because(now, then)
    assert missed["lookup"] == 0 and missed["nearest"] == "a" and not missed["this_run"]
    assert missed["differs_in"] == [{"part": "torch_version", "before": "2.13", "after": "2.14"}]
    assert again["lookup"] == 2 and again["nearest"] == "b" and again["this_run"] and again["differs_in"] == []
    assert missed_because(now[:1], []) == [
        {"lookup": 0, "key": "b", "nearest": None, "this_run": False, "differs_in": []}
    ]


def test_equal_units_are_counted_as_reused() -> None:
    session = tiny_session()
    found = sharing(session.graphs)
    assert found["units"] == sum(len(g.built.units) for g in session.graphs)
    assert found["compiled"] == sum(len(g.built.distinct) for g in session.graphs)
    assert found["reused"] == found["units"] - found["compiled"]


def test_keys_are_remembered_beside_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert remembered_keys() == []
    first, second = (CacheLookup(key, {"gm": (key, "x")}, "miss") for key in "ab")
    remember_keys([first], [])
    remember_keys([second, first], remembered_keys())
    assert remembered_keys() == [first, second]
    assert [p.name for p in tmp_path.iterdir()] == ["ktfx_keys.json"]


@pytest.mark.slow
def test_stats_tells_hits_from_misses_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor for real: a fresh cache misses, a second run hits, another prompt length misses in the graph."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    rules = tmp_path / "r.yaml"
    rules.write_text("ktfx: 1\ndevices: {host: cpu}\ndefault_device: host\n")

    def stats(tokens: int) -> dict[str, object]:
        words = ["stats", "demo", "-r", str(rules), "--tiny", "--layers", "1", "--phase", "prefill", "--json"]
        # Not by monkeypatch: what it takes back of torch's configuration is gone for the tests after this one.
        with functorch_config.patch(enable_autograd_cache=False):
            result = CliRunner().invoke(app, [*words, "--tokens", str(tokens)])
        assert result.exit_code == 0, result.output
        torch._dynamo.reset()
        return json.loads(result.stdout)

    first, again, longer = stats(4), stats(4), stats(6)
    count = first["inductor_cache"]["misses"]
    assert count > 0 and first["inductor_cache"]["hits"] == 0
    assert again["inductor_cache"]["hits"] == count and again["missed_because"] == []
    assert longer["inductor_cache"]["misses"] > 0
    assert any(
        part["part"] == "gm" or part["part"].startswith("example_inputs")
        for m in longer["missed_because"]
        for part in m["differs_in"]
    )

"""Passes and rewrites are numbered over a whole run, so that a number, and a printed command, names one graph's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from debug_models import RULES, tiny_model
from torch import fx
from typer.testing import CliRunner

from ktfx.cli.main import app
from ktfx.debug.bisect import bisect, numerics_oracle
from ktfx.debug.replay import Replay
from ktfx.debug.session import Session, Setup, environment, run, run_unrewritten
from ktfx.graph import info, insert_call
from ktfx.pass_manager import Pass, PassContext, Rewrite, RunCount, register_pass

SILU, NEG = torch.ops.aten.silu.default, torch.ops.aten.neg.default


@register_pass
class WrongDecode(Pass):
    """Makes every silu anew; in the generate graph's layer 1, as something else."""

    name = "wrong_decode"
    default = False

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        for node in gm.graph.find_nodes(op="call_function", target=SILU):
            about = info(node)
            if not context.allows("silu again", about.module):
                continue
            wrong = context.phase == "generate" and about.layer == 1
            with gm.graph.inserting_before(node):
                again = insert_call(gm.graph, NEG if wrong else SILU, node.args, like=node)
            node.replace_all_uses_with(again)
            gm.graph.erase_node(node)
            context.record(Rewrite("silu again", about.module))


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("numbering") / "r.yaml"
    path.write_text(RULES.replace("rules:\n", "passes: [match_patterns, wrong_decode]\nrules:\n", 1))
    return path


@pytest.fixture(scope="module")
def captured(rules: Path) -> Session:
    return run_unrewritten(Setup(rules=str(rules), simulate="cpu", phase="both", tokens=5), tiny_model())


def replays(session: Session) -> list[Replay]:
    return [Replay.of(session.state, graph) for graph in session.compiled]


def test_numbers_go_on_in_the_next_graph(captured: Session) -> None:
    count = RunCount()
    numbers = [
        [r.number for r in replay.run(count=count).context.rewrites if r.what == "silu again"]
        for replay in replays(captured)
    ]
    assert numbers == [[1, 2], [3, 4]] and count == RunCount(passes=4, rewrites=4)
    count = RunCount()
    ran = [
        len([r for r in replay.run(limit=3, count=count).context.rewrites if r.what == "silu again"])
        for replay in replays(captured)
    ]
    assert ran == [2, 1]


@pytest.mark.slow
def test_a_compile_counts_as_a_replay_does(rules: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with environment({"KTFX_BISECT_LIMIT": "3", "KTFX_BISECT_PASSES": "4"}):
        session = run(Setup(rules=str(rules), simulate="cpu", phase="both", tokens=5), tiny_model())
    numbers = [[r.number for p in g.records for r in p.rewrites if r.what == "silu again"] for g in session.graphs]
    assert numbers == [[1, 2], [3]]
    said = capfd.readouterr().out
    assert "running pass (4) wrong_decode in generate" in said
    assert "NOT running rewrite (4) silu again on 'model.layers.1.mlp" in said and said.rstrip().endswith("in generate")


def test_a_fault_of_the_decode_graph_is_found_there(captured: Session) -> None:
    found = bisect(numerics_oracle(replays(captured)))
    assert (found.number, found.pass_number, found.pass_name, found.phase) == (4, 4, "wrong_decode", "generate")
    assert found.total == 4
    assert found.variables == {"KTFX_BISECT_LIMIT": "4", "KTFX_BISECT_PASSES": "4"}


def test_a_resumed_run_is_the_whole_run(captured: Session) -> None:
    (replay, _) = replays(captured)
    places = []
    whole = replay.run(checkpoint=places.append)
    assert [place.done for place in places] == [1, 2, 3, 4]
    for place in places:
        again = replay.run(resume=place)
        assert again.context.count == whole.context.count
        assert str(again.final.graph) == str(whole.final.graph)


@pytest.mark.slow
def test_the_printed_command_reproduces_the_fault(tmp_path: Path) -> None:
    """Bisect prints a command of ktfx's; it fails, and the last good one does not."""
    path = tmp_path / "r.yaml"
    path.write_text("ktfx: 1\ndefault_device: cpu\npasses: [wrong_decode]\n")
    words = ["demo", "--rules", str(path), "--tiny", "--layers", "2", "--tokens", "4", "--phase", "both"]
    result = CliRunner().invoke(app, ["bisect", *words, "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["phase"], answer["pass"]) == ("generate", "wrong_decode")
    for key, code in (("reproduce", 1), ("last_good", 0)):
        variables, _, arguments = answer[key].partition(" ktfx ")
        again = CliRunner().invoke(app, arguments.split(), env=dict(v.split("=") for v in variables.split()))
        assert again.exit_code == code, (answer[key], again.output)

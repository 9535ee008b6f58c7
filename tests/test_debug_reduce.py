"""A failure writes its repro by itself; it runs without the model, and shrinks to the few nodes that show it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from planted import inputs, planted_model, planted_rules
from torch import fx, nn
from typer.testing import CliRunner

import ktfx
from ktfx.cli.main import app
from ktfx.debug.case import load_case, run_case, value_of
from ktfx.debug.reduce_graph import reduce_graph
from ktfx.debug.repro import read_repro
from ktfx.debug.runtime import load_program, make_inputs
from ktfx.errors import KtfxError, OptionError, PassError, VerifyError
from ktfx.graph import placeholders
from ktfx.pass_manager import Pass, PassContext, register_pass
from ktfx.verify import relative_error

LAYERS, LAYER = 4, 2
FILES = {"repro.json", "rules.yaml", "pipeline.json", "graph.py", "graph.json", "modules.pkl", "run.py", "error.txt"}


def _fail(fault: str, **options: object) -> KtfxError:
    model = planted_model(LAYERS)
    with pytest.raises((PassError, VerifyError)) as raised, torch.no_grad():
        ktfx.compile(model, planted_rules(fault, LAYER), simulate="cpu", partition_backend="eager", **options)
        model(*inputs())
    return raised.value


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repro of a pass that raises."""
    folder = tmp_path_factory.mktemp("repros")
    error = _fail("raises", repro_dir=str(folder))
    assert error.repro is not None and f"repro: {error.repro}" in str(error)
    return Path(error.repro)


def test_a_failing_pass_is_kept_whole_and_named_in_the_error(failed: Path) -> None:
    assert {p.name for p in failed.iterdir()} == FILES
    assert failed.name == "prefill-pass-PassError" and [p.name for p in failed.parent.iterdir()] == [failed.name]
    about = json.loads((failed / "repro.json").read_text())
    assert about["stage"] == "pass" and about["setup"] is None and "torch" in about["versions"]
    assert "no kernel takes" in about["error"]["message"] and "ValueError" in (failed / "error.txt").read_text()
    forward, made = load_program(failed / "graph.py")
    assert len(forward(*make_inputs(made))) > LAYERS


def test_the_environment_asks_for_it_too_and_nothing_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KTFX_REPRO_DIR", str(tmp_path))
    first, second = _fail("raises"), _fail("raises")
    assert [Path(e.repro or "").name for e in (first, second)] == ["prefill-pass-PassError", "prefill-pass-PassError-2"]


def test_what_cannot_be_written_does_not_hide_the_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    error = _fail("raises", repro_dir=str(tmp_path / "file"))
    assert error.repro is None and "no kernel takes" in str(error)
    assert any("could not write a repro" in note for note in error.__notes__)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(OptionError, match="repro_dir"):
        ktfx.compile(planted_model(1), planted_rules("none"), repro_dir=3)


def test_it_fails_again_without_the_model_and_its_code(failed: Path) -> None:
    """In a fresh process that cannot import the model's classes; the pass is known through the test's own module."""
    program = (
        "import sys, types; sys.path.insert(0, sys.argv[1]); import planted;"
        "sys.modules['planted'] = types.ModuleType('planted');"
        "from ktfx.debug.case import main; main(sys.argv[2])"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(failed / "run.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "no kernel takes sub_" in done.stdout, done.stderr


def test_a_failing_pass_shrinks_to_the_node_it_fails_on(failed: Path) -> None:
    repro = read_repro(failed)
    assert repro.case is not None
    seen = []
    small, failure, attempts = reduce_graph(repro.case, repro.pattern, seen.append)
    assert seen == attempts and any(not a.kept for a in attempts)
    assert re.search(repro.pattern, failure.text)
    calls = [str(n.target) for n in small.captured.gm.graph.nodes if n.op == "call_function"]
    assert calls == ["aten.sub.Tensor"]
    assert all(max(n.meta["val"].shape) == 1 for n in small.captured.gm.graph.nodes if n.op == "placeholder")
    assert small.rules["passes"] == [{"plant": {"fault": "raises", "layer": LAYER, "per_layer": 1}}]


def test_a_wrong_number_shrinks_and_stays_wrong(tmp_path: Path) -> None:
    """Through the command: the repro that --verify's failure wrote, its tensors kept, down to a handful of nodes."""
    error = _fail("wrong_literal", verify=True, repro_dir=str(tmp_path), repro_inputs=True)
    assert error.repro is not None
    saved = torch.load(Path(error.repro) / "inputs.pt")
    assert any("qkv" in name and value.is_floating_point() for name, value in saved.items())
    result = CliRunner().invoke(app, ["reduce", error.repro, "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["error"].startswith("VerifyError: pass 'plant' changed what the graph computes")
    assert answer["nodes"] <= 3 < 50 < answer["nodes_before"]
    again = load_case(Path(answer["directory"]))
    failure = run_case(again)
    assert failure is not None and failure.kind == "VerifyError"
    assert "aten.mul.Tensor" in (Path(answer["directory"]) / "graph.py").read_text()


def test_a_case_read_back_computes_what_the_model_did(tmp_path: Path) -> None:
    error = _fail("wrong_literal", verify=True, repro_dir=str(tmp_path), repro_inputs=True)
    case = load_case(Path(error.repro or ""))
    with torch.no_grad():
        want = planted_model(LAYERS)(*inputs())
        gm = case.captured.gm
        got = fx.Interpreter(gm).run(*[value_of(case, n) for n in placeholders(gm.graph)])
    assert relative_error(got[-1], want) == 0.0


def test_a_failure_while_running_keeps_what_it_was_called_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ktfx.program.program import Program

    def broken(self: Program, *_: object) -> None:
        raise RuntimeError("the kernel gave up")

    monkeypatch.setattr(Program, "_run_steps", broken)
    model = ktfx.compile(
        planted_model(1), planted_rules("none"), simulate="cpu", partition_backend="eager", repro_dir=str(tmp_path)
    )
    with pytest.raises(RuntimeError, match="the kernel gave up") as raised, torch.no_grad():
        model(*inputs())
    assert any(str(tmp_path / "prefill-run-RuntimeError") in note for note in raised.value.__notes__)
    case = load_case(tmp_path / "prefill-run-RuntimeError")
    (position,) = [v for n, v in case.values.items() if "position" in n]
    assert case.stage == "run" and position.tolist() == list(range(8))
    failure = run_case(case)
    assert failure is not None and failure.message == "the kernel gave up"


@register_pass
class RaiseAlways(Pass):
    """Fails."""

    name = "raise_always"
    default = False

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        raise ValueError("as always")


class Odd(nn.Module):
    """Its attribute cannot be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.key = lambda x: x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight - self.weight


def test_a_model_that_cannot_be_pickled_is_told(tmp_path: Path) -> None:
    rules = {"ktfx": 1, "default_device": "cpu", "passes": ["raise_always"]}
    with pytest.raises(PassError) as raised, torch.no_grad():
        ktfx.compile(Odd().eval(), rules, repro_dir=str(tmp_path))(torch.ones(4, 4))
    assert raised.value.repro is not None
    about = json.loads((Path(raised.value.repro) / "repro.json").read_text())
    assert "cannot be pickled" in about["no_modules"]
    result = CliRunner().invoke(app, ["reduce", raised.value.repro, "--json"])
    assert result.exit_code == 2 and "cannot be pickled" in json.loads(result.stdout)["error"]["message"]

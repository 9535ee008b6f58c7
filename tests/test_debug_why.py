"""``ktfx why``: the first condition that failed, at the nearest candidate, with both sides; also found by lint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from debug_models import tiny_model, tiny_session
from typer.testing import CliRunner

from ktfx.cli.main import app
from ktfx.debug.why import find_rule, tried_rules, why_pattern, why_rule
from ktfx.errors import OptionError
from ktfx.lint import lint
from ktfx.resolve import resolve
from ktfx.ruleset import load_ruleset

RULES = r"""ktfx: 1
devices: {gpu0: cuda:0, host: cpu}
default_device: gpu0
rules:
  - match: {name: '^model\.layers\.0\.mlp\.experts$'}
    replace: {op: experts.reference, device: host}
  - match: {name: '^model\.layers\.\d+\.mlp\.expert$'}
    replace: {op: experts.reference, device: host}
  - match: {module: experts}
    replace: {op: experts.reference, device: host}
  - match: {name: 'mlp\.gate$', class: torch.nn.Linear}
    replace: {device: host}
  - match: {name: 'mlp\.gate$', where: {dtype: bfloat16}}
    replace: {device: host}
  - match: {module: experts, where: {shapes: {gate_up_proj: [8, 64, 32]}}}
    replace: {device: host}
  - match: {module: router, where: {device: host}}
    replace: {device: gpu0}
"""


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("why") / "r.yaml"
    path.write_text(RULES)
    return path


@pytest.mark.parametrize(
    ("number", "module", "what", "wanted", "found"),
    [
        (2, "model.layers.0.mlp.experts", "name", r"^model\.layers\.\d+\.mlp\.expert$", "model.layers.0.mlp.experts"),
        (4, "model.layers.0.mlp.gate", "class", "torch.nn.Linear", "Qwen3MoeTopKRouter"),
        (5, "model.layers.0.mlp.gate", "where.dtype", "bfloat16", "float32"),
        (6, "model.layers.0.mlp.experts", "where.shapes.gate_up_proj", "[8, 64, 32]", "[8, 64, 64]"),
        (7, "model.layers.0.mlp.gate", "where.device", "host", "gpu0"),
    ],
)
def test_a_rule_that_applies_nowhere(rules: Path, number: int, module: str, what: str, wanted: str, found: str) -> None:
    ruleset, model = load_ruleset(str(rules)), tiny_model()
    row, applied = why_rule(ruleset, resolve(ruleset, model), model, find_rule(ruleset, str(number)), None)
    assert applied == 0 and row.module == module and row.outcome == "fails"
    assert row.failed is not None and row.failed.what == what
    assert row.failed.wanted.startswith(wanted) and found in row.failed.found
    assert row.place.startswith(f"{rules}:{5 + 2 * (number - 1)}")


def test_the_wrong_rule_is_found_by_lint_too(rules: Path) -> None:
    findings = lint(str(rules), tiny_model())
    dead = {f.rule for f in findings if f.code == "matches-nothing"}
    assert {"rule 2", "rule 4"} <= dead


def test_rules_tried_on_a_module_in_order(rules: Path) -> None:
    ruleset, model = load_ruleset(str(rules)), tiny_model()
    rows = tried_rules(ruleset, resolve(ruleset, model), model, "model.layers.0.mlp.experts")
    assert [r.rule for r in rows] == [f"rule {n}" for n in range(1, 8)]
    assert [r.outcome for r in rows[:3]] == ["applies", "fails", "shadowed"]
    assert rows[2].by == "rule 1" and "rule 1 takes it first" in rows[2].text()
    assert "up to '^model\\.layers\\.\\d+\\.mlp\\.expert' it matches" in rows[1].text()


def test_an_unknown_module_or_rule_is_told(rules: Path) -> None:
    ruleset, model = load_ruleset(str(rules)), tiny_model()
    with pytest.raises(OptionError, match=r"did you mean 'model\.layers\.0\.mlp\.experts'"):
        tried_rules(ruleset, resolve(ruleset, model), model, "model.layers.0.mlp.expert")
    with pytest.raises(OptionError, match="no rule '99'"):
        find_rule(ruleset, "99")


def test_a_pattern_shows_its_nearest_candidate() -> None:
    graph = tiny_session().graphs[0].records[0].graph_before
    assert graph is not None
    good = why_pattern(graph.graph, "aten.mul(aten.silu(gate), up)")
    assert len(good.matches) == 2 and good.kind is None
    bad = why_pattern(graph.graph, "aten.mul(aten.silu(gate), aten.neg(up))")
    assert not bad.matches and bad.kind is not None
    text = "\n".join(bad.nearest)
    assert "aten.silu" in text and "aten.neg" in text
    inside = why_pattern(graph.graph, "aten.mul(aten.silu(gate), up)", "model.layers.1.mlp")
    assert len(inside.matches) == 1


def test_the_command(rules: Path) -> None:
    def call(*arguments: str) -> tuple[int, dict[str, object]]:
        result = CliRunner().invoke(app, ["why", *arguments, "--rules", str(rules), "--json"])
        return result.exit_code, json.loads(result.stdout)

    code, answer = call("--module", "model.layers.0.mlp.experts")
    assert code == 0 and answer["placed_by"] == "rule 1"
    code, answer = call("2")
    assert code == 1 and answer["applies_to"] == 0
    code, answer = call("1")
    assert code == 0 and answer["applies_to"] == 1

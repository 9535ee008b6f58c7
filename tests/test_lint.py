"""Lint: what is wrong or suspicious in a rule file, by itself and against a model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import meta_models
import pytest
from torch import nn

from ktfx.lint import CODES, Finding, lint
from ktfx.ruleset import load_ruleset, parse_ruleset, shipped_rulesets

DATA = Path(__file__).parent / "data"
HEAD = """ktfx: 1
devices: {gpu0: cuda:0, gpu1: cuda:1, host: cpu}
default_device: gpu0
layers: {0-5: gpu0, 6-11: gpu1}
rules:
"""
HOST = "  - {match: {module: experts}, replace: {op: experts.cpu, device: host}}\n"


def findings(rules: str, model: nn.Module | None = None) -> list[Finding]:
    return lint(parse_ruleset(HEAD + rules, "l.yaml"), model)


def only(found: list[Finding]) -> Finding:
    assert len(found) == 1, [str(f) for f in found]
    assert found[0].code in CODES
    return found[0]


def test_a_good_file_has_no_findings() -> None:
    assert findings(HOST) == []
    assert findings(HOST, meta_models.qwen2_small()) == []


def test_every_error_of_a_file_is_reported_at_once(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(
        HEAD
        + "  - {match: {modul: experts}, replace: {op: experts.cpu}}\n"
        + HOST
        + "  - {match: {module: mlp}, replace: {op: mlp.atem, device: gpu0}}\n"
        + "  - {match: {name: '('}, replace: {device: gpu1}}\n"
    )
    found = lint(file)
    assert [(f.severity, f.code, f.origin.line, f.origin.column, f.rule) for f in found] == [
        ("error", "invalid", 6, 14, "rule 1"),
        ("error", "invalid", 8, 42, "rule 3"),
        ("error", "invalid", 9, 20, "rule 4"),
    ]
    assert [f.mend for f in found[:2]] == ["did you mean 'module'?", "did you mean 'mlp.aten'?"]
    assert str(found[0]).startswith(f"{file}:6:14: error [invalid] rule 1: unknown key 'modul'")


def test_a_file_that_is_no_rule_file_is_one_finding(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("")
    assert only(lint(file)).message.startswith("the file is empty")
    assert only(lint("no/such/file.yaml")).code == "invalid"
    assert only(lint({"ktfx": 2})).message.startswith("`ktfx:` is a number")


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        (r"layers.1", "model.layers.10"),
        (r"^model\.layers\.[4-8]", "model.layers.40"),
        (r"5\.mlp\.experts$", "model.layers.15.mlp.experts"),
        (r"^model\.layers\.1\.", None),
        (r"^model\.layers\.1$", None),
        (r"^model\.layers\.([12][0-9]|[3-9])\.", None),
        (r"^model\.layers\..*\.mlp$", None),
        (r"\.mlp\.", None),
        (r"experts", None),
        (r"", None),
    ],
)
def test_a_name_that_stops_inside_a_number(name: str, cut: str | None) -> None:
    found = findings(f"  - {{match: {{name: '{name}'}}, replace: {{device: gpu1}}}}\n" + HOST)
    if cut is None:
        assert found == []
        return
    finding = only(found)
    assert (finding.severity, finding.code, finding.module) == ("warning", "unanchored", cut)
    assert (finding.origin.line, finding.origin.column) == (6, 20)


def test_unanchored_against_a_model_looks_at_the_models_own_paths() -> None:
    rule = "  - {match: {name: 'layers.1'}, replace: {device: gpu1}}\n" + HOST
    assert "unanchored" in {f.code for f in findings(rule, meta_models.qwen2_small())}
    ten_layers = findings(rule, meta_models.qwen2_small(10))
    assert [f.code for f in ten_layers] == ["layers-past-end"]


def test_a_rule_that_matches_nothing() -> None:
    model = meta_models.qwen2_small()
    finding = only(findings("  - {match: {name: 'mlp.expert$'}, replace: {device: gpu1}}\n" + HOST, model))
    assert (finding.severity, finding.code, finding.rule) == ("warning", "matches-nothing", "rule 1")
    assert "no path matches 'mlp.expert$'" in finding.message
    finding = only(
        findings("  - {match: {name: 'mlp$', class: Qwen2MoeSparseMoeBlok}, replace: {device: gpu1}}\n" + HOST, model)
    )
    assert "the name matches 12, of class Qwen2MoeSparseMoeBlock" in finding.message
    assert finding.mend == "did you mean 'Qwen2MoeSparseMoeBlock'?"
    finding = only(findings("  - {match: {class: torch.nn.Linea}, replace: {device: gpu1}}\n" + HOST, model))
    assert finding.mend == "did you mean 'Linear'?"
    dense = meta_models.HandWritten()
    finding = next(f for f in findings("  - {match: {module: rope}, replace: {device: gpu1}}\n", dense) if f.rule)
    assert "none has the role 'rope'" in finding.message
    assert "attention" in (finding.mend or "")


def test_a_shadowed_rule_and_what_shadows_it() -> None:
    model = meta_models.qwen2_small()
    late = "  - {match: {name: 'layers\\.3\\.mlp\\.experts$'}, replace: {device: gpu1}}\n"
    finding = only(findings(HOST + late, model))
    assert (finding.code, finding.rule, finding.origin.line) == ("shadowed", "rule 2", 7)
    assert "rule 1 (line 6) comes first, and takes the one module" in finding.message
    assert "above rule 1" in (finding.mend or "")
    assert findings(late + HOST, model) == []
    two = "  - {match: {module: experts, layers: 0-5}, replace: {device: gpu1}}\n"
    rest = "  - {match: {module: experts, layers: 6-11}, replace: {device: gpu1}}\n"
    finding = only(findings(two + rest + HOST, model))
    assert "rule 1 (line 6), rule 2 (line 7) comes first, and takes all 12 modules" in finding.message
    same = only(findings(HOST + HOST.replace("host", "gpu1").replace("experts.cpu", "experts.aten")))
    assert "matches exactly what that one does" in same.message


def test_rules_kept_out_by_recursive_false() -> None:
    finding = only(
        findings(
            "  - {match: {module: layer}, replace: {device: gpu1}, recursive: false}\n" + HOST,
            meta_models.qwen2_small(),
        )
    )
    assert (finding.code, finding.rule) == ("shadowed", "rule 2")
    assert "`recursive: false` keeps rules out" in finding.message


def test_devices_named_by_no_one() -> None:
    text = "ktfx: 1\ndevices: {gpu0: cuda:0, spare: cuda:1, host: cpu}\n"
    assert {f.message.split("'")[1] for f in lint(parse_ruleset(text))} == {"spare", "host"}
    # An op for the host uses the first host name without writing it.
    text += "rules: [{match: {module: experts}, replace: {op: experts.cpu}}]\n"
    finding = only(lint(parse_ruleset(text)))
    assert (finding.code, "'spare' (cuda:1)" in finding.message) == ("unused-device", True)


def test_unknown_passes() -> None:
    finding = only(lint({"ktfx": 1, "passes": ["rewrite_experts", "rewrite_expert"]}))
    assert (finding.severity, finding.code) == ("error", "unknown-pass")
    assert finding.mend == "did you mean 'rewrite_experts'?"


def test_unknown_options_of_a_pass() -> None:
    finding = only(lint({"ktfx": 1, "passes": [{"fuse_norms": {"devic": "cuda"}}]}))
    assert (finding.severity, finding.code) == ("error", "invalid")
    assert "no option 'devic' (did you mean 'device'?)" in finding.message


def test_passes_are_checked_before_anything_loaded_the_ops() -> None:
    """In a process of its own: here other tests have loaded ktfx's ops, which the passes name."""
    script = "from ktfx.lint import lint; print(lint({'ktfx': 1, 'passes': ['rewrite_expert']})[0].code)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "unknown-pass", done.stderr[-1000:]


def test_rules_that_cannot_hold_are_all_reported() -> None:
    bad = "  - {match: {module: attention}, replace: {op: experts.aten}}\n"
    worse = "  - {match: {module: norm}, replace: {op: linear.aten}}\n"
    found = findings(bad + HOST + worse, meta_models.qwen2_small())
    assert [(f.severity, f.code, f.rule) for f in found] == [
        ("error", "cannot-hold", "rule 1"),
        ("error", "cannot-hold", "rule 3"),
    ]
    assert found[0].module == "model.layers.0.self_attn"


def test_transfer_map_past_the_end_and_given_twice() -> None:
    snippet = (DATA / "tutorial" / "1-transfer-map.yaml").read_text()
    found = lint(parse_ruleset(snippet.replace("30:", "77:")), meta_models.deepseek_v2_small())
    assert [(f.severity, f.code) for f in found] == [("error", "cannot-hold")]
    assert "before layer 77" in found[0].message
    twice = lint(parse_ruleset(snippet + snippet.replace("^model$", "^model")))
    assert only(twice).code == "transfer-map-twice"


def test_layer_ranges() -> None:
    codes = [f.code for f in lint({"ktfx": 1, "layers": {"0-8": "cpu", "20-30": "cuda"}}, meta_models.qwen2_small())]
    assert sorted(codes) == ["dead-layers", "layer-gap"]


def test_layouts_that_an_op_cannot_take() -> None:
    hand_written = meta_models.HandWritten(stacked=False)
    text = "ktfx: 1\nrules: [{match: {%s}, replace: {op: experts.cpu%s}}]\n"
    generic = only(lint(parse_ruleset(text % ("module: experts", "")), hand_written))
    assert (generic.severity, generic.code) == ("warning", "layout")
    assert "'layers.0.feed_forward.experts' and 2 more" in generic.message
    assert "aten runs it instead" in generic.message
    named = only(lint(parse_ruleset(text % (r"name: 'experts$'", "")), hand_written))
    assert (named.severity, named.code) == ("error", "layout")
    assert "fallback: aten" in (named.mend or "")
    allowed = only(lint(parse_ruleset(text % (r"name: 'experts$'", ", fallback: aten")), hand_written))
    assert allowed.severity == "warning"
    assert lint(parse_ruleset(text % ("module: experts", "")), meta_models.gpt_oss_small()) == []


@pytest.mark.parametrize(
    ("name", "model", "dead"),
    [
        # Rotary embeddings of layers (both files), and rules whose class is that of another model's router.
        ("DeepSeek-V2-Lite-Chat-gpu-cpu", meta_models.deepseek_v2_lite, {2, 3, 8, 9}),
        ("DeepSeek-V3-Chat-multi-gpu-marlin", meta_models.deepseek_v3, {2, 3}),
        # The rules for Linear whose name ends at the layer: the file quantises no layer.
        ("Qwen2-57B-A14B-Instruct-multi-gpu", meta_models.qwen2_57b, {1, 2, 5, 6}),
        ("Mixtral", meta_models.mixtral, set()),
    ],
)
def test_dead_rules_of_ktransformers_own_files(name: str, model: object, dead: set[int]) -> None:
    found = lint(DATA / "kt" / f"{name}.yaml", model())  # type: ignore[operator]
    assert {int(str(f.rule).split()[1]) for f in found if f.code == "matches-nothing"} == dead
    rotary = [f for f in found if "RotaryEmbedding" in f.message]
    assert all(f.mend == "in this model it stands at 'model.rotary_emb': name that, or remove the rule" for f in rotary)


def test_merged_tutorial_has_shadowed_rules() -> None:
    text = "\n".join(path.read_text() for path in sorted((DATA / "tutorial").glob("*.yaml")))
    found = lint(parse_ruleset(text), meta_models.deepseek_v2_small())
    assert {f.rule for f in found if f.code == "shadowed"} == {f"rule {n}" for n in (3, 4, 5, 6, 7)}


def test_shipped_files_read_without_errors() -> None:
    for name in shipped_rulesets():
        assert [str(f) for f in lint(load_ruleset(name)) if f.severity == "error"] == []


def test_findings_come_in_the_order_of_the_file() -> None:
    found = findings(
        "  - {match: {name: 'layers.1'}, replace: {device: gpu1}}\n"
        "  - {match: {name: 'nothing'}, replace: {device: gpu1}}\n"
        "  - {match: {name: 'layers.2'}, replace: {device: gpu1}}\n",
        meta_models.qwen2_small(30),
    )
    lines = [f.origin.line for f in found]
    assert lines == sorted(lines)
    assert {f.code for f in found} >= {"unanchored", "matches-nothing", "unused-device", "layer-gap"}

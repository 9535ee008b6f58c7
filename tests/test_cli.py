"""The ``ktfx`` command: what each command prints, as text and as JSON, and what every mistake is answered with."""

from __future__ import annotations

import gc
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from typer.testing import CliRunner

from ktfx import errors
from ktfx.budget import plan_weights
from ktfx.cli import common, doctor, explain, run
from ktfx.cli.main import app
from ktfx.cli.models import find_model, load_config, meta_model, shipped_shapes
from ktfx.cli.placement import placement_rows, span_text
from ktfx.cli.stream import TokenStream
from ktfx.demo import train
from ktfx.progress import listening
from ktfx.resolve import resolve
from ktfx.ruleset import load_ruleset, shipped_rulesets

RULES = """\
ktfx: 1
devices: {gpu0: cuda:0, gpu1: cuda:1, host: cpu}
default_device: gpu0
layers: {0: gpu0, 1: gpu1}
rules:
  - match: {module: experts}
    replace: {op: experts.cpu, device: host}
"""
KT_FILES = Path(__file__).parent / "data" / "kt"
ON_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the rules' GPUs exist on this machine")


def ktfx(*arguments: str | Path, columns: int = 240) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": str(columns)})


def as_json(result: Result) -> Any:
    """What is on stdout, which has to be JSON and nothing else."""
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory as transformers writes it: two layers, four experts, the byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    config = Qwen3MoeConfig(
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=train.VOCABULARY,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    train.byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rule_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "rules.yaml"
    path.write_text(RULES)
    return path


@pytest.fixture
def broken_model(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may break."""
    return Path(shutil.copytree(model_folder, tmp_path / "broken"))


# ---- the command itself


def test_help_lists_commands_and_exit_codes() -> None:
    result = ktfx("--help")
    assert result.exit_code == 0
    for word in ("run", "resolve", "explain", "lint", "doctor", "rules"):
        assert re.search(rf"│ {word}\s", result.stdout), word
    for code, meaning in common.MEANING.items():
        assert re.search(rf"^\s*{int(code)}\s+{re.escape(meaning)}", result.stdout, re.MULTILINE), code


def test_help_does_not_import_torch() -> None:
    script = "import sys, ktfx.cli.main; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("command", ["run", "resolve", "explain", "lint", "doctor", "rules"])
def test_every_command_explains_itself(command: str) -> None:
    result = ktfx(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [("--nonsense",), ("nonsense",), ("lint",), ("run", "--max-new-tokens", "0"), ("run", "--backend", "x")],
)
def test_bad_usage_is_2(arguments: tuple[str, ...]) -> None:
    assert ktfx(*arguments).exit_code == common.Exit.USAGE


def test_every_error_kind_has_an_exit_code() -> None:
    expected = {
        errors.RuleError: 3,
        errors.PlacementError: 5,
        errors.OptionError: 2,
        errors.CaptureError: 4,
        errors.PassError: 70,
        errors.VerifyError: 1,
        errors.WeightError: 4,
        errors.HostCallError: 70,
    }
    assert set(expected) == set(errors.KtfxError.__subclasses__())
    assert {kind: int(common.exit_code(kind("x"))) for kind in expected} == expected


def test_a_fault_inside_is_70_and_shows_a_traceback_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("made by this test")

    monkeypatch.setattr(doctor, "_host", fail)
    quiet, loud = ktfx("doctor", "--json"), ktfx("doctor", "--debug")
    assert quiet.exit_code == loud.exit_code == common.Exit.INTERNAL
    assert "made by this test" in quiet.stderr and "Traceback" not in quiet.stderr
    assert as_json(quiet)["error"]["exit_code"] == common.Exit.INTERNAL
    assert "Traceback" in loud.stderr


# ---- rules, resolve, explain


def test_rules_lists_every_shipped_file() -> None:
    listed = as_json(ktfx("rules", "--json"))
    assert [entry["name"] for entry in listed] == shipped_rulesets()
    assert all(entry["summary"].endswith(".") and "\n" not in entry["summary"] for entry in listed)
    text = ktfx("rules").stdout
    assert all(name in text for name in shipped_rulesets())


def test_resolve_gives_the_resolution(model_folder: Path, rule_file: Path) -> None:
    result = ktfx("resolve", rule_file, "--model", model_folder, "--json")
    found = as_json(result)
    module = meta_model(find_model(str(model_folder)))
    assert found == resolve(load_ruleset(rule_file), module).to_json()
    assert set(found) == {path for path, _ in module.named_modules()}
    experts = found["model.layers.1.mlp.experts"]
    assert (experts["rule"], experts["line"], experts["generate_op"]) == (1, 6, "experts.cpu")
    text = ktfx("resolve", rule_file, "--model", model_folder).stdout
    assert re.search(r"^model\.layers\.1\.mlp\.experts +host experts\.cpu +rule 1, line 6$", text, re.MULTILINE)


def test_resolve_knows_published_shapes() -> None:
    found = as_json(ktfx("resolve", "deepseek-v3-2gpu", "--model", "deepseek-v3", "--json"))
    assert found["model.layers.60.mlp.experts"]["generate_device"] == "host"
    assert "model.layers.61" not in found
    assert found["model.layers.0.self_attn"]["generate_device"] == "gpu0"


def test_config_file_is_a_model_for_what_needs_no_weights(model_folder: Path, rule_file: Path) -> None:
    by_file = ktfx("resolve", rule_file, "--model", model_folder / "config.json", "--json")
    by_folder = ktfx("resolve", rule_file, "--model", model_folder, "--json")
    assert as_json(by_file) == as_json(by_folder)


def test_model_type_of_its_own_with_a_known_architecture(tmp_path: Path) -> None:
    config = json.loads(shipped_shapes()["kimi-k2"].read_text())
    config |= {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_config(find_model(str(tmp_path))).model_type == "deepseek_v3"


def test_explain_counts_every_byte(model_folder: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES.replace("experts.cpu", "experts.aten"))  # keeps the model's own format
    found = as_json(ktfx("explain", rules, "--model", model_folder, "--json"))
    module = meta_model(find_model(str(model_folder)))
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    assert sum(device["bytes"] for device in found["devices"].values()) == total
    assert sum(row["bytes"] for row in found["placement"]) == total
    assert found["duplicates"] == []
    assert found["model"]["parameters"] == sum(p.numel() for p in module.parameters())
    assert {name: device["stands_for"] for name, device in found["devices"].items()} == {
        "gpu0": "cuda:0",
        "gpu1": "cuda:1",
        "host": "cpu",
    }
    experts = sum(p.numel() * p.element_size() for n, p in module.named_parameters() if ".mlp.experts." in n)
    assert found["devices"]["host"]["bytes"] == experts


def test_explain_rows_collapse_equal_layers(model_folder: Path, rule_file: Path) -> None:
    rows = {
        row["modules"]: row
        for row in as_json(ktfx("explain", rule_file, "--model", model_folder, "--json"))["placement"]
    }
    experts = rows["model.layers.0-1.mlp.experts"]
    assert experts["paths"] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert (experts["rule"], experts["line"], experts["generate"]["op"]) == (1, 6, "experts.cpu")
    assert rows["model.layers.0"]["generate"]["device"] == "gpu0"
    assert rows["model.layers.1"]["generate"]["device"] == "gpu1"
    assert rows["lm_head"]["why"] == "default"


@pytest.mark.parametrize("columns", [80, 140])
def test_explain_shows_both_phases_where_they_differ(columns: int) -> None:
    file = KT_FILES / "DeepSeek-V2-Lite-Chat-gpu-cpu.yaml"
    text = ktfx("explain", file, "--model", "deepseek-v2-lite", columns=columns).stdout
    flat = re.sub(r"\s+", " ", text)
    assert "prefill" in flat and "generate" in flat
    assert "experts.aten on cuda:0" in flat and "experts.cpu on cpu" in flat
    assert "transfer_map: the residual stream runs on cpu from layer 10" in flat
    assert max(map(len, text.splitlines()[1:])) <= columns
    assert "kept twice" in flat and "model.layers.1-9.mlp.experts.gate_up_proj: cuda:0" in flat


def test_explain_lists_what_is_kept_twice(tmp_path: Path, model_folder: Path) -> None:
    """A tied embedding whose head is on another device exists twice, with its bytes."""
    config = json.loads((model_folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES + "  - match: {module: head}\n    replace: {device: gpu1}\n")
    found = as_json(ktfx("explain", rules, "--model", tmp_path, "--json"))
    nbytes = train.VOCABULARY * 32 * 4
    copies = [{"device": d, "format": "model", "bytes": nbytes} for d in ("gpu0", "gpu1")]
    assert found["duplicates"] == [{"name": "model.embed_tokens.weight", "copies": copies}]


def test_explain_says_that_a_quantised_checkpoint_is_counted_unpacked(tmp_path: Path) -> None:
    config = json.loads(shipped_shapes()["deepseek-v3"].read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = as_json(ktfx("explain", "deepseek-v3-2gpu", "--model", tmp_path, "--json"))
    # transformers keeps the router's weight in float32 from 5.24 on.
    dtypes = ", ".join(found["model"]["dtypes"])
    assert dtypes in ("bfloat16", "bfloat16, float32")
    assert found["warnings"] == [f"the checkpoint is stored quantised (fp8); bytes are counted for {dtypes}"]
    plain = as_json(ktfx("explain", "deepseek-v3-2gpu", "--model", "deepseek-v3", "--json"))
    assert plain["warnings"] == [] and plain["devices"] == found["devices"]


def test_explain_tree_nests_the_same_rows(model_folder: Path, rule_file: Path) -> None:
    lines = ktfx("explain", rule_file, "--model", model_folder, "--tree").stdout.splitlines()
    where = {
        name: next(i for i, line in enumerate(lines) if name in line) for name in ("model.layers.0 ", "mlp.experts")
    }
    assert where["mlp.experts"] == where["model.layers.0 "] + 1
    assert lines[where["mlp.experts"]].startswith("│   └── [0-1] mlp.experts  experts.cpu on host")


@given(st.lists(st.integers(0, 40), max_size=20))
def test_span_text_names_exactly_its_numbers(numbers: list[int]) -> None:
    text = span_text(numbers)
    parts = [part.split("-") for part in text.split(",")] if text else []
    named = [n for part in parts for n in range(int(part[0]), int(part[-1]) + 1)]
    assert named == sorted(set(numbers))


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "qwen3-next-80b-a3b", "gpt-oss-20b", "llama-4-scout"])
def test_rows_hold_every_weight_of_a_published_shape(name: str) -> None:
    module = meta_model(find_model(name))
    resolution = resolve(load_ruleset("generic-2gpu"), module)
    plans = plan_weights(module, resolution)
    rows = placement_rows(resolution, plans)
    assert sum(row.nbytes for row in rows) == sum(plan.nbytes for plan in plans)
    shown = [path for row in rows for path in row.paths]
    assert len(shown) == len(set(shown))
    assert len(rows) < 40
    for row in rows:
        places = {(resolution.of(p).prefill, resolution.of(p).generate) for p in row.paths}
        assert places == {(row.first.prefill, row.first.generate)}


# ---- lint


def test_lint_of_a_good_file(rule_file: Path, model_folder: Path) -> None:
    result = ktfx("lint", rule_file, "--model", model_folder, "--strict")
    assert result.exit_code == 0, result.output
    assert "nothing to mend" in result.stdout
    assert as_json(ktfx("lint", rule_file, "--json")) == []


def test_lint_of_a_file_with_errors(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(RULES.replace("op: experts.cpu", "opp: experts.cpu"))
    result = ktfx("lint", path)
    assert result.exit_code == common.Exit.NO
    assert re.search(rf"^{re.escape(str(path))}:7:\d+: error \[invalid\].*'opp'", result.stdout, re.MULTILINE)
    assert "did you mean" in result.stdout
    (finding,) = as_json(ktfx("lint", path, "--json"))
    assert set(finding) == {"file", "line", "column", "severity", "code", "message", "rule", "mend", "module"}
    assert (finding["file"], finding["line"], finding["severity"]) == (str(path), 7, "error")


def test_lint_warnings_are_errors_under_strict(tmp_path: Path) -> None:
    path = tmp_path / "warn.yaml"
    path.write_text(RULES + "  - match: {name: 'model.layers.1'}\n    replace: {device: gpu1}\n")
    assert ktfx("lint", path).exit_code == 0
    strict = ktfx("lint", path, "--strict")
    assert strict.exit_code == common.Exit.NO
    assert "warning [unanchored]" in strict.stdout


# ---- doctor


def test_doctor_reports_versions_and_machine() -> None:
    result = ktfx("doctor", "--json")
    report = as_json(result)
    checks = {check["name"]: check for check in report["checks"]}
    assert result.exit_code == (0 if report["ok"] else common.Exit.NO)
    assert report["ok"] == all(check["status"] != "missing" for check in report["checks"])
    assert checks["torch"]["data"]["version"] == torch.__version__
    assert checks["torch"]["data"]["supported"]
    assert checks["cores"]["data"]["cores"] >= 1
    assert checks["experts.cpu"]["data"]["path"] in ("native", "aten")
    assert checks["memory"]["data"]["total_bytes"] > 2**28
    text = ktfx("doctor", columns=80).stdout
    assert all(name in text for name in checks)
    assert max(map(len, text.splitlines())) <= 80


def test_doctor_finds_a_version_out_of_range_and_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_supported_ranges", lambda: {"torch": "<2", "transformers": ">=5"})
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    result = ktfx("doctor", "--json")
    checks = {check["name"]: check for check in as_json(result)["checks"]}
    assert result.exit_code == common.Exit.NO
    assert checks["torch"]["status"] == checks["C++ compiler"]["status"] == "missing"
    assert checks["torch"]["mend"] == "pip install 'torch<2'"
    assert checks["transformers"]["status"] == "ok"


def test_doctor_without_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor.metadata.version

    def version(name: str) -> str:
        if name == "torch":
            raise doctor.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor.metadata, "version", version)
    result = ktfx("doctor", "--json")
    checks = {check["name"]: check for check in as_json(result)["checks"]}
    assert result.exit_code == common.Exit.NO
    assert checks["torch"]["status"] == "missing" and checks["torch"]["mend"].startswith("pip install 'torch")
    assert "cores" not in checks


def test_topology_of_nvidia_smi_is_read() -> None:
    text = (
        "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\x1b[0m\n"
        "GPU0\t X \tNV18\tSYS\tPIX\t0-31\n"
        "GPU1\tNV18\t X \tPHB\tSYS\t0-31\n"
        "GPU2\tSYS\tPHB\t X \tSYS\t32-63\n"
        "NIC0\tPIX\tSYS\tSYS\t X \n"
    )
    links = doctor.parse_topology(text)
    assert {pair: kind for pair, kind in links.items() if pair[1] < 3} == {(0, 1): "NV18", (0, 2): "SYS", (1, 2): "PHB"}


# ---- run


@pytest.fixture(scope="module")
def outcome(model_folder: Path, rule_file: Path) -> tuple[Result, run.Outcome]:
    """One run of the command, and what it found out."""
    seen: list[run.Outcome] = []
    generate = run._generate

    def remember(*arguments: Any) -> run.Outcome:
        seen.append(generate(*arguments))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_generate", remember)
        result = ktfx(
            *("run", model_folder, "--rules", rule_file, "--simulate", "cpu", "--backend", "eager"),
            *("--prompt", "naïve", "-n", "6"),
            columns=100,
        )
    assert result.exit_code == 0, result.output
    return result, seen[0]


def test_run_prints_what_ran_where(outcome: tuple[Result, run.Outcome]) -> None:
    result, found = outcome
    assert "naïve" + found.text in result.stdout
    assert re.search(
        r"^model\.layers\.0-1\.mlp\.experts +rule 1, line 6 +experts\.cpu +host", result.stdout, re.MULTILINE
    )
    assert re.search(r"^prefill +gpu0 → host → gpu0", result.stdout, re.MULTILINE)
    assert re.search(r"^generate +gpu0 → host → gpu0", result.stdout, re.MULTILINE)
    assert re.search(r"^gpu0 → host +\d+ × [\d.]+ K?i?B", result.stdout, re.MULTILINE)
    assert f"all {len(found.compiled.ids)} generated tokens equal eager's" in result.stdout
    assert "gpu0, gpu1 played by another device" in result.stdout
    assert "Traceback" not in result.stderr


def test_run_generates_what_the_model_does(outcome: tuple[Result, run.Outcome], model_folder: Path) -> None:
    found = outcome[1]
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    ids = train.byte_tokenizer()("naïve", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    assert found.compiled.ids == expected
    assert found.compiled.prompt_tokens == ids.shape[1]
    assert found.compiled.prefill > 0
    assert found.compiled.decode_rate is None or found.compiled.decode_rate > 0


def test_run_json(outcome: tuple[Result, run.Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()  # what a run found out outlives the run
    monkeypatch.setattr(run, "_generate", lambda *_: outcome[1])
    found = as_json(ktfx("run", "--json"))
    assert found["eager"]["equal"] is True
    assert found["eager"]["compared"] == len(found["tokens"]) == len(outcome[1].compiled.ids)
    assert found["devices"] == {"cpu": "cpu", "host": "cpu", "gpu0": "cpu", "gpu1": "cpu"}
    assert found["simulated"] == ["gpu0", "gpu1"]
    assert {graph["phase"] for graph in found["graphs"]} == {"prefill", "generate"}
    assert all(graph["transfer_bytes"] == sum(t["bytes"] for t in graph["transfers"]) > 0 for graph in found["graphs"])
    assert {row["generate"]["device"] for row in found["placement"]} == {"gpu0", "gpu1", "host"}
    assert set(found["weights"]) == {"gpu0", "gpu1", "host"}


@pytest.mark.parametrize("change", ["other", "shorter"])
def test_run_says_so_if_a_token_differs(
    change: str, outcome: tuple[Result, run.Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = outcome[1]
    assert found.eager is not None
    ids = list(found.eager.ids)
    ids = [*ids[:3], ids[3] + 1, *ids[4:]] if change == "other" else ids[:3]
    monkeypatch.setattr(run, "_generate", lambda *_: replace(found, eager=replace(found.eager, ids=ids)))
    text, data = ktfx("run"), ktfx("run", "--json")
    assert text.exit_code == data.exit_code == common.Exit.NO
    assert "token 4 differs" in text.stdout
    assert as_json(data)["eager"] | {"speed": None} == {
        "checked": True,
        "equal": False,
        "compared": len(ids),
        "first_difference": 3,
        "speed": None,
    }


def test_progress_tells_of_every_stage_and_unit() -> None:
    """What the bar of ``ktfx run`` shows; outside the block nobody is told."""
    rules = {"ktfx": 1, "devices": {"a": "cuda:0", "b": "cuda:1"}, "default_device": "a", "rules": [
        {"match": {"name": "^1$"}, "replace": {"device": "b"}}]}  # fmt: skip
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4)).eval()
    options = {"rules": rules, "simulate": "cpu", "partition_backend": "eager"}
    told: list[tuple[str, int, int]] = []
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="ktfx", options=options)
    with torch.no_grad(), listening(lambda *event: told.append(event)):
        compiled(torch.ones(1, 2))
    assert told == [("capture", 0, 0), ("passes", 0, 0), ("compile", 1, 2), ("compile", 2, 2)]
    told.clear()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend="ktfx", options=options)(torch.ones(1, 2))
    assert told == []


@pytest.mark.slow
def test_run_demo_model_with_inductor_as_make_demo_does() -> None:
    result = ktfx("run", "--max-new-tokens", "40", "--json")
    found = as_json(result)
    assert result.exit_code == 0
    assert found["eager"]["equal"] is True and found["eager"]["compared"] == 40
    assert found["rules"] == "demo-2gpu-host"
    assert len(found["text"].split()) > 3


@settings(deadline=None)
@given(st.text(min_size=1).filter(lambda text: "\ufffd" not in text))
def test_stream_writes_whole_characters_as_they_come(text: str) -> None:
    pieces: list[str] = []
    stream = TokenStream(train.byte_tokenizer().decode, pieces.append)
    stream.put(torch.tensor([[1, 2]]))
    for byte in text.encode():
        stream.put(torch.tensor([byte]))
    waiting = len("".join(pieces))
    stream.end()
    assert "".join(pieces) == text
    assert waiting == len(text)
    assert stream.ids == list(text.encode()) and len(stream.times) == len(stream.ids)


def test_stream_shows_bytes_that_are_no_character() -> None:
    pieces: list[str] = []
    stream = TokenStream(train.byte_tokenizer().decode, pieces.append)
    stream.put(torch.tensor([[0]]))
    for byte in [*b"ab", 0xF0, *b"c", 0xE2, 0x82]:
        stream.put(torch.tensor([byte]))
    stream.end()
    assert "".join(pieces).startswith("ab\ufffdc")
    assert "".join(pieces).endswith("\ufffd")


# ---- bad input: rule files


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", None),
        ("just words", 1),
        ("- one\n- two\n", 1),
        ("ktfx: 1\nrules:\n\t- match: {}\n", 3),
        ("ktfx: 1\nrules: []\nrules: []\n", 3),
        ("ktfx: 1\nrules:\n  - match: {name: '('}\n    replace: {device: cpu}\n", 3),
        ("ktfx: 1\nrules:\n  - match: {name: a}\n    replace: {device: npu:0}\n", 4),
        ("ktfx: 1\nrules:\n  - match: {name: a}\n    replace: {op: experts.cpi}\n", 4),
    ],
    ids=["empty", "scalar", "strings", "tab", "twice", "regex", "npu", "op"],
)
def test_bad_rule_file_is_3(text: str, line: int | None, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    for command in ("resolve", "explain"):
        result = ktfx(command, path, "--json")
        assert result.exit_code == common.Exit.RULES
        error = as_json(result)["error"]
        assert error["kind"] == "RuleError" and error["file"] == str(path) and error["exit_code"] == 3
        assert line is None or error["line"] == line
        assert str(path) in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["resolve", "explain", "lint"])
def test_no_such_rule_file_is_3_with_the_near_name(command: str) -> None:
    result = ktfx(command, "deepseek-v3-2gpus")
    assert result.exit_code == common.Exit.RULES
    assert "did you mean 'deepseek-v3-2gpu'?" in result.stderr
    assert result.stdout == ""


# ---- bad input: models


def truncate(to: int) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[: to if to >= 0 else file.stat().st_size + to])

    return cut


def lose_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def index_a_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')


def edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v is not None}))

    return edit


BROKEN: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json", ""),
    "config is no JSON": (lambda f: (f / "config.json").write_text('{\n "a": }'), "not JSON", "config.json:2"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "not an object", "config.json"),
    "no model_type": (edit_config(model_type=None), "no model_type", "config.json"),
    "unknown model_type": (
        edit_config(model_type="qwen3_mo", architectures=None),
        "did you mean 'qwen3_moe'?",
        "config.json",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights", ""),
    "empty weights": (truncate(0), "0 bytes are no safetensors", "model.safetensors"),
    "header cut off": (truncate(60), "cut off inside its header", "model.safetensors"),
    "data cut off": (truncate(-7), "the file is cut off", "model.safetensors"),
    "weights of something else": (
        lambda f: (f / "model.safetensors").write_bytes(b"x" * 64),
        "not a safetensors file",
        "model.safetensors",
    ),
    "a shard is missing": (index_a_missing_shard, "1 of 1 weight files", "model.safetensors.index.json"),
    "a weight is missing": (lose_a_weight, "lacks weights of the model: model.norm.weight", ""),
    "weights of another shape": (edit_config(moe_intermediate_size=32), "cannot load the model", ""),
    "no tokenizer": (
        lambda f: [p.unlink() for p in f.glob("tokenizer*")],
        "the directory has no tokenizer",
        "",
    ),
    "tokenizer is no JSON": (lambda f: (f / "tokenizer.json").write_text("{"), "the tokenizer cannot be read", ""),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_bad_model_is_4(fault: str, broken_model: Path, rule_file: Path) -> None:
    break_it, says, file = BROKEN[fault]
    break_it(broken_model)
    result = ktfx("run", broken_model, "--rules", rule_file, "--simulate", "cpu", "--backend", "eager", "--json")
    assert result.exit_code == common.Exit.MODEL, result.output
    error = as_json(result)["error"]
    assert error["kind"] == "WeightError"
    assert says in error["message"]
    assert f"{error['file']}:{error['line']}".startswith(str(broken_model / file))
    assert "Traceback" not in result.stderr


def test_no_such_model_is_4_with_the_near_name() -> None:
    result = ktfx("explain", "generic-1gpu", "--model", "deepseek-v33")
    assert result.exit_code == common.Exit.MODEL
    assert "did you mean 'deepseek-v3'?" in result.stderr


def test_run_of_a_shape_says_that_it_has_no_weights() -> None:
    result = ktfx("run", "deepseek-v3")
    assert result.exit_code == common.Exit.MODEL
    assert "a configuration without weights" in result.stderr


# ---- bad input: placement and options


@ON_GPU
def test_missing_device_is_5_before_anything_is_loaded(broken_model: Path, rule_file: Path) -> None:
    (broken_model / "model.safetensors").unlink()  # would be the error if loading came first
    result = ktfx("run", broken_model, "--rules", rule_file)
    assert result.exit_code == common.Exit.PLACEMENT
    assert "--simulate cpu" in result.stderr and str(rule_file) in result.stderr


def test_rule_that_cannot_hold_is_5(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(RULES + "  - match: {name: '^lm_head$'}\n    replace: {op: experts.cpu}\n")
    result = ktfx("explain", path, "--json")
    assert result.exit_code == common.Exit.PLACEMENT
    assert as_json(result)["error"]["line"] == 8


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--simulate", "gpu7=cpu"), "gpu7"),
        (("--simulate", "tpu"), "tpu"),
        (("--prompt", "", "--simulate", "cpu"), "the prompt is empty"),
    ],
)
def test_bad_options_of_run_are_2(arguments: tuple[str, ...], says: str, model_folder: Path, rule_file: Path) -> None:
    result = ktfx("run", model_folder, "--rules", rule_file, *arguments)
    assert result.exit_code == common.Exit.USAGE
    assert says in result.stderr


def test_explain_duplicates_names_each_weight_once() -> None:
    module = meta_model(find_model("demo"))
    resolution = resolve(load_ruleset("demo-2gpu-host"), module)
    assert explain.duplicates(module, plan_weights(module, resolution)) == []

"""KTransformers' own files: the placement that its matcher gives, and what its names mean here."""

from __future__ import annotations

import json
from pathlib import Path

import meta_models
import pytest

from ktfx import kt_compat
from ktfx.errors import Origin, PlacementError, RuleError
from ktfx.resolve import Resolution, resolve
from ktfx.ruleset import load_ruleset, parse_ruleset

DATA = Path(__file__).parent / "data"
# file → model, and how many modules both trees have at least, for the comparison to count. Missing are the rotary
# embedding of each layer, and Mixtral's block_sparse_moe, which transformers 5 calls mlp.
CASES = {
    "DeepSeek-V2-Lite-Chat-gpu-cpu": (meta_models.deepseek_v2_lite, 462),
    "DeepSeek-V3-Chat-multi-gpu-marlin": (meta_models.deepseek_v3, 1156),
    "Mixtral": (meta_models.mixtral, 262),
    "Qwen2-57B-A14B-Instruct-multi-gpu": (meta_models.qwen2_57b, 482),
}


@pytest.mark.parametrize("name", CASES)
def test_shipped_file_resolves_as_ktransformers_does(name: str) -> None:
    build, least = CASES[name]
    placed = resolve(load_ruleset(DATA / "kt" / f"{name}.yaml"), build()).to_json()
    expected = json.loads((DATA / "kt" / f"{name}.expected.json").read_text())
    compared = [path for path in expected["modules"] if path in placed]
    assert len(compared) >= least
    for path in compared:
        want, got = expected["modules"][path], placed[path]
        assert (got["class"], got["kwargs"]) == (want["class"], want["kwargs"]), path
        for key in ("generate_device", "prefill_device", "generate_op", "prefill_op", "out_device", "transfer_map"):
            assert got[key] == want["kwargs"].get(key), (path, key)
    assert json.loads(json.dumps(placed)) == placed


def test_every_expected_module_is_compared_or_accounted_for() -> None:
    """Nothing but moved modules may be missing from transformers' tree."""
    for name, (build, _) in CASES.items():
        paths = set(dict(build().named_modules()))
        expected = json.loads((DATA / "kt" / f"{name}.expected.json").read_text())["modules"]
        missing = {path for path in expected if path not in paths}
        assert all(p.endswith("self_attn.rotary_emb") or "block_sparse_moe" in p for p in missing), name


def test_mixtral_rules_reach_the_block_that_transformers_renamed() -> None:
    resolution = resolve(load_ruleset(DATA / "kt" / "Mixtral.yaml"), meta_models.mixtral())
    experts = resolution.of("model.layers.31.mlp.experts")
    assert (experts.generate.device, experts.generate.op) == ("cpu", "experts.cpu")
    assert (experts.prefill.device, experts.prefill.op) == ("cuda:0", "experts.aten")
    assert experts.out_device == "cuda:0"
    assert resolution.of("model.layers.31.mlp.experts.act_fn").reason == "inherited"


# ---- the multi-GPU tutorial, as printed

SNIPPETS = sorted(path.stem for path in (DATA / "tutorial").glob("*.yaml"))


def tutorial(*names: str) -> Resolution:
    text = "\n".join((DATA / "tutorial" / f"{name}.yaml").read_text() for name in names)
    return resolve(parse_ruleset(text, "tutorial.yaml"), meta_models.deepseek_v2_small())


def experts(resolution: Resolution) -> dict[int, tuple[str, str | None, str | None]]:
    """layer → device, op and out_device of its routed experts while generating."""
    return {
        p.layer: (p.generate.device, p.generate.op, p.out_device)
        for p in resolution.placements.values()
        if p.role == "experts" and p.layer is not None
    }


def test_the_tutorial_has_five_snippets() -> None:
    assert len(SNIPPETS) == 5


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_loads_and_resolves_alone(name: str) -> None:
    resolution = tutorial(name)
    assert resolution.num_layers == 60
    assert any(placement.rule is not None for placement in resolution.placements.values())


def test_snippet_1_moves_the_residual_stream_and_no_weight() -> None:
    resolution = tutorial("1-transfer-map")
    for phase in ("prefill", "generate"):
        assert resolution.glue_device("model.layers.29", phase) == "cuda:0"
        assert resolution.glue_device("model.layers.30", phase) == "cuda:1"
        assert resolution.glue_device("model.layers.59", phase) == "cuda:1"
        assert resolution.glue_device("model.layers.30.self_attn", phase) == "cuda:0"
        assert resolution.glue_device("model", phase) == "cuda:0"
    assert {p.generate.device for p in resolution.placements.values()} == {"cuda:0"}
    assert resolution.to_json()["model"]["transfer_map"] == {"30": "cuda:1"}
    assert resolution.to_json()["model"]["generate_device"] is None
    assert resolution.device_names() == ["cuda:0", "cuda:1"]


def test_snippet_2_puts_all_experts_on_the_gpu() -> None:
    placed = experts(tutorial("2-experts-one-gpu"))
    assert placed == {layer: ("cuda:0", "experts.triton", "cuda:0") for layer in range(1, 60)}


def test_snippet_3_splits_at_layer_30() -> None:
    resolution = tutorial("1-transfer-map", "3-experts-two-gpus")
    placed = experts(resolution)
    assert placed == {layer: ("cpu", "experts.cpu", "cuda:0" if layer < 30 else "cuda:1") for layer in range(1, 60)}
    assert resolution.of("model.layers.30.mlp.experts").prefill.op == "experts.cpu"
    assert resolution.to_json()["model.layers.30.mlp.experts"]["prefill_op"] is None
    assert resolution.glue_device("model.layers.30", "generate") == "cuda:1"


def test_snippet_4_leaves_the_second_half_to_the_default_device() -> None:
    placed = experts(tutorial("4-experts-on-host"))
    assert all(placed[layer] == ("cpu", "experts.cpu", "cuda:0") for layer in range(1, 30))
    assert all(placed[layer] == ("cuda:0", None, None) for layer in range(30, 60))


def test_snippet_5_new_rule_before_the_old_one_takes_layers_4_to_8() -> None:
    resolution = tutorial("5-new-rule-before-old")
    placed = experts(resolution)
    for layer in range(1, 60):
        if 4 <= layer <= 8:
            assert placed[layer] == ("cuda:0", "experts.triton", None)
            assert resolution.of(f"model.layers.{layer}.mlp.experts").generate.weights == "int4"
        elif layer < 30:
            assert placed[layer] == ("cpu", "experts.cpu", "cuda:0")
        else:
            assert placed[layer] == ("cuda:0", None, None)


def test_new_rule_after_the_old_one_is_never_reached() -> None:
    text = (DATA / "tutorial" / "5-new-rule-before-old.yaml").read_text()
    new, old = text.split("\n\n")
    swapped = resolve(parse_ruleset(old + "\n" + new), meta_models.deepseek_v2_small())
    assert experts(swapped)[5] == ("cpu", "experts.cpu", "cuda:0")


def test_all_snippets_merged_as_printed() -> None:
    """In the order of the tutorial the rule for one GPU comes before the others and takes every layer."""
    resolution = tutorial(*SNIPPETS)
    assert len(resolution.ruleset.rules) == 7
    assert experts(resolution) == {layer: ("cuda:0", "experts.triton", "cuda:0") for layer in range(1, 60)}
    assert resolution.stream_device(30) == "cuda:1"


def test_snippets_merged_with_the_new_rule_first() -> None:
    placed = experts(tutorial("1-transfer-map", "5-new-rule-before-old", "3-experts-two-gpus"))
    for layer in range(1, 60):
        on_gpu = 4 <= layer <= 8
        host = ("cpu", "experts.cpu", "cuda:0" if layer < 30 else "cuda:1")
        assert placed[layer] == (("cuda:0", "experts.triton", None) if on_gpu else host)


# ---- what KTransformers' names mean


@pytest.mark.parametrize(
    ("name", "kwargs", "op", "weights"),
    [
        ("KExpertsCPU", {}, "experts.cpu", None),
        ("KExpertsCPU", {"backend": "llamafile"}, "experts.cpu", None),
        ("KExpertsCPU", {"backend": "AMXInt8"}, "experts.cpu", "int8"),
        ("KExpertsCPU", {"backend": "AMXBF16"}, "experts.cpu", None),
        ("KSFTExpertsCPU", {"backend": "AMXInt8"}, "experts.cpu", "int8"),
        ("KExpertsCPUW8A8", {}, "experts.cpu", "int8"),
        ("MLPCPUExperts", {}, "experts.cpu", None),
        ("MLPCUDAExperts", {}, "experts.triton", None),
        ("KExpertsMarlin", {}, "experts.triton", "int4"),
        ("KExpertsTorch", {}, "experts.aten", None),
        ("KLinearTorch", {}, "linear.aten", None),
        ("KLinearMarlin", {}, "linear.triton", "int4"),
        ("KLinearMarlin", {"num_bits": 8}, "linear.triton", "int8"),
        ("VLinearMarlin", {}, "linear.triton", "int4"),
        ("KLinearFP8", {}, "linear.triton", "fp8"),
        ("KLinearQ8", {}, "linear.triton", "int8"),
        ("KLinearTorchW8A8A2", {}, "linear.aten", "int8"),
        ("KLinearCPUInfer", {}, "linear.cpu", None),
        ("None", {}, "none", None),
    ],
)
def test_operator_names(name: str, kwargs: dict[str, object], op: str, weights: str | None) -> None:
    assert kt_compat.operator(name, kwargs, Origin("f"), "rule 1") == kt_compat.Operator(op, weights)


def test_every_operator_maps_to_an_op_that_exists() -> None:
    from ktfx.formats import FORMATS
    from ktfx.op_names import op_names

    for found in kt_compat.OPERATORS.values():
        assert found.op in op_names()
        assert found.weights is None or found.weights in FORMATS


@pytest.mark.parametrize(
    ("kt_class", "model", "path", "same"),
    [
        ("modeling_deepseek_v3.DeepseekV3MoE", meta_models.deepseek_v3, "model.layers.5.mlp", True),
        ("modeling_deepseek_v3.DeepseekV3MoE", meta_models.deepseek_v3, "model.layers.0.mlp", False),
        ("modeling_deepseek_v3.DeepseekV3MLP", meta_models.deepseek_v3, "model.layers.0.mlp", True),
        ("modeling_deepseek_v3.MoEGate", meta_models.deepseek_v3, "model.layers.5.mlp.gate", True),
        ("modeling_deepseek_v3.MoEGate", meta_models.deepseek_v2_lite, "model.layers.5.mlp.gate", False),
        ("modeling_deepseek.MoEGate", meta_models.deepseek_v2_lite, "model.layers.5.mlp.gate", True),
        ("modeling_deepseek.DeepseekV2MoE", meta_models.deepseek_v2_lite, "model.layers.5.mlp", True),
        ("modeling_deepseek.DeepseekV2YarnRotaryEmbedding", meta_models.deepseek_v2_lite, "model.rotary_emb", True),
        ("modeling_deepseek_v3.DeepseekV3RMSNorm", meta_models.deepseek_v3, "model.norm", True),
        ("modeling_mixtral.MixtralSparseMoeBlock", meta_models.mixtral, "model.layers.0.mlp", True),
        ("modeling_mixtral.MixtralRotaryEmbedding", meta_models.mixtral, "model.rotary_emb", True),
        ("modeling_qwen2_moe.Qwen2MoeSparseMoeBlock", meta_models.qwen2_57b, "model.layers.0.mlp", True),
        ("modeling_qwen2_moe.Qwen2MoeSparseMoeBlock", meta_models.mixtral, "model.layers.0.mlp", False),
    ],
)
def test_model_classes_stand_for_transformers_classes(kt_class: str, model: object, path: str, same: bool) -> None:
    from ktfx.roles import roles_of

    built = model()  # type: ignore[operator]
    cls = type(built.get_submodule(path))
    assert kt_compat.stands_for(f"ktransformers.models.{kt_class}", cls, roles_of(built)[path]) is same


KT = """- match:
    name: "^model\\\\.layers\\\\..*\\\\.mlp\\\\.experts$"
  replace:
    class: {cls}
    kwargs:
{kwargs}
  recursive: False
"""


def kt_rule(kwargs: str, cls: str = "ktransformers.operators.experts.KTransformersExperts") -> str:
    return KT.format(cls=cls, kwargs="\n".join("      " + line for line in kwargs.splitlines()))


@pytest.mark.parametrize(
    ("text", "line", "column", "what", "mend"),
    [
        (kt_rule('generate_device: "npu"'), 6, 24, "device 'npu' is of a kind", "cuda:N"),
        (kt_rule('prefill_device: "xpu:0"'), 6, 23, "device 'xpu:0' is of a kind", "cuda:N"),
        (kt_rule('generate_device: "cudda:0"'), 6, 24, "unknown device 'cudda:0'", "did you mean 'cuda:0'?"),
        (kt_rule('generate_op: "KExpertCPU"'), 6, 20, "unknown operator 'KExpertCPU'", "did you mean 'KExpertsCPU'?"),
        (kt_rule('generate_op: "KLinearIPEXLLM"'), 6, 20, "cannot run here: it runs on Intel", "KLinearMarlin"),
        (kt_rule('generate_devices: "cpu"'), 6, 7, "unknown key 'generate_devices'", "did you mean 'generate_device'?"),
        (kt_rule('backend: "AMXInt9"'), 6, 16, "unknown backend 'AMXInt9'", "did you mean 'AMXInt"),
        (kt_rule("num_bits: 3"), 6, 17, "num_bits is 3", None),
        (kt_rule("generate_device: 0"), 6, 24, "`generate_device:` is a number ('0')", None),
        (kt_rule('transfer_map: {30: "cudda"}'), 6, 26, "unknown device 'cudda'", None),
        (kt_rule('transfer_map: {layer: "cuda"}'), 6, 22, "'layer' of `transfer_map:` is no layer", None),
        (kt_rule("transfer_map: [1]"), 6, 21, "`transfer_map:` is a list", None),
        (
            kt_rule('out_device: "cpu"', "ktransformers.operators.experts.KTransformerExperts"),
            4,
            12,
            "unknown operator class",
            "KTransformersExperts",
        ),
        (kt_rule('out_device: "cpu"').replace("recursive: False", 'recursive: "False"'), 7, 14, "'False'", "quotes"),
        ("- match:\n    names: x\n  replace:\n    class: default\n", 2, 5, "unknown key 'names'", "'name'"),
        ("- match:\n    module: experts\n  replace:\n    class: default\n", 2, 5, "unknown key 'module'", None),
        ("- replace:\n    class: default\n", 1, 3, "no `match:`", "indentation"),
        ("- match:\n    name: x\n", 1, 3, "no `replace:`", "indentation"),
        ("- match: {}\n  replace:\n    class: default\n", 1, 10, "`match:` is empty", None),
    ],
)
def test_bad_files_say_where_and_how_to_mend(text: str, line: int, column: int, what: str, mend: str | None) -> None:
    with pytest.raises(RuleError) as caught:
        parse_ruleset(text, "bad.yaml")
    error = caught.value
    assert error.origin == Origin("bad.yaml", line, column)
    assert error.rule == "rule 1"
    assert what in error.what
    if mend:
        assert mend in (error.mend or "")


def test_transfer_map_past_the_last_layer() -> None:
    text = (DATA / "tutorial" / "1-transfer-map.yaml").read_text().replace("30:", "60:")
    with pytest.raises(PlacementError, match="before layer 60, but the model has 60 layers") as caught:
        resolve(parse_ruleset(text, "t.yaml"), meta_models.deepseek_v2_small())
    assert caught.value.origin == Origin("t.yaml", 7, 9)
    assert caught.value.rule == "rule 1"
    assert caught.value.expected == "a layer from 0 to 59"


def test_transfer_map_of_a_rule_that_matches_nothing_is_not_used() -> None:
    text = (DATA / "tutorial" / "1-transfer-map.yaml").read_text().replace("^model$", "^transformer$")
    resolution = resolve(parse_ruleset(text, "t.yaml"), meta_models.deepseek_v2_small())
    assert resolution.transfer_map == {}
    assert resolution.glue_device("model.layers.40", "generate") == "cuda:0"
    assert [note.code for note in resolution.notes] == ["transfer-map-unused"]
    assert resolution.warnings[0].startswith("t.yaml:1:3: rule 1:")


def test_operator_for_the_host_on_a_gpu() -> None:
    text = kt_rule('generate_device: "cuda:0"\ngenerate_op: "KExpertsCPU"')
    with pytest.raises(
        PlacementError, match="KExpertsCPU runs on the host, but the rule puts it on 'cuda:0'"
    ) as caught:
        resolve(parse_ruleset(text, "t.yaml"), meta_models.deepseek_v2_small())
    assert (caught.value.module, caught.value.rule) == ("model.layers.1.mlp.experts", "rule 1")


def test_operator_of_the_wrong_family() -> None:
    text = kt_rule('generate_device: "cuda:0"\ngenerate_op: "KLinearMarlin"')
    with pytest.raises(
        PlacementError, match="KLinearMarlin cannot take this module, which is an experts module"
    ) as caught:
        resolve(parse_ruleset(text, "t.yaml"), meta_models.deepseek_v2_small())
    assert caught.value.origin == Origin("t.yaml", 1, 3)


def test_an_operator_called_none_leaves_the_phase_to_the_other_one() -> None:
    text = kt_rule('prefill_device: "cuda"\nprefill_op: "None"\ngenerate_device: "cpu"\ngenerate_op: "KExpertsCPU"')
    placed = resolve(parse_ruleset(text), meta_models.deepseek_v2_small()).of("model.layers.3.mlp.experts")
    assert placed.prefill == placed.generate
    assert (placed.generate.device, placed.generate.op) == ("cpu", "experts.cpu")


def test_a_class_without_operator_is_noted_and_keeps_the_models_arithmetic() -> None:
    text = "- match: {class: torch.nn.Linear}\n  replace: {class: ktransformers.operators.linear.KTransformersLinear}\n"
    resolution = resolve(parse_ruleset(text), meta_models.deepseek_v2_small())
    assert resolution.of("lm_head").generate.op is None
    assert {note.code for note in resolution.notes} == {"no-operator"}


def test_cuda_and_cuda_0_are_one_device_but_json_keeps_the_spelling() -> None:
    text = '- match: {name: "^lm_head$"}\n  replace: {class: default, kwargs: {generate_device: cuda}}\n'
    resolution = resolve(parse_ruleset(text), meta_models.deepseek_v2_small())
    assert resolution.device_names() == ["cuda:0"]
    assert resolution.to_json()["lm_head"]["generate_device"] == "cuda"
    assert resolution.to_json()["lm_head"]["prefill_device"] is None


def test_an_unmatched_child_goes_to_the_default_device_and_not_to_its_parents() -> None:
    text = '- match: {name: "^model$"}\n  replace: {class: default, kwargs: {device: "cuda:3"}}\n'
    resolution = resolve(parse_ruleset(text), meta_models.deepseek_v2_small())
    assert resolution.of("model").generate.device == "cuda:3"
    norm = resolution.of("model.norm")
    assert (norm.generate.device, norm.reason) == ("cuda:0", "default")
    closed = resolve(parse_ruleset(text + "  recursive: false\n"), meta_models.deepseek_v2_small())
    norm = closed.of("model.norm")
    assert (norm.generate.device, norm.reason, norm.inherited_from) == ("cuda:3", "inherited", "model")


def test_the_first_transfer_map_counts() -> None:
    snippet = (DATA / "tutorial" / "1-transfer-map.yaml").read_text()
    rules = parse_ruleset(snippet + snippet.replace('30: "cuda:1"', '30: "cuda:2"\n        40: "cuda:3"'))
    assert rules.transfer_map == {30: "cuda:1"}

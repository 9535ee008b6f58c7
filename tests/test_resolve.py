"""Placement by ktfx's own rules: first match, layers, inheritance, phases, roles; and rules that cannot hold."""

from __future__ import annotations

import json
import re

import meta_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ktfx.errors import KtfxError, Origin, PlacementError
from ktfx.resolve import Resolution, class_matches, ranges_text, resolve
from ktfx.roles import ROLES, decoder_layers, layer_of, layer_within, role_of, roles_of
from ktfx.ruleset import load_ruleset, parse_ruleset

HEAD = """ktfx: 1
devices: {gpu0: cuda:0, gpu1: cuda:1, host: cpu}
default_device: gpu0
"""


def placed(text: str, model: nn.Module | None = None) -> Resolution:
    return resolve(parse_ruleset(HEAD + text, "r.yaml"), model or meta_models.qwen2_small())


def where(resolution: Resolution, path: str) -> tuple[str, str]:
    """(device, reason) of a module while generating."""
    placement = resolution.of(path)
    return placement.generate.device, placement.reason


def test_unmatched_modules_follow_layers_then_the_default_device() -> None:
    r = placed("layers: {0-5: gpu0, 6-11: gpu1}\n")
    assert where(r, "model.layers.5.self_attn.q_proj") == ("gpu0", "layers")
    assert where(r, "model.layers.6.self_attn.q_proj") == ("gpu1", "layers")
    assert where(r, "model.layers.11") == ("gpu1", "layers")
    assert where(r, "model.norm") == where(r, "lm_head") == where(r, "") == ("gpu0", "default")
    assert r.glue_device("model.layers.7", "prefill") == "gpu1"
    assert r.glue_device("model", "prefill") == "gpu0"
    assert r.device_names() == ["gpu0", "gpu1"]
    assert set(r.placements) == {path for path, _ in meta_models.qwen2_small().named_modules()}
    assert (r.num_layers, r.warnings) == (12, ())


def test_even_split() -> None:
    r = placed("layers: [gpu0, gpu1, host]\n")
    assert [r.glue_device(f"model.layers.{i}", "generate") for i in range(12)] == (
        ["gpu0"] * 4 + ["gpu1"] * 4 + ["host"] * 4
    )


def test_first_match_wins() -> None:
    rules = [
        "  - {match: {name: '^model.layers.3.mlp$'}, replace: {device: gpu1}}",
        "  - {match: {name: '^model.layers.[0-9].mlp$'}, replace: {device: host}}",
    ]
    for order, device in ((rules, "gpu1"), (rules[::-1], "host")):
        r = placed("rules:\n" + "\n".join(order) + "\n")
        assert r.of("model.layers.3.mlp").generate.device == device
        assert r.of("model.layers.4.mlp").generate.device == "host"


def test_the_device_of_a_rule_is_inherited_but_its_op_is_not() -> None:
    r = placed("""layers: {0-11: gpu0}
rules:
  - {match: {name: 'layers\\.3\\.mlp\\.shared_expert$'}, replace: {device: gpu1, op: mlp.aten}}
  - {match: {name: 'layers\\.3\\.mlp\\.shared_expert\\.up_proj$'}, replace: {op: linear.triton, weights: int4}}
  - {match: {name: 'layers\\.4\\.mlp$'}, replace: {device: host}}
""")
    assert where(r, "model.layers.3.mlp.shared_expert") == ("gpu1", "rule")
    assert where(r, "model.layers.3.mlp.shared_expert.down_proj") == ("gpu1", "inherited")
    assert r.of("model.layers.3.mlp.shared_expert.down_proj").inherited_from == "model.layers.3.mlp.shared_expert"
    assert r.of("model.layers.3.mlp.shared_expert.down_proj").generate.op is None
    up = r.of("model.layers.3.mlp.shared_expert.up_proj").generate
    assert (up.device, up.op, up.weights) == ("gpu1", "linear.triton", "int4")
    assert where(r, "model.layers.4.mlp.shared_expert.up_proj") == ("host", "inherited")
    assert where(r, "model.layers.4.self_attn") == ("gpu0", "layers")


def test_a_layer_range_is_nearer_than_a_rule_for_the_whole_model() -> None:
    r = placed("""layers: {6-11: gpu1}
rules:
  - {match: {name: '^model$'}, replace: {device: host}}
""")
    assert where(r, "model.embed_tokens") == ("host", "inherited")
    assert where(r, "model.layers.5.mlp") == ("host", "inherited")
    assert where(r, "model.layers.6.mlp") == ("gpu1", "layers")
    assert where(r, "lm_head") == ("gpu0", "default")


def test_recursive_false_keeps_rules_and_ranges_out() -> None:
    text = """layers: {{0-11: gpu1}}
rules:
  - match: {{name: '^model\\.layers$'}}
    replace: {{device: host}}
    recursive: {}
  - {{match: {{class: torch.nn.Linear}}, replace: {{device: gpu1}}}}
"""
    closed, opened = placed(text.format("false")), placed(text.format("true"))
    assert where(closed, "model.layers.2.self_attn.q_proj") == ("host", "inherited")
    assert where(closed, "model.layers.2") == ("host", "inherited")
    assert where(opened, "model.layers.2.self_attn.q_proj") == ("gpu1", "rule")
    assert where(opened, "model.layers.2") == ("gpu1", "layers")
    assert where(closed, "lm_head") == where(opened, "lm_head") == ("gpu1", "rule")


def test_an_op_without_device_stays_in_its_layer_and_one_for_the_host_goes_to_the_host() -> None:
    r = placed("""layers: {0-5: gpu0, 6-11: gpu1}
rules:
  - {match: {module: experts, layers: '7'}, replace: {op: experts.triton, weights: int4}}
  - {match: {module: experts}, replace: {op: experts.cpu, weights: int4, out_device: gpu1}}
""")
    assert where(r, "model.layers.7.mlp.experts") == ("gpu1", "rule")
    assert where(r, "model.layers.8.mlp.experts") == ("host", "rule")
    assert where(r, "model.layers.8.mlp.experts.act_fn") == ("host", "inherited")
    assert r.of("model.layers.8.mlp.experts").out_device == "gpu1"
    assert r.of("model.layers.8.mlp.experts").prefill.weights == "int4"


def test_the_host_without_a_name_is_cpu() -> None:
    rules = parse_ruleset(
        "ktfx: 1\ndefault_device: cuda\nrules: [{match: {module: experts}, replace: {op: experts.cpu}}]"
    )
    r = resolve(rules, meta_models.qwen2_small())
    assert where(r, "model.layers.8.mlp.experts") == ("cpu", "rule")
    assert where(r, "model.layers.8.mlp") == ("cuda:0", "default")


def test_phases_have_their_own_device_op_and_format() -> None:
    r = placed("""rules:
  - match: {module: experts}
    replace:
      weights: int8
      prefill: {op: experts.aten, device: gpu1, weights: model}
      generate: {op: experts.cpu}
""")
    placement = r.of("model.layers.0.mlp.experts")
    assert (placement.prefill.device, placement.prefill.op, placement.prefill.weights) == (
        "gpu1",
        "experts.aten",
        "model",
    )
    assert (placement.generate.device, placement.generate.op, placement.generate.weights) == (
        "host",
        "experts.cpu",
        "int8",
    )
    assert placement.at("prefill") is placement.prefill
    act = r.of("model.layers.0.mlp.experts.act_fn")
    assert (act.prefill.device, act.generate.device) == ("gpu1", "host")
    assert r.glue_device("model.layers.0.mlp.experts", "prefill") == "gpu1"


def test_all_given_keys_must_hold() -> None:
    r = placed("""rules:
  - match: {name: '_proj$', class: torch.nn.Linear, layers: '2,4-5'}
    replace: {device: gpu1}
""")
    hit = {p for p, m in r.placements.items() if m.rule is not None}
    assert {int(re.findall(r"\d+", p)[0]) for p in hit} == {2, 4, 5}
    assert "model.layers.2.mlp.shared_expert_gate" not in hit
    assert "model.layers.2.self_attn.q_proj" in hit


@pytest.mark.parametrize(
    ("condition", "hits"),
    [
        ("{dtype: float32}", 12),
        ("{dtype: bf16}", 0),
        ("{device: gpu1}", 6),
        ("{device: cuda}", 12),
        ("{device: cpu}", 0),
        ("{shapes: {gate_up_proj: [8, any, 64]}}", 12),
        ("{shapes: {gate_up_proj: [8, any]}}", 0),
        ("{shapes: {other: [8]}}", 0),
    ],
)
def test_where(condition: str, hits: int) -> None:
    r = placed(f"""layers: {{0-5: gpu0, 6-11: gpu1}}
rules:
  - match: {{module: experts, where: {condition}}}
    replace: {{device: host}}
""")
    assert sum(placement.rule is not None for placement in r.placements.values()) == hits


def test_ktransformers_keys_work_in_ktfx_files() -> None:
    r = placed("""rules:
  - match: {module: experts}
    replace:
      class: ktransformers.operators.experts.KTransformersExperts
      kwargs: {generate_device: host, generate_op: KExpertsCPU, out_device: gpu1}
  - match: {name: '^model$'}
    replace:
      class: ktransformers.operators.models.KQwen2MoeModel
      kwargs: {transfer_map: {3: gpu1}}
""")
    assert where(r, "model.layers.0.mlp.experts") == ("host", "rule")
    assert r.glue_device("model.layers.3", "generate") == "gpu1"
    assert r.to_json()["model.layers.0.mlp.experts"]["prefill_device"] is None


def test_of_finds_the_nearest_ancestor() -> None:
    r = placed("layers: {0-11: gpu1}\n")
    assert r.of("model.layers.3.mlp.experts.0.up_proj").module == "model.layers.3.mlp.experts"
    assert r.of("somewhere.else").module == ""


def test_json_of_ktfx_rules() -> None:
    r = placed("""rules:
  - {match: {module: experts}, replace: {op: experts.cpu, weights: int4}}
""")
    entry = r.to_json()["model.layers.0.mlp.experts"]
    assert (entry["rule"], entry["file"], entry["line"]) == (1, "r.yaml", 5)
    assert (entry["generate_device"], entry["generate_op"], entry["out_device"]) == ("host", "experts.cpu", None)
    assert entry["resolved"]["prefill"] == {"device": "host", "op": "experts.cpu", "weights": "int4"}
    assert entry["module_class"].endswith("Qwen2MoeExperts")
    assert entry["role"] == "experts"
    unmatched = r.to_json()["lm_head"]
    assert (unmatched["rule"], unmatched["reason"], unmatched["generate_device"]) == (None, "default", "gpu0")
    assert json.loads(json.dumps(r.to_json())) == r.to_json()


# ---- rules that cannot hold, and what is only noted


@pytest.mark.parametrize(
    ("rule", "what", "module", "mend"),
    [
        (
            "{match: {module: experts}, replace: {op: linear.triton}}",
            "linear.triton cannot take this module, which is an experts module",
            "model.layers.0.mlp.experts",
            "experts.aten",
        ),
        (
            "{match: {name: 'mlp'}, replace: {op: experts.cpu}}",
            "experts.cpu cannot take this module, which is a moe module",
            "model.layers.0.mlp",
            "match the experts inside it",
        ),
        (
            "{match: {name: 'mlp.shared'}, replace: {op: linear.triton}}",
            "which is a shared_experts module",
            "model.layers.0.mlp.shared_expert",
            "end it with $",
        ),
        (
            "{match: {class: torch.nn.Linear}, replace: {op: experts.aten}}",
            "which is a linear module",
            "model.layers.0.self_attn.q_proj",
            "linear.aten",
        ),
        (
            "{match: {name: '^model.layers.0.mlp.gate$'}, replace: {op: linear.aten}}",
            "which is a router module",
            "model.layers.0.mlp.gate",
            "aten",
        ),
        (
            "{match: {module: experts}, replace: {op: experts.cpu, device: gpu1}}",
            "experts.cpu runs on the host, but the rule puts it on 'gpu1'",
            "model.layers.0.mlp.experts",
            "device: host",
        ),
    ],
)
def test_rules_that_cannot_hold(rule: str, what: str, module: str, mend: str) -> None:
    with pytest.raises(PlacementError) as caught:
        placed(f"rules:\n  - {rule}\n")
    error = caught.value
    assert what in error.what
    assert (error.origin, error.rule, error.module) == (Origin("r.yaml", 5, 5), "rule 1", module)
    assert mend in (error.mend or "")


def test_fallback_aten_is_noted() -> None:
    r = placed("rules:\n  - {match: {name: 'mlp.gate$'}, replace: {op: linear.triton, fallback: aten}}\n")
    assert r.of("model.layers.0.mlp.gate").generate.op == "aten"
    assert {note.code for note in r.notes} == {"fallback"}
    assert len(r.notes) == 12


def test_a_host_op_may_run_on_a_name_that_stands_for_cpu() -> None:
    text = (
        "ktfx: 1\ndevices: {gpu0: cpu}\nrules: [{match: {module: experts}, replace: {op: experts.cpu, device: gpu0}}]"
    )
    assert where(resolve(parse_ruleset(text), meta_models.qwen2_small()), "model.layers.0.mlp.experts")[0] == "gpu0"


def test_layer_ranges_against_the_depth() -> None:
    r = placed("layers: {0-3: gpu0, 6-19: gpu1, 20-30: host}\n")
    assert [(note.code, note.origin.line) for note in r.notes] == [
        ("layers-past-end", 4),
        ("dead-layers", 4),
        ("layer-gap", 4),
    ]
    assert "layers 4-5" in r.warnings[2]
    assert r.warnings[1].startswith("r.yaml:4:33: layers 20-30 do not exist: the model has 12 layers (0-11)")


def test_transfer_map_on_a_model_without_layers() -> None:
    rules = load_ruleset([{"match": {"name": "^$"}, "replace": {"kwargs": {"transfer_map": {0: "cuda:1"}}}}])
    with pytest.raises(PlacementError, match="has 0 layers"):
        resolve(rules, nn.Linear(2, 2))


@given(
    st.lists(st.integers(0, 11), min_size=1, max_size=5, unique=True),
    st.sampled_from(["experts", "attention", "linear", "norm", "layer", "moe"]),
    st.sampled_from(["gpu0", "gpu1", "host"]),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_every_module_has_exactly_one_place(layers: list[int], role: str, device: str, recursive: bool) -> None:
    rules = load_ruleset(
        {
            "ktfx": 1,
            "devices": {"gpu0": "cuda:0", "gpu1": "cuda:1", "host": "cpu"},
            "layers": ["gpu0", "gpu1"],
            "rules": [
                {
                    "match": {"module": role, "layers": layers},
                    "replace": {"device": device},
                    "recursive": recursive,
                }
            ],
        }
    )
    r = resolve(rules, meta_models.qwen2_small())
    for path, module in r.placements.items():
        inside = [p for p, m in r.placements.items() if m.rule is not None and (path == p or path.startswith(p + "."))]
        base = "gpu0" if module.layer is None or module.layer < 6 else "gpu1"
        assert module.generate.device == (device if inside else base), path
        assert (module.rule is not None) == (module.role == role and module.layer in layers and len(inside) == 1) or (
            recursive and len(inside) > 1
        )


# ---- classes


def test_classes_match_as_isinstance_does() -> None:
    class Narrow(nn.Linear):
        pass

    assert class_matches("torch.nn.Linear", nn.Linear, None)
    assert class_matches("torch.nn.modules.linear.Linear", nn.Linear, None)
    assert class_matches("torch.nn.Linear", Narrow, None)
    assert class_matches("Linear", Narrow, None)
    assert class_matches("torch.nn.Module", Narrow, None)
    assert not class_matches("torch.nn.Embedding", Narrow, None)
    assert not class_matches("elsewhere.nn.Linear", nn.Linear, None)
    experts = type(meta_models.qwen2_small().get_submodule("model.layers.0.mlp.experts"))
    assert class_matches(f"{experts.__module__}.Qwen2MoeExperts", experts, None)
    assert class_matches("Qwen2MoeExperts", experts, None)


# ---- roles


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("model.layers.12.mlp", 12),
        ("model.layers.12", 12),
        ("transformer.h.3.attn", 3),
        ("model.decoder.layers.3.fc1", 3),
        ("language_model.model.layers.2.mlp.experts.7.up", 2),
        ("layers.0", 0),
        ("model.visual.blocks.3.attn", None),
        ("vision_tower.encoder.layers.3.mlp", None),
        ("encoder.layers.3.mlp", None),
        ("model.layers", None),
        ("model.norm", None),
        ("", None),
        ("mlplayers.3", None),
    ],
)
def test_layer_of(path: str, layer: int | None) -> None:
    assert layer_of(path) == layer


def test_roles_of_transformers_models() -> None:
    roles = roles_of(meta_models.deepseek_v2_small())
    inside = "model.layers.7"
    assert {path: roles[path] for path in roles if path.startswith(inside) and roles[path] != "linear"} == {
        inside: "layer",
        f"{inside}.self_attn": "attention",
        f"{inside}.self_attn.q_a_layernorm": "norm",
        f"{inside}.self_attn.kv_a_layernorm": "norm",
        f"{inside}.mlp": "moe",
        f"{inside}.mlp.experts": "experts",
        f"{inside}.mlp.experts.act_fn": None,
        f"{inside}.mlp.gate": "router",
        f"{inside}.mlp.shared_experts": "shared_experts",
        f"{inside}.mlp.shared_experts.act_fn": None,
        f"{inside}.input_layernorm": "norm",
        f"{inside}.post_attention_layernorm": "norm",
    }
    assert roles["model.layers.0.mlp"] == "mlp"
    assert roles["model.embed_tokens"] == "embedding"
    assert roles["model.rotary_emb"] == "rope"
    assert (roles["model.norm"], roles["lm_head"], roles["model"], roles[""]) == ("norm", "head", None, None)


@pytest.mark.parametrize(
    ("stacked", "experts", "router"),
    [(True, "cond_ffn", "gate"), (False, "experts", "gate")],
)
def test_roles_of_a_hand_written_model(stacked: bool, experts: str, router: str) -> None:
    with torch.device("meta"):
        model = meta_models.HandWritten(stacked)
    roles = roles_of(model)
    assert decoder_layers(model) == "layers"
    assert roles["layers.1"] == "layer"
    assert roles["layers.1.attention"] == "attention"
    assert roles["layers.1.attention.wqkv"] == "linear"
    assert roles["layers.1.feed_forward"] == "moe"
    assert roles[f"layers.1.feed_forward.{experts}"] == "experts"
    assert roles[f"layers.1.feed_forward.{router}"] == "router"
    assert roles["layers.1.norm"] == "norm"
    assert (roles["tok_embeddings"], roles["output"]) == ("embedding", "head")
    assert [p for p, r in roles.items() if r == "experts"] == [f"layers.{i}.feed_forward.{experts}" for i in range(3)]
    r = resolve(load_ruleset({"ktfx": 1, "layers": {"1-2": "cuda:1"}}), model)
    assert (r.num_layers, r.of(f"layers.2.feed_forward.{experts}").generate.device) == (3, "cuda:1")


FAMILIES = ("afmoe", "bailing_hybrid", "deepseek_v3", "ernie4_5_moe", "flex_olmo", "glm4_moe", "gpt_oss", "granitemoe",
            "jamba", "kimi_linear", "llama4_text", "longcat_flash", "minimax_m2", "mixtral", "nemotron_h", "olmoe",
            "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "solar_open")  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_hold_for_the_moe_families_of_transformers(family: str) -> None:
    """In each layer of each family with its default config: one block, one router, one experts module, no more."""
    from transformers import CONFIG_MAPPING

    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    model = meta_models.on_meta(CONFIG_MAPPING[family]())
    layers, roles = decoder_layers(model), roles_of(model)
    assert set(roles.values()) <= {*ROLES, None}
    assert sum(role == "head" for role in roles.values()) == 1
    depth = model.config.num_hidden_layers // (2 if family == "longcat_flash" else 1)  # longcat counts each half
    assert sum(role == "layer" for role in roles.values()) == depth
    by_layer: dict[int | None, dict[str | None, list[str]]] = {}
    for path, role in roles.items():
        by_layer.setdefault(layer_within(path, layers), {}).setdefault(role, []).append(path)
        assert layer_within(path, layers) == layer_of(path)
    with_experts = 0
    for layer, found in by_layer.items():
        assert "experts" not in found or layer is not None
        if "experts" in found:
            with_experts += 1
            assert len(found["experts"]) == len(found["moe"]) == 1
            assert found["experts"][0].startswith(found["moe"][0] + ".")
            assert 1 <= len(found["router"]) <= 2  # some routers hold their Linear as a child
        if layer is not None:
            assert {"attention", "mlp", "moe"} & set(found)
    assert with_experts >= 1


def test_role_of_without_the_model() -> None:
    model = meta_models.qwen2_small()
    for path in ("model.layers.0.mlp.experts", "model.layers.0.self_attn", "model.norm", "lm_head"):
        assert role_of(path, model.get_submodule(path)) == roles_of(model)[path]


def test_ranges_text() -> None:
    assert ranges_text([3]) == "layer 3"
    assert ranges_text([1, 2, 3, 7, 9, 10]) == "layers 1-3, 7, 9-10"


def test_errors_of_resolve_are_ktfx_errors_for_any_rule_on_any_model() -> None:
    from ktfx.op_names import op_names

    for op in op_names():
        for role in ROLES:
            rules = load_ruleset({"ktfx": 1, "rules": [{"match": {"module": role}, "replace": {"op": op}}]})
            try:
                resolve(rules, meta_models.gpt_oss_small())
            except KtfxError as error:
                assert error.mend and error.expected

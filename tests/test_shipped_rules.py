"""The rule files that ship, each against the published shape of the models it is for (meta device, no weights)."""

from __future__ import annotations

import re
from collections import Counter
from importlib import resources
from itertools import pairwise

import pytest
import torch
from model_shapes import SHAPES, Shape, meta_model
from torch import nn

from ktfx.demo import demo_model_path
from ktfx.errors import OptionError
from ktfx.lint import lint
from ktfx.resolve import Resolution, resolve
from ktfx.rules_index import FAMILIES, GPU_COUNTS, SIZES, shipped_rules_for
from ktfx.ruleset import load_ruleset, shipped_rulesets

BY_FAMILY = [(shape, family) for shape in SHAPES for family in shape.rules]
QUICK_COUNT = 2  # the other numbers of GPUs are checked in the slow run
CASES = [
    pytest.param(s, f, n, id=f"{s.name}:{f}-{n}gpu", marks=[] if n == QUICK_COUNT else [pytest.mark.slow])
    for s, f in BY_FAMILY
    for n in GPU_COUNTS
]

# Where all routed experts are on the GPUs; everywhere else all are on the host, but for the one file that mixes.
ALL_ON_GPU = {
    "olmoe": (1, 2, 4, 8),
    "deepseek-v2-lite": (2, 4, 8),
    "qwen3-30b-a3b": (4, 8),
    "qwen3-next": (8,),
    "mixtral": (8,),
    "qwen2-moe": (8,),
    "phi-moe": (8,),
    "gpt-oss": (8,),
}
MIXED = {("qwen3-30b-a3b", 2): {*range(14), *range(24, 38)}}
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"
INT4_BYTES = 4.25 / 8  # groups of 64 share one 16-bit scale


def text_of(name: str) -> str:
    return resources.files("ktfx.rules").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def gpus(count: int) -> list[str]:
    return [f"gpu{i}" for i in range(count)]


def on_gpu(family: str, count: int, layer: int) -> bool:
    """Whether a family's file keeps the routed experts of this layer on the layer's GPU."""
    return count in ALL_ON_GPU.get(family, ()) or layer in MIXED.get((family, count), ())


def check_split(resolution: Resolution, count: int) -> None:
    """Attention in runs of equal length, in order; embedding with the first GPU, final norm and head with the last."""
    attention = [p for p in resolution.placements.values() if p.role == "attention" and p.layer is not None]
    by_layer = {p.layer: p.generate.device for p in attention}
    assert sorted(by_layer) == list(range(resolution.num_layers))
    devices = [by_layer[layer] for layer in range(resolution.num_layers)]
    assert list(dict.fromkeys(devices)) == gpus(count)
    assert sum(a != b for a, b in pairwise(devices)) == count - 1
    lengths = Counter(devices).values()
    assert max(lengths) - min(lengths) <= 1
    assert resolution.of(EMBEDDING).generate.device == "gpu0"
    assert resolution.of(FINAL_NORM).generate.device == resolution.of(HEAD).generate.device == gpus(count)[-1]
    assert all(p.prefill == p.generate for p in resolution.placements.values())


def placed_bytes(model: nn.Module, resolution: Resolution, int4: bool) -> Counter[str]:
    """Bytes of weights by device, in bf16; with ``int4`` the routed experts' matrices in int4."""
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        placement = resolution.of(name.rpartition(".")[0])
        packed = int4 and placement.role == "experts" and parameter.dim() == 3
        found[placement.generate.device] += int(parameter.numel() * (INT4_BYTES if packed else 2))
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_shape_has_the_published_number_of_parameters(shape: Shape) -> None:
    count = sum(p.numel() for p in meta_model(shape.name).parameters())
    assert count == pytest.approx(shape.parameters, rel=0.02)


@pytest.mark.parametrize(("shape", "family", "count"), CASES)
def test_family_file_is_clean_and_places_every_layer(shape: Shape, family: str, count: int) -> None:
    name = f"{family}-{count}gpu"
    model = meta_model(shape.name)
    assert lint(name, model) == []
    resolution = resolve(load_ruleset(name), model)
    assert not resolution.warnings
    check_split(resolution, count)
    experts = [p for p in resolution.placements.values() if p.role == "experts"]
    assert experts
    op_on_host = "aten" if family == "llama-4" else "experts.cpu"
    for placement in experts:
        assert placement.layer is not None
        of_layer = resolution.of(f"{resolution.layers_path}.{placement.layer}").generate.device
        if on_gpu(family, count, placement.layer):
            assert (placement.generate.device, placement.generate.op) == (of_layer, "experts.aten")
        else:
            assert (placement.generate.device, placement.generate.op) == ("host", op_on_host)
    check_stated_bytes(text_of(name), shape, model, resolution)


def check_stated_bytes(text: str, shape: Shape, model: nn.Module, resolution: Resolution) -> None:
    """The figures in the file's own comment: ``gpu0 3.0, gpu1-gpu6 1.7 each, host 454.2 (120.6)``, GB."""
    comment = " ".join(re.findall(r"^#(?: +(.*))?$", text, re.MULTILINE))
    stated = re.search(
        rf"{re.escape(shape.title)}: ((?:(?:gpu|host)\S* [\d.]+(?: \([\d.]+\))?(?: each)?(?:, )?)+)", comment
    )
    assert stated, f"no bytes stated for {shape.title}"
    bf16, int4 = placed_bytes(model, resolution, int4=False), placed_bytes(model, resolution, int4=True)
    seen = set()
    for part in stated[1].removesuffix(", ").split(", "):
        fields = re.fullmatch(r"(?:gpu(\d)(?:-gpu(\d))?|host) ([\d.]+)(?: \(([\d.]+)\))?( each)?", part.strip())
        assert fields, part
        first, last, whole, packed, each = fields.groups()
        assert bool(last) == bool(each)
        names = ["host"] if first is None else gpus(8)[int(first) : int(last or first) + 1]
        for name in names:
            assert float(whole) == pytest.approx(bf16[name] / 1e9, abs=0.06)
            if packed:
                assert float(packed) == pytest.approx(int4[name] / 1e9, abs=0.06)
        seen.update(names)
    assert seen == set(bf16)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@pytest.mark.parametrize(
    "count", [n if n == QUICK_COUNT else pytest.param(n, marks=pytest.mark.slow) for n in GPU_COUNTS]
)
def test_generic_file_serves_every_shape(shape: Shape, count: int) -> None:
    findings = lint(f"generic-{count}gpu", meta_model(shape.name))
    # No op takes the layout of Llama-4's dense, batched experts: a generic file leaves them to ATen, and lint says so.
    assert [f.code for f in findings] == (["layout"] if shape.rules == ("llama-4",) else [])
    assert all(f.severity == "warning" for f in findings)
    resolution = resolve(load_ruleset(f"generic-{count}gpu"), meta_model(shape.name))
    check_split(resolution, count)
    experts = [p for p in resolution.placements.values() if p.role == "experts"]
    assert experts
    assert {(p.generate.device, p.generate.op) for p in experts} == {("host", "experts.cpu")}


class HandWritten(nn.Module):
    """A decoder by nobody's template: ``blocks``, ``ln_f`` and experts in a ModuleList."""

    def __init__(self, layers: int = 8) -> None:
        super().__init__()
        self.wte = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(HandWrittenBlock() for _ in range(layers))
        self.ln_f = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 16)


class HandWrittenBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(8, 8)
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))


@pytest.mark.parametrize("count", GPU_COUNTS)
def test_generic_file_serves_a_hand_written_model(count: int) -> None:
    with torch.device("meta"):
        model = HandWritten()
    found = resolve(load_ruleset(f"generic-{count}gpu"), model).placements
    assert [found[f"blocks.{i}.attn"].generate.device for i in range(8)] == [f"gpu{i * count // 8}" for i in range(8)]
    assert {found[f"blocks.{i}.experts"].generate.device for i in range(8)} == {"host"}
    assert found["wte"].generate.device == "gpu0"
    assert found["ln_f"].generate.device == found["lm_head"].generate.device == f"gpu{count - 1}"


def test_generic_host_file_uses_no_gpu() -> None:
    ruleset = load_ruleset("generic-host")
    resolution = resolve(ruleset, meta_model("qwen3-30b-a3b"))
    assert resolution.device_names() == ["host"]
    assert ruleset.devices == {"host": "cpu"}
    assert {p.generate.op for p in resolution.placements.values() if p.role == "experts"} == {"experts.cpu"}


def test_demo_file_uses_every_kind_of_place() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(demo_model_path()))
    assert lint("demo-2gpu-host", model) == []
    resolution = resolve(load_ruleset("demo-2gpu-host"), model)
    check_split(resolution, 2)
    experts = {
        p.layer: (p.generate.device, p.generate.op) for p in resolution.placements.values() if p.role == "experts"
    }
    host = ("host", "experts.cpu")
    assert experts == {0: host, 1: ("gpu0", "experts.aten"), 2: host, 3: host}
    stated = dict(re.findall(r"(gpu0|gpu1|host) ([\d.]+)[,.]", text_of("demo-2gpu-host")))
    found = placed_bytes(model, resolution, int4=False)
    assert {name: float(mega) for name, mega in stated.items()} == {n: round(b / 1e6, 1) for n, b in found.items()}


@pytest.mark.parametrize("name", shipped_rulesets())
def test_file_is_short_and_explains_itself(name: str) -> None:
    text = text_of(name)
    comment, _, body = text.partition("ktfx: 1\n")
    lines = comment.splitlines()
    assert len(lines) >= 3
    assert all(line.startswith("#") and len(line) <= 120 for line in lines)
    assert len(body.splitlines()) <= 16
    assert not re.search(r"\\d|\[\d|\d\|", body), "a regular expression over layer numbers: use layers:"
    ruleset = load_ruleset(name)
    number = re.search(r"-(\d)gpu", name)
    expected = {f"gpu{i}": f"cuda:{i}" for i in range(int(number[1]))} if number else {}
    assert {k: v for k, v in ruleset.devices.items() if v != "cpu"} == expected


def test_every_file_belongs_to_the_index() -> None:
    families = {*FAMILIES.values(), "generic", *(name for sizes in SIZES.values() for name in sizes)}
    indexed = {f"{family}-{count}gpu" for family in families for count in GPU_COUNTS}
    assert indexed | {"generic-host", "demo-2gpu-host"} == set(shipped_rulesets())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@pytest.mark.parametrize("count", GPU_COUNTS)
def test_index_finds_the_file_of_each_shape(shape: Shape, count: int) -> None:
    model = meta_model(shape.name)
    parameters = sum(p.numel() for p in model.parameters())
    assert shipped_rules_for(model.config.model_type, count, parameters) == f"{shape.rules[0]}-{count}gpu"


@pytest.mark.parametrize(
    ("model_type", "count", "expected"),
    [
        ("mixtral", 3, "mixtral-2gpu"),
        ("mixtral", 7, "mixtral-4gpu"),
        ("mixtral", 64, "mixtral-8gpu"),
        ("mixtral", 0, "generic-host"),
        ("kimi_k2", 1, "kimi-k2-1gpu"),
        ("llama4", 2, "llama-4-2gpu"),
        ("llama", 2, "generic-2gpu"),
        ("", 1, "generic-1gpu"),
        (None, 1, "generic-1gpu"),
    ],
)
def test_index_falls_back(model_type: str | None, count: int, expected: str) -> None:
    assert shipped_rules_for(model_type, count) == expected


def test_index_gives_a_small_model_its_family_file() -> None:
    assert shipped_rules_for("qwen3_moe", 2, parameters=3.7e6) == "qwen3-moe-2gpu"


def test_index_refuses_a_negative_number() -> None:
    with pytest.raises(OptionError, match="-1 GPUs"):
        shipped_rules_for("mixtral", -1)

"""Rule files as data: what is read, and what each bad file is told, with its place."""

from __future__ import annotations

import contextlib
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ktfx.devices import DeviceMap, device_map
from ktfx.errors import KtfxError, OptionError, Origin, PlacementError, RuleError
from ktfx.patterns import Call, Capture, Literal, Sequence, captures, operators, parse_pattern
from ktfx.ruleset import LayerRange, Where, load_ruleset, parse_ruleset, shipped_rulesets

EXAMPLE = r"""ktfx: 1
devices: {gpu0: cuda:0, gpu1: cuda:1, host: cpu}
default_device: gpu0
layers: {0-29: gpu0, 30-59: gpu1}
passes:
  - rewrite_experts
  - fuse_norms: {device: cuda}
rules:
  - match: {name: '^model\.layers\.[4-8]\.mlp\.experts$'}
    replace: {op: experts.triton, weights: int4}
  - match: {module: experts}
    replace: {op: experts.cpu, weights: int4, group_size: 128, activations: bf16}
  - match: {class: torch.nn.Linear, layers: '0-3,7'}
    replace:
      device: gpu1
      out_device: host
      fallback: aten
      prefill: {op: linear.aten}
      generate: {op: linear.triton, weights: fp8, device: gpu0}
    recursive: false
  - match: {pattern: 'aten.mul(aten.silu(gate), up)', where: {device: cuda, dtype: bf16, phase: generate,
        shapes: {gate: [any, 768]}}}
    replace: {with: 'ktfx.silu_and_mul(gate, up)'}
"""


def test_the_example_of_the_design_is_read_whole() -> None:
    rules = parse_ruleset(EXAMPLE, "a.yaml")
    assert (rules.dialect, rules.default_device, str(rules.origin)) == ("ktfx", "gpu0", "a.yaml")
    assert rules.devices == {"gpu0": "cuda:0", "gpu1": "cuda:1", "host": "cpu"}
    assert rules.layers == (
        LayerRange(0, 29, "gpu0", Origin("a.yaml", 4, 10)),
        LayerRange(30, 59, "gpu1", Origin("a.yaml", 4, 22)),
    )
    assert rules.passes is not None
    assert [(p.name, p.options, p.origin.line) for p in rules.passes] == [
        ("rewrite_experts", {}, 6),
        ("fuse_norms", {"device": "cuda"}, 7),
    ]
    first, second, third, fourth = rules.rules
    assert [r.label for r in rules.rules] == ["rule 1", "rule 2", "rule 3", "rule 4"]
    assert [r.generic for r in rules.rules] == [False, True, True, True]
    assert first.origin == Origin("a.yaml", 9, 5)
    assert first.match.name == r"^model\.layers\.[4-8]\.mlp\.experts$"
    assert first.replace.prefill == first.replace.generate
    assert (first.replace.generate.op, first.replace.generate.weights, first.replace.generate.device) == (
        "experts.triton",
        "int4",
        None,
    )
    assert second.match.module == "experts"
    assert second.replace.generate.weights == "int4-g128"
    assert second.replace.options == {"activations": "bf16", "group_size": 128}
    assert third.match.cls == "torch.nn.Linear"
    assert third.match.layers == frozenset({0, 1, 2, 3, 7})
    assert not third.recursive
    assert (third.replace.prefill.device, third.replace.prefill.op) == ("gpu1", "linear.aten")
    generate = third.replace.generate
    assert (generate.device, generate.op, generate.weights) == ("gpu0", "linear.triton", "fp8")
    assert (third.replace.out_device, third.replace.fallback) == ("host", "aten")
    assert fourth.match.where == Where("bfloat16", "cuda", "generate", {"gate": (None, 768)})
    assert fourth.replace.with_ == "ktfx.silu_and_mul(gate, up)"
    assert isinstance(fourth.pattern, Call) and isinstance(fourth.with_, Call)
    assert [r.number for r in rules.pattern_rules] == [4]
    assert [r.number for r in rules.module_rules] == [1, 2, 3]


def test_python_data_reads_as_the_file_does() -> None:
    data = yaml.safe_load(EXAMPLE)
    from_data, from_text = load_ruleset(data), parse_ruleset(EXAMPLE)
    for ours, theirs in zip(from_data.rules, from_text.rules, strict=True):
        assert (ours.match, ours.replace, ours.recursive) == (theirs.match, theirs.replace, theirs.recursive)
    assert [(r.first, r.last, r.device) for r in from_data.layers] == [(0, 29, "gpu0"), (30, 59, "gpu1")]
    assert from_data.rules[0].origin.line == 0
    assert load_ruleset(from_data) is from_data


def test_python_list_is_a_ktransformers_file() -> None:
    rules = load_ruleset([{"match": {"name": "^lm_head$"}, "replace": {"class": "default"}}])
    assert (rules.dialect, rules.default_device) == ("ktransformers", "cuda:0")


def test_path_and_shipped_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(EXAMPLE)
    assert load_ruleset(file).origin.file == str(file)
    assert load_ruleset(str(file)).rules[1].origin == Origin(str(file), 11, 5)
    for name in shipped_rulesets():
        assert load_ruleset(name).origin.file == f"{name}.yaml"
        assert load_ruleset(f"{name}.yaml").dialect in ("ktfx", "ktransformers")


def test_even_split_of_the_layers() -> None:
    rules = parse_ruleset("ktfx: 1\nlayers: [cuda:0, cuda:1, cuda:2]\n")
    for count in (1, 2, 3, 27, 61):
        ranges = rules.layer_ranges(count)
        covered = [layer for r in ranges for layer in range(r.first, r.last + 1)]
        assert covered == list(range(count))
        sizes = [r.last - r.first + 1 for r in ranges]
        assert max(sizes) - min(sizes) <= 1
    assert [r.device for r in rules.layer_ranges(61)] == ["cuda:0", "cuda:1", "cuda:2"]
    assert rules.layer_ranges(0) == ()


def test_aliases_and_merge_keys() -> None:
    text = """\
    ktfx: 1
    rules:
      - match: {module: experts, layers: 0-3}
        replace: &host {op: experts.cpu, weights: int4}
      - match: {module: experts}
        replace: {<<: *host, weights: int8}
      - match: {name: x}
        replace: *host
    """
    rules = parse_ruleset(textwrap.dedent(text)).rules
    assert [(r.replace.generate.op, r.replace.generate.weights) for r in rules] == [
        ("experts.cpu", "int4"),
        ("experts.cpu", "int8"),
        ("experts.cpu", "int4"),
    ]


def test_keys_of_layers_are_read_as_text() -> None:
    """YAML would make 7 a number, 010 an octal one and 1:30 ninety."""
    rules = parse_ruleset("ktfx: 1\nlayers: {7: cpu, 010: 'cuda:1', '11-12,14': cuda}\n")
    assert [(r.first, r.last, r.device) for r in rules.layers] == [
        (7, 7, "cpu"),
        (10, 10, "cuda:1"),
        (11, 12, "cuda:0"),
        (14, 14, "cuda:0"),
    ]


# ---- bad files: text, line, column (0: any), what is said, how it is mended

HEAD = "ktfx: 1\n"
RULE = "rules:\n  - match: {module: experts}\n    replace: "
MATCH = HEAD + "rules:\n  - match: {%s}\n    replace: {%s}\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD: dict[str, tuple[str, int, int, str, str | None]] = {
    "empty": ("", 1, 1, "the file is empty", "write at least one rule"),
    "only a comment": ("# nothing\n", 1, 1, "the file is empty", None),
    "scalar": ("experts on the host\n", 1, 1, "the file holds a string ('experts on the host')", "ktfx: 1"),
    "null": ("~\n", 1, 1, "the file holds nothing", None),
    "list of strings": ("- a\n- b\n", 1, 3, "the rule is a string ('a')", "- match:"),
    "empty list": ("[]\n", 1, 1, "the file holds no rule", None),
    "tab": ("ktfx: 1\nrules:\n\t- match: {module: experts}\n", 3, 1, "a tab is used for indentation", "use spaces"),
    "two documents": ("ktfx: 1\n---\nktfx: 1\n", 2, 1, "a second YAML document begins", None),
    "duplicate key": (HEAD + "default_device: cpu\ndefault_device: cuda\n", 3, 1, "given twice", "remove one"),
    "duplicate match": (HEAD + RULE + "{op: experts.cpu}\n    match: {}\n",
        5, 5, "'match' is given twice", "its own '-'"),
    "open bracket": (HEAD + "rules: [\n", 3, 1, "not YAML", "brackets"),
    "unknown alias": (HEAD + "default_device: *gpu\n", 2, 17, "undefined alias", "write the anchor"),
    "own tag": (HEAD + "rules: !!python/object/apply:os.system [ls]\n", 2, 8, "tag", "plain lists and mappings"),
    "alias bomb": (BOMB, 5, 4, "aliases expand to too many values", "write the rules out"),
    "alias of itself": (HEAD + "rules: &r [*r]\n", 2, 8, "inside its own anchor", "remove the alias"),
    "deep": ("[" * 200, 1, 33, "nested too deeply", None),
    "deeper than PyYAML goes": ("[" * 2000, 1, 0, "nested too deeply", None),
    "list as key": (HEAD + "? [a]\n: 1\n", 2, 3, "a key is a list", None),
    "no version": ("rules: []\n", 1, 1, "does not say which format", "ktfx: 1"),
    "wrong version": ("ktfx: 2\n", 1, 7, "`ktfx:` is a number ('2')", "format 1"),
    "version true": ("ktfx: true\n", 1, 7, "`ktfx:` is a boolean", None),
    "unknown top key": (HEAD + "rule: []\n", 2, 1, "unknown key 'rule' in the file", "did you mean 'rules'?"),
    "rules a mapping": (HEAD + "rules: {a: 1}\n", 2, 8, "`rules:` is a mapping", None),
    "unknown rule key": (HEAD + RULE + "{op: aten}\n    recusive: false\n", 5, 5, "'recusive'", "'recursive'"),
    "recursive string": (HEAD + RULE + '{op: aten}\n    recursive: "False"\n', 5, 16, "a string ('False')", "quotes"),
    "recursive number": (HEAD + RULE + "{op: aten}\n    recursive: 0\n", 5, 16, "a number ('0')", None),
    "regex": (MATCH % ("name: 'layers\\.(1'", "op: aten"), 3, 19, "does not compile", "\\."),
    "regex a number": (HEAD + "rules:\n  - match: {name: 1}\n    replace: {op: aten}\n", 3, 19, "is a number", None),
    "role": (HEAD + RULE.replace("experts", "expert") + "{op: aten}\n", 3, 21, "'expert'", "did you mean 'experts'?"),
    "op": (HEAD + RULE + "{op: expert.cpu}\n", 4, 19, "unknown op 'expert.cpu'", "did you mean 'experts.cpu'?"),
    "weights": (HEAD + RULE + "{op: experts.cpu, weights: int5}\n", 4, 41, "int5", "int"),
    "group": (HEAD + RULE + "{op: experts.cpu, weights: int4, group_size: 48}\n", 4, 41, "48", None),
    "group alone": (HEAD + RULE + "{op: experts.cpu, group_size: 64}\n", 4, 44, "without `weights:`", "int4"),
    "device": (HEAD + "devices: {gpu0: cuda:0}\n" + RULE + "{device: gpu1}\n", 5, 23, "device 'gpu1'", "'gpu0'?"),
    "npu": (HEAD + RULE + "{device: 'npu:0'}\n", 4, 23, "device 'npu:0' is of a kind", "cuda:N"),
    "device target": (HEAD + "devices: {gpu0: gpu}\n", 2, 17, "unknown device 'gpu'", None),
    "device of default": (HEAD + "default_device: gpu0\n", 2, 17, "unknown device 'gpu0'", "`devices:`"),
    "empty replace": (HEAD + RULE + "{}\n", 4, 14, "`replace:` is empty", None),
    "replace a string": (HEAD + RULE + "experts.cpu\n", 4, 14, "`replace:` is a string", None),
    "phase key": (HEAD + RULE + "{prefill: {out_device: cpu}}\n", 4, 25, "unknown key 'out_device'", None),
    "kwargs and op": (HEAD + RULE + "{class: default, op: aten}\n", 4, 31, "`op:` stands beside", None),
    "layers overlap": (HEAD + "layers:\n  0-29: cpu\n  29-40: cuda\n", 4, 3, "layer 29 is in two ranges", "one device"),
    "layers backwards": (HEAD + "layers: {9-3: cpu}\n", 2, 10, "ends before it begins", "smaller layer first"),
    "layers word": (HEAD + "layers: {first: cpu}\n", 2, 10, "'first'", "from 0"),
    "layers huge": (HEAD + "layers: {0-999999: cpu}\n", 2, 10, "names layer 999999", None),
    "layers empty list": (HEAD + "layers: []\n", 2, 9, "`layers:` is an empty list", None),
    "two passes in one": (HEAD + "passes:\n  - a: {}\n    b: {}\n", 3, 5, "a pass has 2 keys", "its own '-'"),
    "pass options": (HEAD + "passes:\n  - a: 3\n", 3, 8, "the options of a is a number", None),
    "where phase": (
        MATCH % ("module: mlp, where: {phase: prefill}", "op: aten"), 3, 41,
        "`where.phase` stands in a rule for modules", "replace: {prefill: {",
    ),
    "where dtype": (
        MATCH % ("module: mlp, where: {dtype: bfloat}", "op: aten"), 3, 41, "`where.dtype` is 'bfloat'", "did you mean",
    ),
    "pattern alone": (
        MATCH % ("pattern: aten.silu(x)", "op: aten"), 3, 5,
        "`match.pattern` but no `replace.with`", "add `replace.with`",
    ),
    "with alone": (HEAD + RULE + "{with: aten.silu(x)}\n", 3, 5, "`replace.with` but no `match.pattern`", None),
    "pattern syntax": (
        MATCH % ("pattern: 'aten.silu(x'", "with: aten.relu(x)"), 3, 0, "the pattern is no expression", "brackets",
    ),
    "pattern sign": (
        MATCH % ("pattern: 'aten.silu(a + b)'", "with: aten.relu(a)"), 3, 33, "an arithmetic sign", "aten.add(a, b)",
    ),
    "pattern block": (
        HEAD + "rules:\n  - match:\n      pattern: |\n        aten.silu(\n        x.y)\n    replace: {op: aten}\n",
        6, 0,
        "'x.y' is not called", None,
    ),
    "pattern name": (
        MATCH % ("pattern: aten.silu(x)", "with: aten.relu(y)"), 4, 21,
        "uses 'y', which the pattern does not capture", None,
    ),
    "where shapes": (
        MATCH % ("pattern: aten.silu(gate), where: {shapes: {gat: [1]}}", "with: aten.relu(gate)"), 3, 56,
        "names 'gat'", "did you mean 'gate'?",
    ),
    "pattern and device": (
        MATCH % ("pattern: aten.silu(x)", "with: aten.relu(x), device: cpu"), 4, 43,
        "`device:` stands in a pattern rule", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_file(name: str) -> None:
    text, line, column, what, mend = BAD[name]
    with pytest.raises(RuleError) as caught:
        parse_ruleset(text, "bad.yaml")
    error = caught.value
    assert error.origin is not None
    assert (error.origin.file, error.origin.line) == ("bad.yaml", line)
    if column:
        assert error.origin.column == column
    assert what in error.what
    assert (mend or "") in (error.mend or "")
    assert str(error).startswith(f"bad.yaml:{line}:")


def test_errors_name_the_rule() -> None:
    with pytest.raises(RuleError, match=r"^f\.yaml:5:\d+, rule 2: unknown op 'x'"):
        parse_ruleset(HEAD + RULE + "{op: aten}\n  - {match: {module: mlp}, replace: {op: x}}\n", "f.yaml")


def test_ten_megabytes_are_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "big.yaml"
    file.write_text("ktfx: 1\n# " + "x" * 10_000_000)
    with pytest.raises(RuleError, match="10,000,010 bytes") as caught:
        load_ruleset(file)
    assert caught.value.origin == Origin(str(file))
    with pytest.raises(RuleError, match="bytes"):
        parse_ruleset("- " * 6_000_000)


def test_many_small_values_are_refused() -> None:
    with pytest.raises(RuleError, match="too many values"):
        parse_ruleset("[" + "1," * 60_000 + "]")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(RuleError, match="no such rule file: 'no/such"):
        load_ruleset("no/such.yaml")
    with pytest.raises(RuleError, match="YAML text was given"):
        load_ruleset(EXAMPLE)
    with pytest.raises(RuleError):
        load_ruleset("x" * 3000)
    with pytest.raises(RuleError, match="directory"):
        load_ruleset(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"ktfx: 1\n# \xe9\n")
    with pytest.raises(RuleError, match="byte 10 is no UTF-8"):
        load_ruleset(latin)
    control = tmp_path / "control.yaml"
    control.write_bytes(b"ktfx: \x01\n")
    with pytest.raises(RuleError, match="not YAML"):
        load_ruleset(control)


def test_near_name_of_a_shipped_file() -> None:
    shipped = shipped_rulesets()
    if not shipped:
        pytest.skip("no rule file ships yet")
    with pytest.raises(RuleError) as caught:
        load_ruleset(shipped[0] + "x")
    assert caught.value.mend == f"did you mean {shipped[0]!r}?"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ({"ktfx": 1, "rules": [{"match": {"module": {1, 2}}, "replace": {}}]}, "set cannot stand in rules"),
        ({"ktfx": 1, (1, 2): 3}, "is no string"),
        ({"ktfx": 1, "rules": b"x"}, "bytes cannot stand in rules"),
        ({"ktfx": 1, "rulez": []}, "unknown key 'rulez'"),
        ([], "holds no rule"),
        ({}, "does not say which format"),
        (["x"], "the rule is a string"),
    ],
)
def test_bad_python_data(data: dict[object, object] | list[object], what: str) -> None:
    with pytest.raises(RuleError, match="rules given in Python") as caught:
        load_ruleset(data)  # type: ignore[arg-type]
    assert what in caught.value.what


def test_python_data_that_contains_itself() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(RuleError, match="nested too deeply"):
        load_ruleset({"ktfx": 1, "rules": loop})


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_file_is_read_or_refused_and_never_crashes(data: st.DataObject) -> None:
    text = EXAMPLE
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 12))
        extra = data.draw(st.text(alphabet="{}[]:,-'\"#&*!|>%@`\t\n ax01.\\()?", max_size=4))
        text = text[:at] + extra + text[at + cut :]
    try:
        parse_ruleset(text, "f.yaml")
    except RuleError as error:
        assert error.origin is not None and error.origin.file == "f.yaml"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 99) | st.sampled_from(["experts", "cpu", "x", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["ktfx", "rules", "match", "replace", "name", "op", "layers", "devices", "kwargs", "class"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON)
@settings(max_examples=300, deadline=None)
def test_any_data_is_read_or_refused(data: object) -> None:
    for candidate in (data, {"ktfx": 1, "rules": data}, {"ktfx": 1, "rules": [data]}, [data]):
        if isinstance(candidate, dict | list):
            try:
                load_ruleset(candidate)
            except RuleError:
                continue


# ---- patterns


def test_pattern_tree() -> None:
    tree = parse_pattern("aten.mul.Tensor(aten.silu(gate), up, alpha=-1.5)")
    assert tree == Call(
        "aten.mul.Tensor",
        (Call("aten.silu", (Capture("gate"),), ()), Capture("up")),
        (("alpha", Literal(-1.5)),),
    )
    assert captures(tree) == ["gate", "up"]
    assert operators(tree) == ["aten.mul.Tensor", "aten.silu"]


def test_pattern_literals_and_lists() -> None:
    tree = parse_pattern("aten.cat([a, _], -1, [1, (2, True)], None, 'x')")
    assert isinstance(tree, Call)
    assert tree.args == (
        Sequence((Capture("a"), Capture("_"))),
        Literal(-1),
        Literal((1, (2, True))),
        Literal(None),
        Literal("x"),
    )
    assert captures(tree) == ["a"]


def test_misspelt_operators_get_the_near_name() -> None:
    with pytest.raises(RuleError) as caught:
        parse_pattern("aten.mul(aten.sillu(x), x)", Origin("f", 3, 10), "rule 2")
    assert str(caught.value.origin) == "f:3:19"
    assert (caught.value.what, caught.value.mend) == ("ATen has no operator 'sillu'", "did you mean 'silu'?")


def test_pattern_over_several_lines() -> None:
    assert parse_pattern("  aten.mul(\n    a,\n    b)\n") == parse_pattern("aten.mul(a, b)")


@pytest.mark.parametrize(
    "text",
    [
        "gate",
        "1",
        "silu(x)",
        "aten.silu",
        "aten.silu(x).y",
        "a.b.c.d(x)",
        "aten.__import__(x)",
        "__import__('os').system('ls')",
        "aten.silu(*x)",
        "aten.silu(**x)",
        "aten.silu(lambda: 1)",
        "aten.silu(x for x in y)",
        "aten.silu(x[0])",
        "aten.silu(f'{x}')",
        "aten.silu(b'x')",
        "aten.silu(x := 1)",
        "aten.silu(1j)",
        "aten.silu(...)",
        "aten.silu(not x)",
        "aten.silu(x if y else z)",
        "aten.silu(x), y",
        "aten.silu(x),",
        "aten.topk(x)[y]",
        "aten.topk(x)[-1]",
        "aten.silu(x)) + (1",
        "aten.silu(x); 1",
        "",
        "aten.silu(\0)",
        "aten.silu(" * 60 + "x" + ")" * 60,
        "(" * 3000,
        "aten.silu(" + "x" * 5000 + ")",
        "atem.silu(x)",
        "aten.sillu(x)",
    ],
)
def test_pattern_allow_list(text: str) -> None:
    with pytest.raises(RuleError):
        parse_pattern(text)


@given(st.text(alphabet="aten.silu(x, y)=[]-1'\"+*:\n ", max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_pattern_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(RuleError):
        assert isinstance(parse_pattern(text), Call)


# ---- devices


def devices(text: str = EXAMPLE, simulate: str | dict[str, str] | None = "cpu") -> DeviceMap:
    return device_map(parse_ruleset(text, "d.yaml"), simulate)


def test_simulate_maps_every_name_that_is_not_the_host() -> None:
    found = devices()
    assert dict(found.real) == {name: torch.device("cpu") for name in ("cpu", "host", "gpu0", "gpu1")}
    assert devices("ktfx: 1\ndefault_device: cuda\n")["cuda"] == torch.device("cpu")


def test_simulate_by_name() -> None:
    for simulate in ({"gpu0": "cpu", "gpu1": "cpu"}, "gpu0=cpu, gpu1=cpu"):
        assert devices(simulate=simulate)["gpu1"] == torch.device("cpu")


def test_virtual_devices_written_in_the_file() -> None:
    found = devices("ktfx: 1\ndevices: {cuda:0: cpu, b: cpu}\nlayers: {0: cuda:0, 1: b}\n", None)
    assert found["cuda:0"] == found["b"] == torch.device("cpu")


def test_unknown_name_in_a_device_map() -> None:
    with pytest.raises(KtfxError, match="no device named 'gpu3'") as caught:
        devices()["gpu3"]
    assert caught.value.mend == "did you mean 'gpu1'?" or caught.value.mend == "did you mean 'gpu0'?"


@pytest.mark.skipif(torch.cuda.device_count() > 6, reason="the device exists here")
def test_a_device_that_does_not_exist() -> None:
    text = "ktfx: 1\ndevices: {far: cuda:6}\nrules:\n  - match: {module: experts}\n    replace: {device: far}\n"
    with pytest.raises(PlacementError, match=r"'far' \(cuda:6\) does not exist") as caught:
        devices(text, None)
    assert caught.value.origin == Origin("d.yaml", 5, 23)
    assert "cpu" in (caught.value.expected or "")
    assert "--simulate cpu" in (caught.value.mend or "")


@pytest.mark.parametrize(
    ("simulate", "what"),
    [("npu", "'npu'"), ({"gpu7": "cpu"}, "'gpu7'"), ({"gpu0": "tpu"}, "'tpu'"), ("gpu9=cpu", "'gpu9'")],
)
def test_bad_simulate(simulate: str | dict[str, str], what: str) -> None:
    with pytest.raises(OptionError, match=what):
        devices(simulate=simulate)

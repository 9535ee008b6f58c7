"""match_patterns and the matcher behind it: what matches, what does not and why, and that values stay."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_runs import PassRun, run_passes
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ktfx.errors import PassError, RuleError
from ktfx.matcher import Failure, Match, Matcher, explain_match
from ktfx.patterns import Call, parse_pattern
from ktfx.ruleset import parse_ruleset

NORM = "aten.mul(weight, aten.mul(x, aten.rsqrt(aten.add(aten.mean(aten.pow(x, 2), [-1], True), eps))))"
SWIGLU = "aten.mul(aten.silu(gate), up)"


@pytest.fixture(scope="module", autouse=True)
def toy_ops() -> Any:
    """Operators to rewrite to, as a user would register them."""
    library = torch.library.Library("toyops", "DEF")
    library.define("silu_and_mul(Tensor gate, Tensor up) -> Tensor")
    library.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
    library.define("add_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)")
    library.define("to_half(Tensor x) -> Tensor")

    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

    def add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
        total = x + residual
        return total, rms_norm(total, weight, eps)

    key = "CompositeExplicitAutograd"
    ops: dict[str, Callable[..., Any]] = {
        "silu_and_mul": lambda gate, up: F.silu(gate) * up,
        "rms_norm": rms_norm,
        "add_norm": add_norm,
        "to_half": lambda x: x.to(torch.float16),
    }
    for name, fn in ops.items():
        library.impl(name, fn, key)
        torch.library.register_fake(f"toyops::{name}", fn, lib=library)
    yield library
    library._destroy()


class Norm(nn.Module):
    def __init__(self, width: int = 8, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(8, 16, bias=False)
        self.up_proj = nn.Linear(8, 16, bias=False)
        self.down_proj = nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()
        self.mlp = Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Body(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Model(nn.Module):
    def __init__(self, count: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Body(count)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.model(hidden_states)


def rule(pattern: str, with_: str, **match: Any) -> dict[str, Any]:
    return {"match": {"pattern": pattern, **match}, "replace": {"with": with_}}


def swiglu_rule(**match: Any) -> dict[str, Any]:
    return rule(SWIGLU, "toyops.silu_and_mul(gate, up)", **match)


def norm_rule(**match: Any) -> dict[str, Any]:
    return rule(NORM, "toyops.rms_norm(x, weight, eps)", **match)


def run(
    *rules: dict[str, Any], model: nn.Module | None = None, shape: tuple[int, ...] = (2, 3, 8), **more: Any
) -> PassRun:
    devices = more.pop("devices", {})
    done = run_passes(model or Model(), {"rules": list(rules), **devices}, torch.randn(shape), **more)
    torch.testing.assert_close(done.out, done.expected)
    return done


def graph_of(fn: Callable[..., Any], *inputs: torch.Tensor) -> fx.Graph:
    return make_fx(fn, tracing_mode="fake", pre_dispatch=True)(*inputs).graph


def matches(pattern: str, fn: Callable[..., Any], *inputs: torch.Tensor) -> list[Match]:
    return Matcher.of(pattern).find(graph_of(fn, *inputs))


X, Y = torch.randn(2, 6), torch.randn(2, 6)

# ---- spelling: pattern, function, inputs, number of matches

SPELLINGS: dict[str, tuple[str, Callable[..., Any], tuple[torch.Tensor, ...], int]] = {
    "as written": (SWIGLU, lambda g, u: F.silu(g) * u, (X, Y), 1),
    "operands swapped": (SWIGLU, lambda g, u: u * F.silu(g), (X, Y), 1),
    "method for operator": (SWIGLU, lambda g, u: u.mul(torch.ops.aten.silu(g)), (X, Y), 1),
    "silu spelt out": (SWIGLU, lambda g, u: torch.sigmoid(g) * g * u, (X, Y), 1),
    "pattern spells silu out": ("aten.mul(aten.sigmoid(x), x)", lambda g: F.silu(g), (X,), 1),
    "silu of another": (SWIGLU, lambda g, u: torch.sigmoid(g) * u, (X, Y), 0),
    "square as product": ("aten.mean(aten.pow(x, 2), -1)", lambda x: (x * x).mean(-1), (X,), 1),
    "square as square": ("aten.mean(aten.mul(x, x), -1)", lambda x: x.square().mean(-1), (X,), 1),
    "product of two": ("aten.pow(x, 2)", lambda x, y: x * y, (X, Y), 0),
    "rsqrt as power": ("aten.rsqrt(x)", lambda x: x.abs() ** -0.5, (X,), 1),
    "rsqrt as reciprocal": ("aten.rsqrt(x)", lambda x: 1.0 / x.abs().sqrt(), (X,), 1),
    "pattern spells rsqrt out": ("aten.reciprocal(aten.sqrt(x))", lambda x: x.abs().rsqrt(), (X,), 1),
    "keyword for position": ("aten.mean(x, dim=-1, keepdim=True)", lambda x: x.mean((-1,), True), (X,), 1),
    "dim from the front": ("aten.softmax(x, 1)", lambda x: F.softmax(x, dim=-1), (X,), 1),
    "another dim": ("aten.softmax(x, 0)", lambda x: F.softmax(x, dim=-1), (X,), 0),
    "unsqueeze counts the result": ("aten.unsqueeze(x, -1)", lambda x: x.unsqueeze(2), (X,), 1),
    "softmax in its own dtype": ("aten.softmax(x, -1)", lambda x: F.softmax(x, -1, dtype=torch.float32), (X,), 1),
    "softmax in another dtype": ("aten.softmax(x, -1)", lambda x: F.softmax(x, -1, dtype=torch.float64), (X,), 0),
    "dtype as text": ("aten.softmax(x, -1, 'float64')", lambda x: F.softmax(x, -1, dtype=torch.float64), (X,), 1),
    "literal as int": ("aten.mul(x, 2.0)", lambda x: x * 2, (X,), 1),
    "literal first": ("aten.mul(2, x)", lambda x: x * 2, (X,), 1),
    "other literal": ("aten.mul(x, 3)", lambda x: x * 2, (X,), 0),
    "default left out": ("aten.add(x, y)", lambda x, y: torch.add(x, y, alpha=2), (X, Y), 0),
    "default captured": ("aten.add(x, y, alpha=a)", lambda x, y: torch.add(x, y, alpha=2), (X, Y), 1),
    "scaled add is not swapped": (
        "aten.add(aten.neg(x), y, alpha=2)",
        lambda x, y: torch.add(y, -x, alpha=2),
        (X, Y),
        0,
    ),
    "sub from the right": ("aten.sub(1, x)", lambda x: torch.rsub(x, 1), (X,), 1),
    "same name, same value": ("aten.add(aten.sin(x), aten.cos(x))", lambda x: x.sin() + x.cos(), (X,), 1),
    "same name, other value": ("aten.add(aten.sin(x), aten.cos(x))", lambda x, y: x.sin() + y.cos(), (X, Y), 0),
    "underscore is anything": ("aten.add(aten.sin(_), aten.cos(_))", lambda x, y: x.sin() + y.cos(), (X, Y), 1),
    "copies between": (SWIGLU, lambda g, u: (F.silu(g).clone() * 1.0) * u.detach(), (X, Y), 1),
    "a cast between": (SWIGLU, lambda g, u: F.silu(g).double() * u, (X, Y), 0),
    "cast in the pattern only": ("aten.sin(aten.to(aten.neg(x), 'float32'))", lambda x: (-x).sin(), (X,), 1),
    "cast to another": ("aten.sin(aten.to(aten.neg(x), 'float64'))", lambda x: (-x).sin(), (X,), 0),
    "cast in both": ("aten._to_copy(aten.neg(x), dtype=t)", lambda x: (-x).to(torch.float64), (X,), 1),
    "reshape for view": ("aten.view(aten.neg(x), [-1, 3])", lambda x: (-x).reshape(4, 3), (X,), 1),
    "other shape": ("aten.view(aten.neg(x), [-1, 2])", lambda x: (-x).reshape(4, 3), (X,), 0),
    "transpose either way": ("aten.transpose(x, 0, 1)", lambda x: x.transpose(1, 0), (X,), 1),
    "transpose by permute": ("aten.transpose(x, 0, -1)", lambda x: x.permute(1, 0), (X,), 1),
    "halves by slices": (
        "aten.mul(aten.silu(aten.chunk(h, 2, -1)[0]), aten.chunk(h, 2, -1)[1])",
        lambda h: F.silu(h[..., :3]) * h[..., 3:],
        (X,),
        1,
    ),
    "halves by split": (
        "aten.mul(aten.silu(aten.chunk(h, 2, -1)[0]), aten.chunk(h, 2, -1)[1])",
        lambda h: F.silu(h.split(3, -1)[0]) * h.split(3, -1)[1],
        (X,),
        1,
    ),
    "halves the other way round": (
        "aten.mul(aten.silu(aten.chunk(h, 2, -1)[0]), aten.chunk(h, 2, -1)[1])",
        lambda h: F.silu(h[..., 3:]) * h[..., :3],
        (X,),
        0,
    ),
    "slices by split": ("aten.neg(aten.slice(h, 1, 2, 4))", lambda h: -h.split(2, 1)[1], (X,), 1),
    "an item of a pair": ("aten.topk(x, k)[1]", lambda x: x.topk(2)[1], (X,), 1),
    "lists": ("aten.cat([aten.neg(b), a], -1)", lambda a, b: torch.cat((-b, a), dim=1), (X, Y), 1),
    "list of other length": ("aten.cat([aten.neg(b), a], -1)", lambda a, b: torch.cat((-b, a, a), 1), (X, Y), 0),
    "overload named": ("aten.pow.Tensor_Scalar(x, 2)", lambda x: x**2, (X,), 1),
    "other overload named": ("aten.pow.Tensor_Tensor(x, y)", lambda x: x**2, (X,), 0),
    "captured twice as inner": ("aten.add(aten.sin(x), y)", lambda x: x.sin() + x.sin(), (X,), 1),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_spelling(case: str) -> None:
    pattern, fn, inputs, count = SPELLINGS[case]
    graph = graph_of(fn, *inputs)
    before = str(graph)
    assert len(Matcher.of(pattern).find(graph)) == count
    assert str(graph) == before, "matching changed the graph"


def test_numbers_are_captured() -> None:
    (match,) = matches("aten.add(aten.mean(x, dims, keep), eps)", lambda x: x.mean(-1, keepdim=True) + 1e-6, X)
    assert match.captures["eps"] == 1e-6
    assert match.captures["dims"] == [-1] and match.captures["keep"] is True
    assert [n.name for n in match.nodes] == ["mean", "add"] and [n.name for n in match.inner] == ["mean"]


def test_matches_that_overlap_share_no_node() -> None:
    graph = graph_of(lambda a, b: a + b + a + b, X, Y)
    found = Matcher.of("aten.add(aten.add(p, q), r)").find(graph)
    assert len(found) == 1, "three sums hold one pair: the second would take a node of the first"
    graph = graph_of(lambda a, b: a + b + a + b + a, X, Y)
    found = Matcher.of("aten.add(aten.add(p, q), r)").find(graph)
    assert len(found) == 2
    assert not set(found[0].nodes) & set(found[1].nodes)


SPELT = {
    "square": [lambda x: x * x, lambda x: x.pow(2), lambda x: x.square(), lambda x: torch.pow(x, exponent=2.0)],
    "mean": [lambda v: v.mean(-1, keepdim=True), lambda v: torch.mean(v, dim=(1,), keepdim=True)],
    "sum": [lambda v, e: v + e, lambda v, e: torch.add(v, e), lambda v, e: e + v],
    "root": [torch.rsqrt, lambda v: v**-0.5, lambda v: 1 / v.sqrt(), lambda v: v.sqrt().reciprocal()],
    "scale": [lambda x, r: x * r, lambda x, r: r * x, lambda x, r: x.mul(r).clone()],
    "weigh": [lambda w, n: w * n, lambda w, n: n * w, lambda w, n: torch.mul(n.contiguous(), w)],
}


@given(st.fixed_dictionaries({k: st.sampled_from(v) for k, v in SPELT.items()}), st.sampled_from([1e-6, 1e-5, 0.5]))
@settings(max_examples=40, deadline=None)
def test_a_norm_matches_however_it_is_spelt(spelt: dict[str, Callable[..., Any]], eps: float) -> None:
    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        root = spelt["root"](spelt["sum"](spelt["mean"](spelt["square"](x)), eps))
        return spelt["weigh"](w, spelt["scale"](x, root))

    (match,) = matches(NORM, norm, X, Y)
    assert match.captures["eps"] == eps
    assert match.captures["x"].name == "x_1" and match.captures["weight"].name == "w_1"


# ---- why not

WHY: dict[str, tuple[str, Callable[..., Any], str, str]] = {
    "other op": (SWIGLU, lambda x, y: F.gelu(x) * y, "op", "expects aten.silu, the graph has aten.gelu.default (gelu)"),
    "literal": (
        "aten.add(aten.mean(x, -1, True), 1e-5)", lambda x, y: x.mean(-1, True) + 1e-6,
        "literal", "aten.add › other: expects 1e-05, the graph has 1e-06",
    ),
    "keepdim": (
        "aten.sin(aten.mean(x, -1))", lambda x, y: x.mean(-1, True).sin(),
        "arguments", "the graph has keepdim=True, which the pattern does not write",
    ),
    "capture": (
        "aten.mul(x, aten.sigmoid(aten.neg(x)))", lambda x, y: x * torch.sigmoid(-y),
        "capture", "x is input y_1 here and input x_1 elsewhere",
    ),
    "input": ("aten.neg(aten.silu(x))", lambda x, y: -x, "op", "expects aten.silu, the graph has input x_1"),
}  # fmt: skip


@pytest.mark.parametrize("case", WHY)
def test_the_first_thing_that_failed(case: str) -> None:
    pattern, fn, kind, text = WHY[case]
    graph = graph_of(fn, X, Y)
    matcher = Matcher.of(pattern)
    failures = [matcher.match(n) for n in matcher.candidates(graph.nodes)]
    nearest = max((f for f in failures if isinstance(f, Failure)), key=lambda f: f.matched)
    assert nearest.kind == kind and text in nearest.text


def test_a_second_reader_is_named() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> Any:
        inner = F.silu(x)
        return inner * y, inner.sum()

    graph = graph_of(fn, X, Y)
    (root,) = Matcher.of(SWIGLU).candidates(graph.nodes)
    result = Matcher.of(SWIGLU).match(root)
    assert isinstance(result, Failure) and result.kind == "users"
    assert result.text == "aten.silu.default (silu) is also read by aten.sum.default (sum_1)"
    graph = graph_of(lambda x, y: (F.silu(x) * y, F.silu(x)), X, Y)
    assert len(Matcher.of(SWIGLU).find(graph)) == 1, "computed twice, each is read once"


def test_a_part_may_be_read_elsewhere() -> None:
    def fn(h: torch.Tensor) -> Any:
        a, b, c = h.split(2, -1)
        return a.sin() + b, b, c

    (match,) = matches("aten.add(aten.sin(aten.split(h, 2, -1)[0]), aten.split(h, 2, -1)[1])", fn, X)
    assert "split" not in [n.name for n in match.nodes]


def test_too_many_ways_end() -> None:
    """Every sum can be read both ways, so a chain of n has 2ⁿ readings; what cannot match must still end."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            x = x.sin() + x.cos()
        return x

    pattern = "aten.neg(y)"
    for _ in range(16):
        pattern = f"aten.add(aten.sin(_), aten.cos({pattern}))"
    graph = graph_of(fn, X)
    matcher = Matcher.of(pattern.replace("aten.sin(_)", "_"))
    result = matcher.match(matcher.candidates(graph.nodes)[-1])
    assert isinstance(result, Failure)


def test_explain(golden: Callable[[str, str], None]) -> None:
    graph = graph_of(lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), X, Y)
    lines = explain_match(graph, NORM)
    lines += ["", *explain_match(graph, NORM.replace("eps", "1e-5"))]
    lines += ["", *explain_match(graph, SWIGLU), "", *explain_match(graph, "aten.silu(x)")]
    golden("explain_match.txt", "\n".join(lines) + "\n")


# ---- the pass


def test_swiglu_in_every_layer(golden: Callable[[str, str], None]) -> None:
    done = run(swiglu_rule())
    assert done.ops_before["aten.silu.default"] == 2 and done.ops["aten.silu.default"] == 0
    assert done.ops["toyops.silu_and_mul.default"] == 2
    first, second = done.context.rewrites
    assert first.module == "model.layers.0.mlp" and second.module == "model.layers.1.mlp"
    assert first.before == ("aten.silu.default", "aten.mul.Tensor") and first.rule == "rule 1"
    assert first.nodes_before == ("silu", "mul_2") and (first.number, second.number) == (1, 2)
    node = done.node(first.nodes_after[0])
    assert node.meta["val"].shape == (2, 3, 16) and node.meta["ktfx"].layer == 0 and "stack_trace" in node.meta
    assert not done.context.warnings
    golden("swiglu.diff", done.diff())


def test_norms_with_their_eps(golden: Callable[[str, str], None]) -> None:
    model = Model()
    model.model.layers[1].norm.eps = 0.25
    done = run(norm_rule(), model=model)
    calls = [n for n in done.after.graph.nodes if "rms_norm" in str(n.target)]
    assert [n.args[2] for n in calls] == [1e-6, 0.25]
    golden("norm.diff", done.diff())


def test_one_eps_by_literal() -> None:
    model = Model()
    model.model.layers[1].norm.eps = 0.25
    done = run(rule(NORM.replace("eps", "0.25"), "toyops.rms_norm(x, weight, 0.25)"), model=model)
    assert done.ops["toyops.rms_norm.default"] == 1
    (miss,) = done.context.misses
    assert miss.module == "model.layers.0.norm" and miss.rule == "rule 1"
    assert "expects 0.25, the graph has 1e-06" in miss.why


def test_a_rule_sees_what_the_rules_before_it_made() -> None:
    done = run(norm_rule(), rule("toyops.rms_norm(x, w, eps)", "toyops.rms_norm(x, w, eps)"), swiglu_rule())
    assert [r.rule for r in done.context.rewrites] == ["rule 1"] * 2 + ["rule 2"] * 2 + ["rule 3"] * 2
    assert done.ops["toyops.rms_norm.default"] == 2


def test_first_rule_takes_the_nodes() -> None:
    done = run(swiglu_rule(layers="0"), rule(SWIGLU, "aten.mul(up, aten.silu(gate))"))
    assert done.ops["toyops.silu_and_mul.default"] == 1
    assert [(r.rule, r.module) for r in done.context.rewrites] == [
        ("rule 1", "model.layers.0.mlp"),
        ("rule 2", "model.layers.1.mlp"),
    ]


class Chain(nn.Module):
    def forward(self, a: torch.Tensor) -> torch.Tensor:
        return a + 1 + 2 + 3 + 4 + 5


class Holder(nn.Module):
    """Puts a module one level down, where nodes carry its path, beside a weight that makes it a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Any:
        out = self.inner(x)
        return (self.head(out[0]), *out[1:]) if isinstance(out, tuple) else self.head(out)


def test_each_node_is_rewritten_once(golden: Callable[[str, str], None]) -> None:
    """Of four overlapping pairs in a chain of five sums the first and the third go; no result is matched again."""
    done = run(rule("aten.add(aten.add(x, a), b)", "aten.add(aten.add(x, b), a)"), model=Holder(Chain()))
    first, second = done.context.rewrites
    assert first.nodes_before == ("add", "add_1") and second.nodes_before == ("add_2", "add_3")
    golden("chain.diff", done.diff())


SCOPES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "name": ({"name": r"^model\.layers\.1\.mlp$"}, [1]),
    "name of the layer around it": ({"name": r"layers\.0$"}, [0]),
    "role": ({"module": "mlp"}, [0, 1, 2]),
    "role around it": ({"module": "layer"}, [0, 1, 2]),
    "other role": ({"module": "attention"}, []),
    "layers": ({"layers": "1-2"}, [1, 2]),
    "class": ({"class": "Mlp"}, [0, 1, 2]),
    "class and name of one module": ({"class": "Layer", "name": r"2$"}, [2]),
    "class and name of two": ({"class": "Layer", "name": r"mlp$"}, []),
    "dtype": ({"where": {"dtype": "fp32"}}, [0, 1, 2]),
    "other dtype": ({"where": {"dtype": "bf16"}}, []),
    "phase": ({"where": {"phase": "prefill"}}, [0, 1, 2]),
    "other phase": ({"where": {"phase": "generate"}}, []),
    "shapes": ({"where": {"shapes": {"gate": ["any", 3, 16]}}}, [0, 1, 2]),
    "other shapes": ({"where": {"shapes": {"gate": ["any", 3, 8]}}}, []),
    "kind of device": ({"where": {"device": "cuda"}}, [0, 1]),
    "other kind of device": ({"where": {"device": "cpu"}}, [2]),
    "device name": ({"where": {"device": "gpu1"}}, [1]),
}
PLACED = {
    "devices": {"gpu0": "cuda:0", "gpu1": "cuda:1", "host": "cpu"},
    "layers": {"0": "gpu0", "1": "gpu1", "2": "host"},
}


def test_scopes() -> None:
    """One trace serves all: each case is a rule that changes nothing, read off the rewrites."""
    rules = [rule(SWIGLU, "aten.mul(aten.silu(gate), up)", **match) for match, _ in SCOPES.values()]
    done = run(*rules, model=Model(3), devices={**PLACED, "default_device": "gpu0"})
    got: dict[str, list[int]] = {case: [] for case in SCOPES}
    for rewrite in done.context.rewrites:
        assert rewrite.rule is not None
        got[list(SCOPES)[int(rewrite.rule.split()[1]) - 1]].append(int(rewrite.module.split(".")[2]))
    assert got == {case: layers for case, (_, layers) in SCOPES.items()}
    why = "\n".join(m.why for m in done.context.misses)
    assert re.search(r"where.dtype: the rule asks for bfloat16, mul\w+ is float32", why)
    assert re.search(r"where.device: the rule asks for gpu1, mul\w+ runs on gpu0", why)
    assert "where.shapes: the rule asks for gate ['any', 3, 8], it is ['2', '3', '16']" in why
    warned = "\n".join(done.context.warnings)
    assert "rule 5: the pattern matches nothing in the prefill graph: no node is a aten.mul in the modules" in warned


def test_a_match_over_two_devices_is_left_alone() -> None:
    across = {"match": {"name": r"layers\.0\.mlp\.gate_proj$"}, "replace": {"device": "host"}}
    pattern = rule("aten.silu(aten.linear(x, w))", "aten.silu(aten.linear(x, w))")
    done = run(across, pattern, devices={**PLACED, "layers": {"0-1": "gpu0"}, "default_device": "gpu0"})
    assert [r.module for r in done.context.rewrites] == ["model.layers.1.mlp"]
    (miss,) = done.context.misses
    assert "it spans two devices: linear runs on host, silu on gpu0" in miss.why


def test_symbolic_length() -> None:
    model = Model()
    done = run(norm_rule(), swiglu_rule(), model=model, dynamic_dims=(1,))
    assert done.ops["toyops.silu_and_mul.default"] == 2
    val = next(n for n in done.after.graph.nodes if "silu_and_mul" in str(n.target)).meta["val"]
    assert isinstance(val.shape[1], torch.SymInt)


def test_two_outputs(golden: Callable[[str, str], None]) -> None:
    class AddNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Norm()

        def forward(self, x: torch.Tensor) -> Any:
            total = x + x.flip(0)
            return self.norm(total), total * 2

    inner = NORM.replace("x", "aten.add(r, x)")
    pattern = rule(
        f"[aten.add(r, x), {inner}]",
        "[toyops.add_norm(x, r, weight, eps)[0], toyops.add_norm(x, r, weight, eps)[1]]",
    )
    done = run(pattern, model=Holder(AddNorm()))
    assert done.ops["toyops.add_norm.default"] == 1 and done.ops["aten.rsqrt.default"] == 0
    golden("two_outputs.diff", done.diff())


def test_bisection_stops_before_an_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTFX_BISECT_LIMIT", "1")
    done = run(swiglu_rule(), norm_rule())
    assert done.ops["toyops.silu_and_mul.default"] == 1 and done.ops["toyops.rms_norm.default"] == 0
    assert len(done.context.rewrites) == 1 and not done.context.warnings


# ---- refusals

FILE = "ktfx: 1\ndefault_device: cpu\nrules:\n  - match: {pattern: '%s'}\n    replace: {with: '%s'}\n"

BAD = {
    "unknown op": (
        SWIGLU,
        "toyops.silu_and_mull(gate, up)",
        "no operator toyops.silu_and_mull (did you mean 'silu_and_mul'?)",
    ),
    "unknown namespace": ("nothere.silu(gate)", "aten.relu(gate)", "no operators nothere.…"),
    "unknown overload": ("aten.mul.Tensors(gate, up)", "aten.relu(gate)", "did you mean 'Tensor'?"),
    "too many arguments": ("aten.silu(gate, up)", "aten.relu(gate)", "aten.silu(…, …) fits no overload"),
    "unknown keyword": ("aten.mean(gate, dims=1)", "aten.relu(gate)", "aten.mean(…, dims=…) fits no overload"),
    "missing argument": (SWIGLU, "toyops.silu_and_mul(gate)", "toyops.silu_and_mul(…) fits no overload"),
    "two outputs for one": (SWIGLU, "[aten.relu(gate), aten.relu(up)]", "has 1 output and `replace.with` has 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_rule_that_cannot_be(case: str) -> None:
    from ktfx.passes.match_patterns import check_pattern_rules

    pattern, with_, text = BAD[case]
    with pytest.raises(RuleError) as caught:
        check_pattern_rules(parse_ruleset(FILE % (pattern, with_), "my.yaml"))
    assert text in str(caught.value) and str(caught.value).startswith("my.yaml:4")
    assert caught.value.rule == "rule 1" and caught.value.mend and caught.value.expected


@pytest.mark.parametrize(
    ("with_", "text"),
    [
        (
            "toyops.to_half(gate)",
            "toyops.to_half(gate) gives float16[2, 3, 16], and aten.mul.Tensor (mul_2) was float32[2, 3, 16]",
        ),
        ("aten.sum(gate, -1)", "gives float32[2, 3]"),
        ("aten.mm(gate, up)", "aten.mm(gate, up) refuses its inputs: RuntimeError"),
    ],
)
def test_a_replacement_that_changes_the_value_kind(with_: str, text: str) -> None:
    rules = parse_ruleset(FILE % (SWIGLU, with_), "my.yaml")
    with pytest.raises(PassError) as caught:
        run_passes(Model(1), rules, torch.randn(2, 3, 8))
    assert text in str(caught.value) and "my.yaml:4" in str(caught.value) and "model.layers.0.mlp" in str(caught.value)


def test_an_operator_that_cannot_take_what_was_captured() -> None:
    done = run(rule(NORM, "toyops.rms_norm(x, weight, weight)"))
    assert not done.context.rewrites
    assert "toyops.rms_norm does not take (" in done.context.misses[0].why


def test_indexed_calls_and_output_lists_are_read() -> None:
    tree = parse_pattern("[aten.topk(x, k)[0], aten.topk(x, k)[1]]")
    assert isinstance(tree, Call) and tree.op == "outputs" and len(tree.args) == 2
    for text in ("aten.topk(x, k)[i]", "aten.topk(x, k)[-1]", "[aten.silu(x), y]", "aten.topk(x, k)[0:1]"):
        with pytest.raises(RuleError):
            parse_pattern(text)

"""write_caches: a layer's new keys and values go to its cache by one op, in place, bit for bit the same."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import tiny_model
from parity import check_parity
from pass_runs import PassRun, run_passes
from torch import fx, nn

from ktfx.errors import KtfxError
from ktfx.graph import insert_call, op_name
from ktfx.ops import load_ops
from ktfx.program.compile_units import BACKENDS
from ktfx.program.units import extract_unit

RULES = {"ktfx": 1, "devices": {"gpu0": "cuda:0"}, "default_device": "gpu0", "rules": []}


def decode_graph(state: Any) -> Any:
    return next(g for g in state.graphs if g.phase == "generate")


def rewrites(state: Any) -> list[str]:
    return [r.what for record in decode_graph(state).records if record.name == "write_caches" for r in record.rewrites]


def unit_calls(state: Any, name: str) -> list[fx.Node]:
    """Calls of an op in the units that the decode step's program compiled."""
    graphs = [u.gm.graph for u in decode_graph(state).built.graphs]
    return [n for g in graphs for n in g.nodes if n.op == "call_function" and op_name(n) == name]


@pytest.mark.parametrize(
    "family, what, op",
    [
        ("qwen3_moe", "norm, rope and the cache's update → ktfx.norm_rope_write", "ktfx.norm_rope_write_.default"),
        pytest.param(
            "mixtral",
            "norm, rope and the cache's update → ktfx.norm_rope_write",
            "ktfx.norm_rope_write_.default",
            marks=pytest.mark.slow,
        ),
        ("deepseek_v3", "a cache's update → ktfx.cache_write", "ktfx.cache_write_.default"),
    ],
)
def test_every_layer_writes_in_place_and_every_step_is_right(family: str, what: str, op: str) -> None:
    state, _ = check_parity(tiny_model(family, layers=2), RULES, keep_graphs=True)
    assert rewrites(state) == [what] * 2
    assert len(unit_calls(state, op)) == 2
    # Nothing copies a cache: neither the op that returns new ones nor a copy back at the end of the unit.
    assert not unit_calls(state, "ktfx.cache_write.default") and not unit_calls(state, "ktfx.norm_rope_write.default")
    caches = [n for n in unit_calls(state, "aten.copy_.default") if n.args[0].meta["val"].dim() in (0, 4)]  # type: ignore[union-attr]
    assert not caches


class Layer(nn.Module):
    """One layer's update of its cache as transformers writes it. early: the count is read before values are written;
    values: a second tensor is written; moves: the count moves on."""

    def __init__(self, early: bool = False, values: bool = True, moves: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.k_proj, self.v_proj = nn.Linear(8, 16), nn.Linear(8, 8)
        self.early, self.values, self.moves = early, values, moves

    def forward(
        self, hidden_states: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, count: torch.Tensor
    ) -> torch.Tensor:
        shape = (*hidden_states.shape[:2], 2, -1)
        k = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        rows = torch.arange(k.shape[2]) + count
        keys.index_copy_(2, rows, k)
        if self.early:
            v = v + keys.sum()
        if self.values:
            values.index_copy_(2, rows, v)
        if self.moves:
            count.add_(k.shape[2])
        return keys.sum(-1) * values.sum(-1)


class Model(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"self_attn": Layer(**options)})])

    def forward(self, hidden_states: torch.Tensor, *caches: torch.Tensor) -> torch.Tensor:
        return self.layers[0]["self_attn"](hidden_states, *caches)


def run(length: int = 1, count: int = 3, **options: bool) -> tuple[PassRun, list[torch.Tensor]]:
    """The passes' run and the caches and the count after a call of the rewritten graph, compared with eager's."""
    x = torch.randn(2, length, 8, generator=torch.Generator().manual_seed(1))
    held = [torch.zeros(2, 2, 12, 8), torch.ones(2, 2, 12, 4), torch.tensor(count)]
    done = run_passes(Model(**options), RULES, x, *held, passes=("resolve_rules", "write_caches"))
    return done, held


def whats(done: PassRun) -> list[str]:
    return [r.what for r in done.records[-1].rewrites]


def test_an_update_becomes_one_op(golden: Callable[[str, str], None]) -> None:
    done, _ = run()
    assert whats(done) == ["a cache's update → ktfx.cache_write"]
    assert done.ops_before["aten.index_copy.default"] == 2 and done.ops["aten.index_copy.default"] == 0
    assert done.ops["ktfx.cache_write.default"] == 1
    golden("write_caches", done.diff())


def test_a_count_that_stays_is_left_as_it_is() -> None:
    done, _ = run(moves=False)
    assert whats(done) == ["a cache's update → ktfx.cache_write"]
    (call,) = done.after.graph.find_nodes(op="call_function", target=torch.ops.ktfx.cache_write.default)
    assert call.args[5] is False


@pytest.mark.parametrize(
    "options, why",
    [({"early": True}, "reads index_copy"), ({"values": False}, "1 tensors are written")],
)
def test_what_is_no_update_is_left_alone_and_says_why(options: dict[str, bool], why: str) -> None:
    done, _ = run(**options)
    assert whats(done) == [] and why in " ".join(m.why for m in done.records[-1].misses)


def test_a_prefill_is_left_alone() -> None:
    assert whats(run(length=3)[0]) == []


def test_inductor_calls_the_op_on_the_cache_itself() -> None:
    """Under the compiler, too, no cache is copied: its code calls the op on the unit's own inputs."""
    from torch._inductor.utils import fresh_cache, run_and_get_code

    load_ops()

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        fakes = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
        graph = fx.Graph()
        inputs = [graph.placeholder(f"i{i}") for i in range(5)]
        for node, fake in zip(inputs, fakes, strict=True):
            node.meta["val"] = fake
        call = insert_call(graph, torch.ops.ktfx.cache_write.default, (*inputs, True), like=inputs[0])
        parts = [insert_call(graph, operator.getitem, (call, i), like=call) for i in range(3)]
        total = insert_call(graph, torch.ops.aten.sum.default, (parts[0],), like=call)
        nodes = [call, *parts, total]
        unit = extract_unit(nodes, [total], dict(zip(parts, inputs, strict=False)), torch.device("cpu"), {})
        function = BACKENDS["inductor"](unit)
        return lambda *args: [function(*args)[0]]

    def step(*args: torch.Tensor) -> torch.Tensor:
        return sum(a.sum() for a in args)  # type: ignore[return-value]

    keys, values, count = torch.zeros(1, 2, 37, 8), torch.zeros(1, 2, 37, 8), torch.tensor(5)
    k, v = torch.full((1, 2, 1, 8), 2.0), torch.full((1, 2, 1, 8), 3.0)
    with fresh_cache(), torch.no_grad():
        out, made = run_and_get_code(torch.compile(step, backend=backend), keys, values, count, k, v)
    assert float(out) == 32.0 and int(count) == 6
    assert keys[:, :, 5].eq(2).all() and values[:, :, 5].eq(3).all() and float(keys.sum() + values.sum()) == 80.0
    text = "\n".join(made)
    assert re.search(r"cache_write_\.default\(arg0_1, arg1_1, arg2_1,", text), text
    assert "empty_strided_cpu((1, 2, 37" not in text, text


def test_a_cache_with_no_room_is_an_error() -> None:
    load_ops()
    keys, values, count = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), torch.tensor(4)
    new = torch.ones(1, 2, 1, 8)
    with pytest.raises(IndexError):
        torch.ops.ktfx.cache_write_(keys, values, count, new, new, True)
    assert not keys.any() and int(count) == 4


def test_what_does_not_fit_says_so() -> None:
    load_ops()
    keys, count, new = torch.zeros(1, 2, 4, 8), torch.tensor(0), torch.ones(1, 2, 1, 8)
    with pytest.raises(KtfxError, match="index_copy"):
        torch.ops.ktfx.cache_write(keys, keys[..., :4], count, new, new, True)
    with pytest.raises(KtfxError, match="dtype"):
        torch.ops.ktfx.cache_write(keys, keys, count, new.bfloat16(), new, True)
    with pytest.raises(KtfxError, match="int64"):
        torch.ops.ktfx.cache_write(keys, keys, count.int(), new, new, True)

"""What a call of host experts costs beside its kernel: ops without wrappers, units that need no compiler."""

from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ktfx.graph import insert_call
from ktfx.ops.define import function_of
from ktfx.ops.experts import ExpertsSpec, experts_kernel, routed_experts
from ktfx.ops.linear import LinearSpec, linear_kernel, linear_quant
from ktfx.program import compile_units
from ktfx.program.units import UnitGraph, extract_unit

SPEC = ExpertsSpec(4, 64, 32)


def experts_call(tokens: int = 3) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(tokens)
    tensors = {"gate_up": torch.randn(4, 64, 64, generator=g), "down": torch.randn(4, 64, 32, generator=g)}
    packed = experts_kernel("cpu").pack(SPEC, tensors, torch.device("cpu"))
    x, weights = torch.randn(tokens, 64, generator=g), torch.rand(tokens, 2, generator=g)
    return x, torch.randint(0, 4, (tokens, 2), generator=g), weights, packed


def unit_of(args: tuple[Any, ...], after: Any = None) -> UnitGraph:
    """A unit that calls the experts and, if given, another op on their result."""
    x, ids, weights, packed = args
    tensors = [x, ids, weights, *packed]
    mode, graph = FakeTensorMode(allow_non_fake_inputs=True), fx.Graph()
    inputs = []
    for i, t in enumerate(tensors):
        node = graph.placeholder(f"a{i}")
        node.meta["val"] = mode.from_tensor(t)
        inputs.append(node)
    call = insert_call(graph, routed_experts, (*inputs[:3], inputs[3:], "cpu", SPEC.encode()), like=inputs[0])
    nodes = [call] if after is None else [call, insert_call(graph, after, (call,), like=call)]
    return extract_unit(nodes, [nodes[-1]], {}, torch.device("cpu"), {})


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_a_unit_of_one_host_call_is_called_as_it_is(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("there is nothing to compile")

    monkeypatch.setattr(torch._inductor, "standalone_compile", compiled)
    args = experts_call(tokens)
    unit = unit_of(args)
    (made,) = compile_units.compile_units([unit], "inductor")
    (got,) = made.function(*args[:3], *args[3])
    assert torch.equal(got, routed_experts(*args, "cpu", SPEC.encode()))
    assert [n.target for n in unit.gm.graph.nodes if n.op == "call_function"] == [routed_experts], "the unit is kept"


def test_a_unit_that_computes_anything_else_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Artifact:
        def __call__(self, *args: Any) -> tuple[Any, ...]:
            return (args[0],)

    monkeypatch.setattr(torch._inductor, "standalone_compile", lambda gm, *a, **k: [seen.append(gm), Artifact()][1])
    compile_units.compile_units([unit_of(experts_call(), torch.ops.aten.neg.default)], "inductor")
    assert len(seen) == 1


def test_a_unit_on_another_device_is_compiled() -> None:
    unit = unit_of(experts_call())
    with unit.fakes[0].fake_mode:
        unit.fakes = [torch.empty_like(f, device="meta") for f in unit.fakes]
    assert not compile_units._is_host_call(unit)


def test_the_ops_pass_torchs_own_checks() -> None:
    args = experts_call()
    torch.library.opcheck(routed_experts, (*args, "cpu", SPEC.encode()))
    spec = LinearSpec(64, 48, "int8")
    packed = linear_kernel("cpu").pack(spec, torch.randn(48, 64), torch.device("cpu"))
    for bias in (None, torch.randn(48)):
        torch.library.opcheck(linear_quant, (torch.randn(3, 64), packed, bias, "cpu", spec.encode()))


def test_only_ops_of_ours_have_a_function() -> None:
    found = function_of(routed_experts)
    assert found is not None and found.__name__ == "_routed_experts"
    assert function_of(torch.ops.aten.neg.default) is None and function_of("a placeholder's name") is None

"""A 48-layer model and a pass that rewrites something harmless in every layer, and something wrong in one."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ktfx.debug.session import Session, environment, run_module
from ktfx.graph import info, insert_call, op_name, output_node, set_info
from ktfx.pass_manager import Pass, PassContext, Rewrite, register_pass

LAYERS = 48
WIDTH = 16
LENGTH = 8
FAULTS = ("wrong_literal", "swapped_operands", "dropped_cast", "wrong_device", "lost_cache_update")


class Norm(nn.Module):
    """RMS norm with the cast that half precision needs: squares of the residual stream overflow float16."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Attention(nn.Module):
    """One head over a cache of ``LENGTH`` positions; writes its keys into the buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.register_buffer("keys", torch.zeros(LENGTH, WIDTH))

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).split(WIDTH, dim=-1)
        self.keys.index_copy_(0, position, k)
        scores = (q @ self.keys[: x.shape[0]].t()) * 0.25
        return torch.softmax(scores - scores.amax(-1, keepdim=True), dim=-1) @ v


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.gate(x)) * self.up(x) - self.gate(x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = Norm(), Attention(), Mlp()

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x), position) * 64
        return x + self.mlp(self.norm(x)) * 64


class Planted(nn.Module):
    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm = Norm()
        self.head = nn.Linear(WIDTH, 32, bias=False)

    def forward(self, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) * 400.0
        for layer in self.layers:
            x = layer(x, position)
        return self.head(self.norm(x))


def planted_model(layers: int = LAYERS) -> nn.Module:
    torch.manual_seed(0)
    return Planted(layers).half().eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(LENGTH) % 32, torch.arange(LENGTH)


@register_pass
class Plant(Pass):
    """Rewrites one node of every layer into an equal one; in ``layer`` it does what ``fault`` says."""

    name = "plant"
    default = False

    @dataclass(frozen=True)
    class Options:
        """fault: one of FAULTS, or none. layer: where it is planted. op: what is rewritten. per_layer: how often."""

        fault: str = "none"
        layer: int = 31
        per_layer: int = 1

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        pick, edit = _EDITS.get(self.options.fault, _EDITS["none"])
        writes = {name: i for i, name in context.captured.writes}
        by_layer: dict[int, list[fx.Node]] = {}
        for node in gm.graph.nodes:
            layer = info(node).layer
            if node.op == "call_function" and layer is not None and pick(node):
                by_layer.setdefault(layer, []).append(node)
        for layer, nodes in by_layer.items():
            for node in nodes[: self.options.per_layer]:
                module = info(node).module
                if not context.allows(f"plant on {op_name(node)}", module):
                    continue
                wrong = layer == self.options.layer and node is nodes[0]
                (edit if wrong else _harmless)(gm, node, writes)
                context.record(
                    Rewrite(
                        what=f"{op_name(node)} again",
                        module=module,
                        before=(op_name(node),),
                        after=(op_name(node),),
                        nodes_before=(node.name,),
                        nodes_after=(node.name,),
                    )
                )
        gm.recompile()


def _harmless(gm: fx.GraphModule, node: fx.Node, writes: dict[str, int]) -> None:
    """The same operation anew."""
    target: Any = node.target
    with gm.graph.inserting_before(node):
        again = insert_call(gm.graph, target, node.args, node.kwargs, like=node)
    node.replace_all_uses_with(again)
    gm.graph.erase_node(node)


def _wrong_literal(gm: fx.GraphModule, node: fx.Node, writes: dict[str, int]) -> None:
    node.args = (node.args[0], 32 if node.args[1] == 64 else 0.5)


def _swapped(gm: fx.GraphModule, node: fx.Node, writes: dict[str, int]) -> None:
    node.args = (node.args[1], node.args[0])


def _dropped_cast(gm: fx.GraphModule, node: fx.Node, writes: dict[str, int]) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    node.replace_all_uses_with(source)
    gm.graph.erase_node(node)


def _wrong_device(gm: fx.GraphModule, node: fx.Node, writes: dict[str, int]) -> None:
    set_info(node, device="gpu1" if info(node).device == "gpu0" else "gpu0")


def _lost_update(gm: fx.GraphModule, node: fx.Node, writes: dict[str, int]) -> None:
    old = node.args[0]
    output = output_node(gm.graph)
    output.args = (tuple(old if v is node else v for v in output.args[0]),)  # type: ignore[union-attr]


def _raising(gm: fx.GraphModule, node: fx.Node, writes: dict[str, int]) -> None:
    raise ValueError(f"no kernel takes {node.name} of 3 operands")


def _is(name: str, extra: Callable[[fx.Node], bool] = lambda n: True) -> Callable[[fx.Node], bool]:
    return lambda node: op_name(node) == name and extra(node)


def _up_cast(node: fx.Node) -> bool:
    return node.kwargs.get("dtype") is torch.float32


_EDITS: dict[str, tuple[Callable[[fx.Node], bool], Callable[[fx.GraphModule, fx.Node, dict[str, int]], None]]] = {
    "none": (_is("aten.mul.Tensor", lambda n: not isinstance(n.args[1], fx.Node)), _harmless),
    "wrong_literal": (_is("aten.mul.Tensor", lambda n: not isinstance(n.args[1], fx.Node)), _wrong_literal),
    "swapped_operands": (_is("aten.sub.Tensor", lambda n: n.args[0] is not operator), _swapped),
    "dropped_cast": (_is("aten._to_copy.default", _up_cast), _dropped_cast),
    "wrong_device": (_is("aten.mul.Tensor", lambda n: not isinstance(n.args[1], fx.Node)), _wrong_device),
    "lost_cache_update": (_is("aten.index_copy.default"), _lost_update),
    "raises": (_is("aten.sub.Tensor"), _raising),
}


def planted_rules(fault: str, layer: int = 31, per_layer: int = 1) -> dict[str, Any]:
    plant = {"plant": {"fault": fault, "layer": layer, "per_layer": per_layer}}
    late = fault == "wrong_device"
    order = [
        "resolve_rules",
        *([] if late else [plant]),
        "assign_devices",
        "insert_transfers",
        *([plant] if late else []),
    ]
    return {
        "ktfx": 1,
        "devices": {"gpu0": "cuda:0", "gpu1": "cuda:1", "host": "cpu"},
        "default_device": "gpu0",
        "layers": ["gpu0", "gpu1"],
        "passes": [*order, "partition_by_device"],
    }


def planted_session(fault: str, layers: int = LAYERS, layer: int = 31, per_layer: int = 1) -> Session:
    """Compiled with the faulty pass switched off, so that the captured graph and its inputs are there."""
    with environment({"KTFX_BISECT_PASSES": "0"}):
        return run_module(planted_model(layers), inputs(), planted_rules(fault, layer, per_layer), simulate="cpu")

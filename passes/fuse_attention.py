"""fuse_attention: scaled_dot_product_attention of one new token over a cache → ``ktfx::attention_decode_masked``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ktfx.canonical import same_shape, tensor_of
from ktfx.fusion import device_name, is_on, spans_devices
from ktfx.graph import info, insert_call, op_name
from ktfx.pass_manager import Pass, PassContext, Rewrite, register_pass

sdpa = torch.ops.aten.scaled_dot_product_attention.default
aten = torch.ops.aten
_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})
_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class Call:
    """What a node of attention computes. k, v: of the key heads alone, before they are repeated for the queries'."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float
    repeats: tuple[fx.Node, ...]


@register_pass
class FuseAttention(Pass):
    """In graphs of one query token a sequence. The repeated copies of keys and values (``repeat_kv``) go; blocks of the
    cache that the mask hides are not read. Sums are in float32 and in another order, nothing else changes.
    """

    name = "fuse_attention"
    numerics_preserving = True

    @dataclass(frozen=True)
    class Options:
        """device: where: a kind (``cuda``, ``cpu``), a device name, or ``any``."""

        device: str = "cuda"

    options: Options

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        if context.phase != "generate":
            return
        before = len(context.rewrites)
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or node.target is not sdpa:
                continue
            if self.options.device != "any" and not is_on(
                self.options.device, device_name(node, context), context.resolution.ruleset
            ):
                continue
            self._rewrite(gm.graph, context, node)
        if len(context.rewrites) > before:
            gm.graph.eliminate_dead_code()
            gm.recompile()

    @staticmethod
    def _rewrite(graph: fx.Graph, context: PassContext, node: fx.Node) -> None:
        module = info(node).module
        call = read_call(node)
        if not isinstance(call, str):
            call = spans_devices((*call.repeats, node), node, context) or call
        if isinstance(call, str):
            context.miss(module, f"fuse_attention: {call}")
            return
        if not context.allows("fuse_attention", module):
            return
        with graph.inserting_before(node):
            new = insert_call(
                graph,
                torch.ops.ktfx.attention_decode_masked.default,
                (call.q, call.k, call.v, call.mask, call.scale),
                like=node,
                module=module,
            )
        node.replace_all_uses_with(new)
        replaced = (*call.repeats, node)
        context.record(
            Rewrite(
                what="scaled_dot_product_attention → ktfx.attention_decode_masked",
                module=module,
                before=tuple(op_name(n) for n in replaced),
                after=(op_name(new),),
                nodes_before=tuple(n.name for n in replaced),
                nodes_after=(new.name,),
            )
        )


def read_call(node: fx.Node) -> Call | str:
    """What the node computes, or in words why the op cannot express it."""
    named = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
    given: dict[str, Any] = {**named, **node.kwargs}
    q, k, v, mask = (given.get(name) for name in ("query", "key", "value", "attn_mask"))
    if given.get("dropout_p", 0.0) != 0.0:
        return "it drops out"
    if given.get("is_causal", False):
        return "it is causal by position, not by a mask"
    tensors = [tensor_of(value) for value in (q, k, v, node)]
    if any(t is None or t.dim() != 4 for t in tensors):
        return "its tensors are not (batch, heads, length, width)"
    q_val, k_val, v_val = (t for t in tensors[:3] if t is not None)
    if q_val.shape[2] != 1:
        return f"it has {q_val.shape[2]} query tokens, not one"
    if not (q_val.dtype == k_val.dtype == v_val.dtype) or q_val.dtype not in _DTYPES:
        return f"its dtypes are {q_val.dtype}, {k_val.dtype}, {v_val.dtype}"
    if mask is not None:
        mask_val = tensor_of(mask)
        if mask_val is None or mask_val.dim() != 4:
            return "its mask is not four-dimensional"
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    keys, key_nodes = before_repeat(k)
    values, value_nodes = before_repeat(v)
    heads = [tensor_of(n).shape[1] for n in (keys, values)]  # type: ignore[union-attr]
    if heads[0] != heads[1]:
        keys, values, key_nodes, value_nodes = k, v, (), ()
    scale = given.get("scale")
    scale = 1.0 / math.sqrt(q_val.shape[3]) if scale is None else scale
    if not isinstance(scale, float):
        return "its scale is not a number known at compile time"
    return Call(q, keys, values, mask, scale, (*key_nodes, *value_nodes))


def before_repeat(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The tensor (B, Hkv, L, D) that ``repeat_kv`` repeated to (B, Hkv·G, L, D), and the nodes that did so.

    unsqueeze(2) → expand → clone → view, as its expand and reshape are traced; any other node comes back as it is.
    """
    chain: list[fx.Node] = []
    at = node
    if at.target in _VIEWS:
        chain.append(at)
        at = at.args[0]  # type: ignore[assignment]
        if at.target is aten.clone.default:
            chain.append(at)
            at = at.args[0]  # type: ignore[assignment]
        if at.target is aten.expand.default:
            chain.append(at)
            at = at.args[0]  # type: ignore[assignment]
            if at.target is aten.unsqueeze.default and at.args[1] in (2, -3):
                chain.append(at)
                source = at.args[0]
                assert isinstance(source, fx.Node)
                if _repeats(source, node):
                    return source, tuple(reversed(chain))
    return node, ()


def _repeats(source: fx.Node, repeated: fx.Node) -> bool:
    """Whether the two differ by whole copies of each head alone."""
    a, b = tensor_of(source), tensor_of(repeated)
    if a is None or b is None or a.dim() != 4 or b.dim() != 4:
        return False
    rest = ((a.shape[0], *a.shape[2:]), (b.shape[0], *b.shape[2:]))
    return same_shape(*rest) and b.shape[1] % a.shape[1] == 0

"""fuse_attention: attention of one new token over a cache → ``ktfx::attention_decode_masked``.

``scaled_dot_product_attention``, and attention written out: product, scale, cap, mask, sinks, softmax, product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ktfx.canonical import CAST, op_family, same_shape, same_size, strip, tensor_of
from ktfx.fusion import OnDevice, device_name, is_asked, role_module, spans_devices
from ktfx.graph import info, insert_call, op_name
from ktfx.matcher import Failure, Match, Matcher
from ktfx.pass_manager import Pass, PassContext, Rewrite, register_pass

sdpa = torch.ops.aten.scaled_dot_product_attention.default
aten = torch.ops.aten
_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})
_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

_QK = "aten.matmul(q, aten.transpose(k, 2, 3))"
_SCALED = (f"aten.mul({_QK}, scale)", f"aten.div({_QK}, root)", _QK)
_WRITTEN_OUT = "attention written out"


def _patterns() -> Iterator[str]:
    """Attention as models write it out: with a cap (Gemma 2), sinks (gpt-oss), a shift by the maximum, or none."""
    for scaled in _SCALED:
        for capped in (scaled, f"aten.mul(aten.tanh(aten.div({scaled}, cap)), cap)"):
            for masked in (f"aten.add({capped}, mask)", capped):
                for kept in (_softmax(masked), _softmax(_shifted(masked))):
                    yield f"aten.matmul(aten.to({kept}, d), v)"
                logits = f"aten.cat([{masked}, sinks], -1)"
                for every in (_softmax(_shifted(logits)), _softmax(logits)):
                    yield f"aten.matmul(aten.to(aten.slice({every}, -1, 0, end), d), v)"


def _shifted(logits: str) -> str:
    return f"aten.sub({logits}, aten.max({logits}, -1, True)[0])"


def _softmax(logits: str) -> str:
    return f"aten.softmax({logits}, -1, s)"


@dataclass(frozen=True)
class Call:
    """What a node of attention computes. k, v: of the key heads alone, before they are repeated for the queries'.

    sinks: (Hq,), or None. softcap: 0 for none. replaced: the nodes that the op stands for, the last one last.
    """

    what: str
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float
    replaced: tuple[fx.Node, ...]
    sinks: fx.Node | None = None
    softcap: float = 0.0


@dataclass
class _Found:
    """What a run has come to: modules rewritten, the nearest failure in each, each mask's bounds by device."""

    done: set[str] = field(default_factory=set)
    failures: dict[str, Failure] = field(default_factory=dict)
    bounds: dict[tuple[fx.Node, str], fx.Node] = field(default_factory=dict)


@register_pass
class FuseAttention(Pass):
    """In graphs of one query token a sequence. The repeated copies of keys and values (``repeat_kv``) go; what lies
    before the first or after the last entry that the mask keeps (a sliding window) is not read. Sums, and what
    attention that is written out rounds in between, are in float32 and in another order; nothing else changes.
    """

    name = "fuse_attention"
    numerics_preserving = True

    Options = OnDevice
    options: OnDevice

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        if context.phase != "generate":
            return
        before, found = len(context.rewrites), _Found()
        where = self.options.device
        for node in [n for n in gm.graph.nodes if n.target is sdpa and is_asked(where, n, context)]:
            self._rewrite(gm.graph, context, node, read_call(node), found)
        readings: dict[fx.Node, Any] = {}
        matchers = [Matcher.of(p) for p in _patterns()]
        for matcher in matchers:
            matcher.readings = readings
        for node in [n for n in matchers[0].candidates(gm.graph.nodes) if is_asked(where, n, context)]:
            call = _read_written_out(node, matchers)
            if isinstance(call, Failure):
                self._note(call, context, found)
            else:
                self._rewrite(gm.graph, context, node, call, found)
        for module, failure in found.failures.items():
            if module not in found.done:
                context.miss(module, f"fuse_attention: nearest at {failure.root.name}: {failure.text}")
        if len(context.rewrites) > before:
            gm.graph.eliminate_dead_code()
            gm.recompile()

    @staticmethod
    def _note(failure: Failure, context: PassContext, found: _Found) -> None:
        """Keep the nearest failure of a module, where at least the softmax before the product was found."""
        own = info(failure.root).module
        module = role_module(own, ("attention",), context) or own
        held = found.failures.get(module)
        if "aten.softmax" in dict(failure.pairs) and (held is None or failure.matched > held.matched):
            found.failures[module] = failure

    @staticmethod
    def _rewrite(graph: fx.Graph, context: PassContext, node: fx.Node, call: Call | str, found: _Found) -> None:
        module = info(node).module
        if not isinstance(call, str):
            call = spans_devices(call.replaced, node, context) or call
        if isinstance(call, str):
            context.miss(module, f"fuse_attention: {call}")
            return
        if not context.allows("fuse_attention", module):
            return
        bounds = None if call.mask is None else _bounds(graph, call.mask, node, context, found)
        with graph.inserting_before(node):
            new = insert_call(
                graph,
                torch.ops.ktfx.attention_decode_masked.default,
                (call.q, call.k, call.v, call.mask, call.scale, call.sinks, call.softcap, bounds),
                like=node,
                module=module,
            )
        node.replace_all_uses_with(new)
        found.done.update({module, role_module(module, ("attention",), context) or module})
        context.record(
            Rewrite(
                what=f"{call.what} → ktfx.attention_decode_masked",
                module=module,
                before=tuple(op_name(n) for n in call.replaced),
                after=(op_name(new),),
                nodes_before=tuple(n.name for n in call.replaced),
                nodes_after=(new.name,),
            )
        )


def _bounds(graph: fx.Graph, mask: fx.Node, reader: fx.Node, context: PassContext, found: _Found) -> fx.Node:
    """The mask's bounds, found once a device for all layers that share the mask.

    Where the mask is made, or else before the first layer on its device that reads it and outside that layer, which so
    stays equal to the others.
    """
    device = device_name(reader, context)
    if (mask, device) not in found.bounds:
        target = torch.ops.ktfx.mask_bounds.default
        if mask.op == "call_function" and device_name(mask, context) == device:
            with graph.inserting_after(mask):
                made = insert_call(graph, target, (mask,), like=mask)
        else:
            with graph.inserting_before(_begin_of_layer(graph, reader, mask)):
                made = insert_call(graph, target, (mask,), like=reader, layer=None)
        found.bounds[(mask, device)] = made
    return found.bounds[(mask, device)]


def _begin_of_layer(graph: fx.Graph, node: fx.Node, after: fx.Node) -> fx.Node:
    """The first node of the node's layer that comes after ``after``."""
    layer = info(node).layer
    nodes = list(graph.nodes)
    for other in nodes[nodes.index(after) + 1 : nodes.index(node)]:
        if layer is not None and other.op == "call_function" and info(other).layer == layer:
            return other
    return node


def read_call(node: fx.Node) -> Call | str:
    """What a node of ``scaled_dot_product_attention`` computes, or in words why the op cannot express it."""
    named = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
    given: dict[str, Any] = {**named, **node.kwargs}
    q, k, v, mask = (given.get(name) for name in ("query", "key", "value", "attn_mask"))
    if given.get("dropout_p", 0.0) != 0.0:
        return "it drops out"
    if given.get("is_causal", False):
        return "it is causal by position, not by a mask"
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    scale: Any = given.get("scale")
    if scale is None:
        scale = 1.0 / math.sqrt(q.meta["val"].shape[-1])
    return _checked(Call("scaled_dot_product_attention", q, k, v, mask, scale, (node,)))


def _read_written_out(node: fx.Node, matchers: list[Matcher]) -> Call | str | Failure:
    """What a product computes that may end attention; the nearest failure if no pattern fits."""
    nearest: Failure | None = None
    for matcher in matchers:
        result = matcher.match(node)
        if isinstance(result, Match):
            return _from_match(result)
        if nearest is None or result.matched > nearest.matched:
            nearest = result
    assert nearest is not None
    return nearest


def _from_match(match: Match) -> Call | str:
    """Attention written out as the op that it is, or in words why the op cannot express it."""
    at = match.captures
    q, k, v, mask, sinks = (at.get(name) for name in ("q", "k", "v", "mask", "sinks"))
    out = tensor_of(match.root)
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node) and out is not None
    q, k = (_before_widening(n, out.dtype) for n in (q, k))
    number = at.get("root", at.get("scale", 1.0))
    if isinstance(number, bool) or not isinstance(number, int | float) or number == 0:
        return "its scale is not a number known at compile time"
    scale = 1.0 / number if "root" in at else float(number)
    cap = at.get("cap", 0.0)
    if isinstance(cap, bool) or not isinstance(cap, int | float) or ("cap" in at and cap <= 0):
        return "its cap is not a positive number known at compile time"
    mask_val = tensor_of(mask)
    if mask is not None and (mask_val is None or not mask_val.is_floating_point()):
        return "what it adds to its scores is no mask of floats"
    heads, length = out.shape[1], tensor_of(k).shape[-2]  # type: ignore[union-attr]
    if sinks is not None:
        sinks = _one_a_head(sinks, heads)
        if sinks is None:
            return "its sinks are not one number a head"
        kept = next(n for n in match.nodes if op_family(n.target) == "aten.slice" and n in match.inner)
        if not same_size(tensor_of(kept).shape[-1], length):  # type: ignore[union-attr]
            return "it drops more, or less, than its sinks"
    return _checked(Call(_WRITTEN_OUT, q, k, v, mask, scale, match.nodes, sinks, float(cap)))


def _checked(call: Call) -> Call | str:
    """The call over the key heads alone, or in words why the op cannot express it."""
    q_val, k_val, v_val, out = (tensor_of(n) for n in (call.q, call.k, call.v, call.replaced[-1]))
    if q_val is None or k_val is None or v_val is None or out is None:
        return "its tensors are not known"
    if any(t.dim() != 4 for t in (q_val, k_val, v_val, out)):
        return "its tensors are not (batch, heads, length, width)"
    if q_val.shape[2] != 1:
        return f"it has {q_val.shape[2]} query tokens, not one"
    if not (q_val.dtype == k_val.dtype == v_val.dtype == out.dtype) or q_val.dtype not in _DTYPES:
        return f"its dtypes are {q_val.dtype}, {k_val.dtype}, {v_val.dtype}, {out.dtype}"
    if not isinstance(call.scale, float):
        return "its scale is not a number known at compile time"
    mask = call.mask
    if mask is not None:
        mask = strip(mask)
        mask_val = tensor_of(mask)
        if mask_val is None or mask_val.dim() != 4:
            return "its mask is not four-dimensional"
        wanted = ((1, q_val.shape[0]), (1, q_val.shape[1]), (1,), (k_val.shape[2],))
        # A symbol is not 1, so it is the size that it is broadcast with.
        known = [(m, sizes) for m, sizes in zip(mask_val.shape, wanted, strict=True) if isinstance(m, int)]
        if any(not any(same_size(m, size) for size in sizes) for m, sizes in known):
            return f"its mask is {list(mask_val.shape)}"
    keys, key_nodes = before_repeat(call.k)
    values, value_nodes = before_repeat(call.v)
    heads = [tensor_of(n).shape[1] for n in (keys, values)]  # type: ignore[union-attr]
    if heads[0] != heads[1]:
        keys, values, key_nodes, value_nodes = call.k, call.v, (), ()
    replaced = tuple(dict.fromkeys((*key_nodes, *value_nodes, *call.replaced)))
    return Call(call.what, call.q, keys, values, mask, call.scale, replaced, call.sinks, call.softcap)


def _before_widening(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """What a cast to float32 was applied to, where that has the dtype: the op computes in float32 by itself."""
    source = node.args[0] if op_family(node.target) == CAST else None
    mine, theirs = tensor_of(node), tensor_of(source)
    if mine is None or theirs is None or mine.dtype != torch.float32 or theirs.dtype != dtype:
        return node
    assert isinstance(source, fx.Node)
    return source


def _one_a_head(sinks: Any, heads: Any) -> fx.Node | None:
    """The vector (Hq,) that ``view(1, Hq, 1, 1)`` and ``expand`` made sinks of."""
    node = sinks
    if isinstance(node, fx.Node) and op_family(node.target) == "aten.expand":
        node = node.args[0]
    if not isinstance(node, fx.Node) or op_family(node.target) != "aten.view":
        return None
    seen, source = tensor_of(node), node.args[0]
    vector = tensor_of(source)
    if seen is None or vector is None or not same_shape(seen.shape, (1, heads, 1, 1)) or vector.dim() != 1:
        return None
    assert isinstance(source, fx.Node)
    return source


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

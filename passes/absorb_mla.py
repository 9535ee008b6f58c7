"""absorb_mla: MLA's decode on the compressed cache → ``ktfx::mla_decode`` between two small products.

DeepSeek's latent attention expands every cached latent c to a key W_UK·c and a value W_UV·c of each head. For one new
token it is far less work to turn the query instead: q·(W_UK·c) = (W_UKᵀ·q)·c, and Σ p·(W_UV·c) = W_UV·(Σ p·c).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ktfx.canonical import op_family, same_shape, tensor_of, views
from ktfx.fusion import spans_devices
from ktfx.graph import (
    GraphInput,
    fake_mode_of,
    info,
    insert_call,
    insert_placeholder,
    op_name,
    refresh_values,
)
from ktfx.ops import stored_linear as stored_linear  # registers the op that _STORED names
from ktfx.ops.linear import LinearSpec
from ktfx.pass_manager import Pass, PassContext, Rewrite, register_pass
from ktfx.stored_weights import SCALES, ZEROS
from ktfx.weight_requests import DequantisedRequest
from ktfx.weights import PackedWeight

aten = torch.ops.aten
_QUANT = torch.ops.ktfx.linear_quant.default
_STORED = torch.ops.ktfx.stored_linear.default
_FRESH = frozenset({aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default})


@dataclass(frozen=True)
class Latent:
    """What an attention over expanded latents reads.

    q_nope (B, H, 1, N), q_rope (B, H, 1, P): columns of the query, None where it must be cut. latent (B, 1, L, R),
    k_rope (B, 1, L, P): the cache. projection: kv_b_proj's call. replaced: the nodes from the latent on.
    """

    q: fx.Node
    q_parts: tuple[fx.Node, fx.Node] | None
    latent: fx.Node
    k_rope: fx.Node
    projection: Projection
    heads: int
    nope: int
    values: int
    replaced: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Projection:
    """A linear layer's call. shape: its weight's, (H·(N + V), R).

    weight: the node of a plain weight; None for a quantised one, whose numbers ``quantised`` asks for.
    """

    x: fx.Node
    bias: Any
    shape: tuple[int, int]
    dtype: torch.dtype
    weight: fx.Node | None
    quantised: DequantisedRequest | None = None


@register_pass
class AbsorbMla(Pass):
    """After ``fuse_attention``, over what it found. The cache is read once, as it lies (rank + rotary width a token:
    576 numbers for DeepSeek-V3), and never expanded to heads. Products are grouped otherwise, so 16-bit roundings
    fall elsewhere: on the turned query, not on each key and value. Prefill keeps the model's own form. A ``kv_b_proj``
    that a rule or the checkpoint keeps quantised is dequantised once, when it is placed, for decode alone.
    """

    name = "absorb_mla"
    numerics_preserving = True
    requires = ("fuse_attention",)

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        before = len(context.rewrites)
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.ktfx.attention_decode_masked.default):
            self._rewrite(gm.graph, context, node)
        if len(context.rewrites) > before:
            gm.graph.eliminate_dead_code()
            gm.recompile()

    @staticmethod
    def _rewrite(graph: fx.Graph, context: PassContext, node: fx.Node) -> None:
        module = info(node).module
        found = read_latent(node, context)
        if found is None:
            return
        if isinstance(found, Latent):
            found = spans_devices(found.replaced, node, context) or found
        if isinstance(found, str):
            context.miss(module, f"absorb_mla: {found}")
            return
        if not context.allows("absorb_mla", module):
            return
        weight = found.projection.weight
        if weight is None:
            weight = _dequantised(graph, context, found.projection)
        made = _absorbed(graph, node, found, weight)
        node.replace_all_uses_with(made[-1])
        refresh_values([made[-1]])
        context.record(
            Rewrite(
                what="attention over expanded latents → ktfx.mla_decode",
                module=module,
                before=tuple(op_name(n) for n in found.replaced),
                after=tuple(op_name(n) for n in made),
                nodes_before=tuple(n.name for n in found.replaced),
                nodes_after=tuple(n.name for n in made),
            )
        )


def _dequantised(graph: fx.Graph, context: PassContext, projection: Projection) -> fx.Node:
    """A new graph input: the numbers of a quantised projection, in the dtype that it computes in."""
    request, mode = projection.quantised, fake_mode_of(graph)
    assert request is not None and mode is not None
    name = request.parts[0][1].rpartition(".")[0]
    with mode:
        val = torch.empty(projection.shape, dtype=projection.dtype, device=context.captured.logical)
    node = insert_placeholder(graph, f"{name.replace('.', '_')}_dequantised", val)
    context.packed[node.name] = PackedWeight(request, 0)
    context.captured.inputs[node.name] = GraphInput("packed", f"{name}[dequantised]", -1)
    return node


def _absorbed(graph: fx.Graph, node: fx.Node, found: Latent, weight: fx.Node) -> list[fx.Node]:
    """The calls that stand for the attention; the last gives (B, H, 1, V)."""
    made: list[fx.Node] = []

    def call(target: Any, *args: Any) -> fx.Node:
        made.append(insert_call(graph, target, args, like=node))
        return made[-1]

    def by_head(x: fx.Node) -> fx.Node:
        """(B, H, 1, D) → (H, B, D)"""
        return call(aten.transpose.int, call(aten.select.int, x, 2, 0), 0, 1)

    def by_sequence(x: fx.Node) -> fx.Node:
        """(H, B, D) → (B, H, 1, D)"""
        return call(aten.unsqueeze.default, call(aten.transpose.int, x, 0, 1), 2)

    _, _, _, mask, scale, *rest = node.args
    bounds = rest[2] if len(rest) > 2 else None
    with graph.inserting_before(node):
        both = found.nope + found.values
        w_HDR = call(aten.view.default, weight, [found.heads, both, found.projection.shape[1]])
        uk_HNR = call(aten.slice.Tensor, w_HDR, 1, 0, found.nope)
        uv_HVR = call(aten.slice.Tensor, w_HDR, 1, found.nope, both)
        if found.q_parts is not None:
            q_nope, q_rope = found.q_parts
        else:
            width = found.q.meta["val"].shape[3]
            q_nope = call(aten.slice.Tensor, found.q, 3, 0, found.nope)
            q_rope = call(aten.slice.Tensor, found.q, 3, found.nope, width)
        q_latent = by_sequence(call(aten.bmm.default, by_head(q_nope), uk_HNR))
        mixed = call(
            torch.ops.ktfx.mla_decode.default, q_latent, q_rope, found.latent, found.k_rope, mask, scale, bounds
        )
        by_sequence(call(aten.bmm.default, by_head(mixed), call(aten.transpose.int, uv_HVR, 1, 2)))
    return made


def read_latent(node: fx.Node, context: PassContext) -> Latent | str | None:
    """What an ``attention_decode_masked`` reads, in words why it is no plain MLA, or None if it is nothing like it."""
    q, k, v, _, _, *rest = node.args
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    columns = _columns(k)
    if columns is None or len(columns) != 2:
        return None
    (k_nope, rope), filled = (c[0] for c in columns), [n for c in columns for n in c[1]]
    before = rope.args[0] if op_family(rope.target) == "aten.expand" else rope
    assert isinstance(before, fx.Node)
    expanded, k_rope = rope, before
    key, value = _cut(k_nope), _cut(v)
    if key is None or value is None or key.source is not value.source:
        return "its keys and values are not two parts of one projection"
    turned = key.source
    if turned.target is not aten.transpose.int or {int(d) % 4 for d in turned.args[1:]} != {1, 2}:  # type: ignore[arg-type]
        return "its heads are not the second dimension of the expanded latents"
    seen = turned.args[0]
    if not isinstance(seen, fx.Node) or op_family(seen.target) not in ("aten.view", "aten.reshape"):
        return "its expanded latents are not viewed as heads"
    linear = seen.args[0]
    projection = _projection(linear, context)
    if isinstance(projection, str):
        return projection
    latent = projection.x
    assert isinstance(linear, fx.Node)
    if projection.bias is not None:
        return "its projection has a bias"
    if (rest and rest[0] is not None) or (len(rest) > 1 and rest[1] != 0.0):
        return "it has sinks or a cap"
    heads, nope, values = q.meta["val"].shape[1], key.stop, value.stop - value.start
    if not all(isinstance(size, int) for size in (heads, nope, values)):
        return "its sizes are not known at compile time"
    wrong = _wrong_shape(q, projection, k_rope, seen, (key, value), heads)
    if wrong is not None:
        return wrong
    parts = _columns(q)
    pair = None
    if parts is not None and len(parts) == 2 and tensor_of(parts[0][0]).shape[3] == nope:  # type: ignore[union-attr]
        pair = (parts[0][0], parts[1][0])
    cut = [n for part in (k_nope, v) for n in (part, part.args[0]) if isinstance(n, fx.Node)]
    nodes = (linear, seen, turned, *cut, expanded, *filled, k, node)
    replaced = tuple(n for n in dict.fromkeys(nodes) if n not in (latent, k_rope))
    return Latent(q, pair, latent, k_rope, projection, heads, nope, values, replaced)


def _projection(linear: Any, context: PassContext) -> Projection | str:
    """What expands the latents, or in words why it cannot be taken apart."""
    if isinstance(linear, fx.Node) and linear.target is aten.linear.default:
        x, weight, *bias = linear.args
        assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
        given = bias[0] if bias else linear.kwargs.get("bias")
        return _plain(x, weight, given)
    if not isinstance(linear, fx.Node) or linear.target not in (_QUANT, _STORED):
        made_by = op_name(linear) if isinstance(linear, fx.Node) else "nothing"
        return f"its latents are expanded by {made_by}, not by a linear layer"
    arguments: Any = linear.args
    x, val = arguments[0], tensor_of(arguments[0])
    assert isinstance(x, fx.Node) and val is not None
    if x.target is aten.index_select.default:
        return "its projection sorts its inputs (act-order)"
    inputs = context.captured.inputs
    if linear.target is _QUANT:
        weights, bias, spec = arguments[1], arguments[2], LinearSpec.decode(arguments[4])
        packed = context.packed.get(weights[0].name)
        if packed is None and spec.weights == "model":
            return _plain(x, weights[0], bias)
        names = [inputs[n.name].name for n in weights]
        parts = (
            packed.request.parts if packed is not None else tuple(zip(("weight", SCALES, ZEROS), names, strict=False))
        )
        if spec.activations != "model":
            return f"its projection rounds activations to {spec.activations}"
    else:
        weights, bias, format = [n for n in arguments[1:4] if n is not None], arguments[4], arguments[5]
        if not format:
            return "its projection is stored in blocks that ktfx has no format for"
        packed, spec = None, LinearSpec(val.shape[-1], weights[0].meta["val"].shape[0], format)
    own = zip(("weight", SCALES, ZEROS), (inputs[n.name].name for n in weights), strict=False)
    parts = packed.request.parts if packed is not None else tuple(own)
    shape = (spec.out_features, spec.in_features)
    return Projection(x, bias, shape, val.dtype, None, DequantisedRequest(spec, val.dtype, parts))


def _plain(x: fx.Node, weight: fx.Node, bias: Any) -> Projection | str:
    val = tensor_of(weight)
    if val is None or val.dim() != 2:
        return "its projection's weight is no matrix"
    return Projection(x, bias, (int(val.shape[0]), int(val.shape[1])), val.dtype, weight)


@dataclass(frozen=True)
class _Cut:
    """Columns start … stop of the last dimension of ``source``."""

    source: fx.Node
    start: int
    stop: int


def _wrong_shape(
    q: fx.Node, projection: Projection, k_rope: fx.Node, seen: fx.Node, cuts: tuple[_Cut, _Cut], heads: int
) -> str | None:
    """In words, if the sizes are not those of MLA."""
    key, value = cuts
    tensors = [tensor_of(n) for n in (q, projection.x, k_rope, seen)]
    if any(t is None for t in tensors):
        return "its tensors are not known"
    q_val, c_val, r_val, seen_val = (t for t in tensors if t is not None)
    if c_val.dim() != 4 or r_val.dim() != 4:
        return "its latents are not (batch, 1, length, rank)"
    B, L, both = c_val.shape[0], c_val.shape[2], value.stop
    if key.start != 0 or value.start != key.stop or projection.shape[0] != heads * both:
        return "its projection does not hold each head's key and then its value"
    expected = [
        (c_val, (B, 1, L, projection.shape[1])),
        (r_val, (B, 1, L, q_val.shape[3] - key.stop)),
        (seen_val, (B, L, heads, both)),
        (q_val, (B, heads, 1, q_val.shape[3])),
    ]
    for tensor, shape in expected:
        if not same_shape(tensor.shape, shape):
            return f"it reads {list(tensor.shape)} where MLA has {list(shape)}"
    if len({q_val.dtype, c_val.dtype, r_val.dtype, projection.dtype}) != 1:
        return f"its dtypes are {q_val.dtype}, {c_val.dtype}, {r_val.dtype}, {projection.dtype}"
    return None


def _cut(node: fx.Node) -> _Cut | None:
    """The node as columns of another, where it is that."""
    for view in views(node):
        if view.op != "aten.slice":
            continue
        given = {a.name: a.value for a in view.args}
        source, dim, start, end = (given.get(n) for n in ("self", "dim", "start", "end"))
        whole = tensor_of(source)
        if whole is None or not isinstance(dim, int) or dim % whole.dim() != whole.dim() - 1:
            continue
        if isinstance(source, fx.Node) and isinstance(start, int) and isinstance(end, int):
            return _Cut(source, start, min(end, int(whole.shape[-1])))
    return None


def _columns(node: fx.Node) -> list[tuple[fx.Node, tuple[fx.Node, ...]]] | None:
    """What stands side by side in the last dimension, left to right, each with the nodes that put it there.

    ``cat``, or a fresh tensor filled slice by slice (a slice_scatter of a copy each).
    """
    mine = tensor_of(node)
    if mine is None:
        return None
    last = mine.dim() - 1
    if op_family(node.target) == "aten.cat":
        dim: Any = node.args[1] if len(node.args) > 1 else 0
        given: Any = node.args[0]
        return [(n, ()) for n in given] if dim % mine.dim() == last else None
    parts: list[tuple[int, int, fx.Node, tuple[fx.Node, ...]]] = []
    at = node
    while at.target is aten.slice_scatter.default:
        base, copy, dim, start = (*at.args, *(None,) * 4)[:4]
        if not isinstance(base, fx.Node) or not isinstance(copy, fx.Node) or not isinstance(start, int):
            return None
        if dim % mine.dim() != last or copy.target is not aten.copy.default or len(at.args) > 5:  # type: ignore[operator]
            return None
        source = copy.args[1]
        there, width = tensor_of(source), tensor_of(copy)
        if there is None or width is None or not same_shape(there.shape, width.shape) or there.dtype != mine.dtype:
            return None
        assert isinstance(source, fx.Node)
        parts.append((start, start + int(width.shape[last]), source, (copy, at)))
        at = base
    if not parts or at.target not in _FRESH:
        return None
    parts.sort(key=lambda part: part[0])
    edges = [edge for start, stop, _, _ in parts for edge in (start, stop)]
    # Every column exactly once: a part's end is the next one's begin.
    if edges[0] != 0 or edges[-1] != mine.shape[last] or edges[1:-1:2] != edges[2::2]:
        return None
    return [(source, nodes) for _, _, source, nodes in parts]

"""fuse_rope: rotary position embedding of queries and keys → ``ktfx::rope`` over the model's own tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ktfx.canonical import op_family, same_shape, same_size, strip, tensor_of
from ktfx.fusion import Fusion, FusionPass
from ktfx.graph import insert_call
from ktfx.matcher import Match
from ktfx.pass_manager import register_pass

_HALF, _REST = "aten.chunk(x, 2, -1)[0]", "aten.chunk(x, 2, -1)[1]"
_EVEN, _ODD = "aten.slice(x, -1, 0, _, 2)", "aten.slice(x, -1, 1, _, 2)"
_COS, _SIN = "aten.unsqueeze(cos, 1)", "aten.unsqueeze(sin, 1)"


def _turned(a: str, c: str) -> str:
    """[a·cos − c·sin, c·cos + a·sin], the two halves of what comes out."""
    return (
        f"aten.cat([aten.sub(aten.mul({a}, {_COS}), aten.mul({c}, {_SIN})), "
        f"aten.add(aten.mul({c}, {_COS}), aten.mul({a}, {_SIN}))], -1)"
    )


def _complex(dim: int) -> str:
    """Pairs as complex numbers, times ``freqs`` with a dimension for the heads at ``dim``."""
    pairs = "aten.view_as_complex(aten.view(aten.to(x, 'float32'), pairs))"
    return f"aten.to(aten.view(aten.view_as_real(aten.mul({pairs}, aten.unsqueeze(freqs, {dim}))), whole), d)"


def _check_complex(match: Match, heads: int) -> str | None:
    """heads: x's dimension of heads, 1 or 2; the pairs lie side by side in the last."""
    x, root, freqs = tensor_of(match.captures["x"]), tensor_of(match.root), tensor_of(match.captures["freqs"])
    if x is None or root is None or freqs is None:
        return "x or the table is no tensor"
    if x.dim() != 4 or freqs.dim() != 3 or freqs.dtype != torch.complex64:
        return f"x has {x.dim()} dimensions and the table {freqs.dim()} of {freqs.dtype}, not 4 and 3 of complex64"
    if x.dtype != root.dtype or not same_shape(x.shape, root.shape):
        return f"it turns {x.dtype} {list(x.shape)} into {root.dtype} {list(root.shape)}"
    pairs = match.captures["pairs"]
    if not isinstance(pairs, list | tuple) or len(pairs) != 5 or pairs[-1] != 2:
        return f"its complex numbers are no neighbours of the last dimension: {pairs}"
    batch = same_size(freqs.shape[0], 1) or same_size(freqs.shape[0], x.shape[0])
    if not (batch and same_size(freqs.shape[1], x.shape[3 - heads]) and same_size(freqs.shape[2] * 2, x.shape[3])):
        return f"the table is {list(freqs.shape)}, x is {list(x.shape)}"
    return None


def _check_heads_first(match: Match) -> str | None:
    return _check_complex(match, 1)


def _check_heads_last(match: Match) -> str | None:
    return _check_complex(match, 2)


def _parts(graph: fx.Graph, match: Match, shared: dict[Any, fx.Node]) -> Mapping[str, Any]:
    """The real and the imaginary part of a complex table, made once, beside it."""
    table, aten = strip(match.captures["freqs"]), torch.ops.aten
    if table not in shared:
        with graph.inserting_after(table):
            shared[table] = insert_call(graph, aten.view_as_real.default, (table,), like=table)
        for i in (1, 0):
            with graph.inserting_after(shared[table]):
                part = insert_call(graph, aten.select.int, (shared[table], -1, i), like=table)
            with graph.inserting_after(part):
                memory = {"memory_format": torch.contiguous_format}
                shared[table, i] = insert_call(graph, aten.clone.default, (part,), memory, like=table)
    return {"cos": shared[table, 0], "sin": shared[table, 1]}


def _check_shapes(match: Match, entries_a_pair: int) -> str | None:
    x, root = tensor_of(match.captures["x"]), tensor_of(match.root)
    cos, sin = tensor_of(match.captures["cos"]), tensor_of(match.captures["sin"])
    if x is None or root is None or cos is None or sin is None:
        return "x or a table is no tensor"
    if x.dim() != 4 or cos.dim() != 3 or sin.dim() != 3:
        return f"x has {x.dim()} dimensions and the tables {cos.dim()} and {sin.dim()}, not 4, 3 and 3"
    if x.dtype != root.dtype:
        return f"it turns {x.dtype} into {root.dtype}"
    for name, table in (("cos", cos), ("sin", sin)):
        batch = same_size(table.shape[0], 1) or same_size(table.shape[0], x.shape[0])
        width = same_size(table.shape[2] * 2, x.shape[3] * entries_a_pair)
        if not (batch and width and same_size(table.shape[1], x.shape[2])):
            return f"{name} is {list(table.shape)}, x is {list(x.shape)}"
    return None


def _check_pairs(match: Match) -> str | None:
    return _check_shapes(match, 1)


def _check_repeated(match: Match) -> str | None:
    """A table of both halves may be read as one entry a pair only if its halves are equal: its making shows it."""
    for name in ("cos", "sin"):
        if not _repeats(match.captures[name]):
            return f"{name} is not known to hold the same values in both halves: it is not made by cat((f, f), -1)"
    return _check_shapes(match, 2)


def _repeats(table: Any) -> bool:
    """True if the table is an entrywise function of ``cat([f, f], -1)``."""
    node = strip(table)
    while isinstance(node, fx.Node) and node.op == "call_function":
        family = op_family(node.target)
        if family == "aten.cat":
            parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
            whole = tensor_of(node)
            last = whole is not None and isinstance(dim, int) and dim % whole.dim() == whole.dim() - 1
            return last and isinstance(parts, list | tuple) and len(parts) == 2 and strip(parts[0]) is strip(parts[1])
        scaled = family in ("aten.mul", "aten.div") and not isinstance(node.args[1], fx.Node)
        if family not in ("aten.to", "aten.cos", "aten.sin") and not scaled:
            return False
        node = strip(node.args[0])
    return False


def _first_halves(graph: fx.Graph, match: Match, shared: dict[Any, fx.Node]) -> Mapping[str, Any]:
    """One entry a pair: the first half of each table, made once, beside the table."""
    made: dict[str, Any] = {}
    for name in ("cos", "sin"):
        table = match.captures[name]
        if table not in shared:
            val = tensor_of(table)
            assert val is not None
            with graph.inserting_after(table):
                shared[table] = insert_call(
                    graph, torch.ops.aten.slice.Tensor, (table, -1, 0, val.shape[-1] // 2), like=table
                )
        made[f"{name}_half"] = shared[table]
    return made


@register_pass
class FuseRope(FusionPass):
    """Half-rotation (Llama, Qwen), the same on split halves (gpt-oss), pairs read interleaved (DeepSeek-V3), and pairs
    as complex numbers (DeepSeek-V2, Llama 4), which Inductor leaves to a kernel an operator.

    The op forms products in float32 and rounds once. A partial rotation matches on the part that turns.
    """

    name = "fuse_rope"
    numerics_preserving = True
    roles = ("attention",)
    fusions = (
        Fusion(
            "half-rotation → ktfx.rope",
            f"aten.add(aten.mul(x, {_COS}), aten.mul(aten.cat([aten.neg({_REST}), {_HALF}], -1), {_SIN}))",
            "ktfx.rope(x, cos_half, sin_half, 'half')",
            _check_repeated,
            _first_halves,
        ),
        Fusion(
            "rotation of halves → ktfx.rope",
            _turned(_HALF, _REST),
            "ktfx.rope(x, cos, sin, 'half')",
            _check_pairs,
        ),
        Fusion(
            "rotation of interleaved pairs → ktfx.rope",
            _turned(_EVEN, _ODD),
            "ktfx.rope(x, cos, sin, 'split')",
            _check_pairs,
        ),
        Fusion(
            "rotation of complex numbers → ktfx.rope",
            _complex(1),
            "ktfx.rope(x, cos, sin, 'interleaved')",
            _check_heads_first,
            _parts,
        ),
        Fusion(
            "rotation of complex numbers, heads last → ktfx.rope",
            _complex(2),
            "aten.transpose(ktfx.rope(aten.transpose(x, 1, 2), cos, sin, 'interleaved'), 1, 2)",
            _check_heads_last,
            _parts,
        ),
    )

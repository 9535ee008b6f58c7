"""One reading for many spellings: what lets a pattern match however the model wrote it. The graph is not changed.

``views(node)`` lists the ways to read a node: its own operator with every argument named and defaults filled, and what
the same value is under another name (``pow(x, 2)`` as ``mul(x, x)``, a part of ``split`` as ``slice``, ``x·σ(x)`` as
``silu``). ``canonical_expression`` brings a pattern to the same vocabulary.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ktfx.patterns import GETITEM, Call, Expression, Literal, Sequence

# Two names for one operator; the right one is used on both sides.
SAME = {
    "aten._to_copy": "aten.to",
    "prims.convert_element_type": "aten.to",
    "aten.type_as": "aten.to",
    "aten.reshape": "aten.view",
    "aten._unsafe_view": "aten.view",
    "aten._reshape_alias": "aten.view",
    "aten._softmax": "aten.softmax",
    "aten.multiply": "aten.mul",
    "aten.divide": "aten.div",
    "aten.true_divide": "aten.div",
    "aten.subtract": "aten.sub",
    "aten.negative": "aten.neg",
    "aten.swapaxes": "aten.transpose",
    "aten.swapdims": "aten.transpose",
    "aten.concat": "aten.cat",
    "aten.concatenate": "aten.cat",
    "aten.__and__": "aten.bitwise_and",
    "aten.__or__": "aten.bitwise_or",
}
COMMUTATIVE = frozenset(
    {
        "aten.add",
        "aten.mul",
        "aten.eq",
        "aten.ne",
        "aten.maximum",
        "aten.minimum",
        "aten.logical_and",
        "aten.logical_or",
        "aten.bitwise_and",
        "aten.bitwise_or",
        "aten.bitwise_xor",
    }
)
# Arguments that do not change a value; a pattern that leaves them out matches any.
BOOKKEEPING = frozenset({"device", "pin_memory", "layout", "memory_format", "non_blocking", "copy", "implicit"})
# Operators that may return their input unchanged; they are looked through where they do.
_COPIES = frozenset({"aten.alias", "aten.clone", "aten.detach", "aten.contiguous", "aten.lift_fresh"})
_RESHAPES = frozenset({"aten.to", "aten.view", "aten.expand", "aten.slice"})
_NEUTRAL = {"aten.mul": 1, "aten.div": 1, "aten.add": 0, "aten.sub": 0}
PART = "part"
CAST = "aten.to"


@dataclass(frozen=True)
class Arg:
    """One argument of a view. ``omittable``: a pattern that does not write it still matches."""

    name: str
    value: Any
    omittable: bool = False
    keyword_only: bool = False


@dataclass(frozen=True)
class View:
    """One way to read a node: operator ``op`` (``aten.mul``) applied to ``args``.

    overload: the operator's overload, ``""`` where the view is not the node's own spelling. consumed: nodes that are
    part of it besides the node itself. rank: dimensions of its first tensor, for negative ``dim``s.
    """

    op: str
    args: tuple[Arg, ...]
    overload: str = ""
    consumed: tuple[fx.Node, ...] = ()
    rank: int | None = None

    @property
    def orders(self) -> tuple[tuple[int, ...], ...]:
        """The orders of arguments that mean the same."""
        own = tuple(range(len(self.args)))
        if len(own) < 2:
            return (own,)
        swapped = (1, 0, *own[2:])
        scaled = any(a.name == "alpha" and a.value != 1 for a in self.args)
        if self.op in COMMUTATIVE and not scaled:
            return (own, swapped)
        if self.op == "aten.transpose" and len(own) == 3:
            return (own, (0, 2, 1))
        return (own,)


def op_family(target: Any) -> str:
    """``aten.mul`` for ``aten.mul.Tensor``; ``getitem``; synonyms under one name."""
    if target is operator.getitem:
        return GETITEM
    if isinstance(target, torch._ops.OpOverload):
        name = str(target).rpartition(".")[0]
        return SAME.get(name, name)
    return getattr(target, "__name__", str(target))


def tensor_of(value: Any) -> torch.Tensor | None:
    """The (fake) tensor behind a graph value."""
    val = value.meta.get("val") if isinstance(value, fx.Node) else None
    return val if isinstance(val, torch.Tensor) else None


def constant_of(value: Any) -> Any:
    """A number that the graph writes as a 0-d tensor, as that number; anything else as it is."""
    if isinstance(value, fx.Node) and value.op == "call_function":
        if value.target is torch.ops.aten.scalar_tensor.default:
            return value.args[0]
        if value.target is torch.ops.aten.full.default and value.args[0] == []:
            return value.args[1]
    return value


def skipped(node: fx.Node) -> fx.Node | None:
    """The node whose value this one passes on unchanged (an alias, a cast to its own dtype, ×1, dropout in eval mode),
    or None."""
    if node.op != "call_function":
        return None
    family = op_family(node.target)
    if family == "aten.dropout":
        return node.args[0] if _drops_nothing(node) else None  # type: ignore[return-value]
    if family not in _COPIES and family not in _RESHAPES and family not in _NEUTRAL:
        return None
    source = node.args[0] if node.args else None
    mine, theirs = tensor_of(node), tensor_of(source)
    if mine is None or theirs is None or mine.dtype != theirs.dtype or not same_shape(mine.shape, theirs.shape):
        return None
    if family in _NEUTRAL:
        other = node.args[1] if len(node.args) > 1 else None
        # x + 0 also turns −0 into 0; nothing a pattern could mean by it.
        if isinstance(other, bool) or not isinstance(other, int | float) or other != _NEUTRAL[family]:
            return None
    if family == "aten.slice" and len(node.args) > 4 and node.args[4] != 1:
        return None
    if family == "aten.div" and node.kwargs.get("rounding_mode") is not None:
        return None
    assert isinstance(source, fx.Node)
    return source


def _drops_nothing(node: fx.Node) -> bool:
    """Dropout of a model in eval mode, or with a probability of 0."""
    given: dict[str, Any] = {**dict(zip(("input", "p", "train"), node.args, strict=False)), **node.kwargs}
    return given.get("train") is False or bool(given.get("p") == 0)


def strip(value: Any) -> Any:
    """A value without the operators that only pass it on."""
    while isinstance(value, fx.Node) and (source := skipped(value)) is not None:
        value = source
    return constant_of(value)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes, symbolic or not, are equal without a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if str(a) == str(b):
        return True
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def same_shape(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def views(node: fx.Node) -> list[View]:
    """Every way to read a node; its own spelling first. Empty for placeholders and outputs."""
    if node.op != "call_function":
        return []
    own = _own_view(node)
    if own is None:
        return []
    found = [own]
    for derive in _DERIVED.get(own.op, ()):
        found.extend(derive(node, own))
    return found


def _own_view(node: fx.Node) -> View | None:
    if node.target is operator.getitem:
        return View(GETITEM, (Arg("self", node.args[0]), Arg("index", node.args[1])))
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    schema = node.target._schema
    args: list[Arg] = []
    for position, argument in enumerate(schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        if position < len(node.args):
            value: Any = node.args[position]
        else:
            value = node.kwargs.get(argument.name, default)
        stands = argument.has_default_value() and _plainly_equal(value, default)
        args.append(Arg(argument.name, value, stands or argument.name in BOOKKEEPING, argument.kwarg_only))
    family = op_family(node.target)
    first = next((t for a in args if (t := tensor_of(a.value)) is not None), None)
    view = View(family, tuple(args), node.target._overloadname, (), first.dim() if first is not None else None)
    shape_rules = {CAST: _cast, "aten.view": _reshape, "aten.softmax": _softmax}
    rewrite = shape_rules.get(family)
    return rewrite(node, view) if rewrite is not None else _with_dtype(node, view)


def _plainly_equal(value: Any, default: Any) -> bool:
    if isinstance(value, fx.Node) or isinstance(default, fx.Node):
        return value is default
    return type(value) is type(default) and value == default


def _value(view: View, name: str, otherwise: Any = None) -> Any:
    return next((a.value for a in view.args if a.name == name), otherwise)


def _cast(node: fx.Node, view: View) -> View:
    """Any spelling of a conversion: (self, dtype), the dtype being the one that comes out."""
    mine = tensor_of(node)
    return View(CAST, (view.args[0], Arg("dtype", mine.dtype if mine is not None else None)), "", (), view.rank)


def _reshape(node: fx.Node, view: View) -> View:
    """Any spelling of a change of shape: (self, size), sizes as they come out where they are plain numbers."""
    size = _value(view, "size", _value(view, "shape"))
    mine = tensor_of(node)
    if mine is not None and isinstance(size, list | tuple) and len(size) == mine.dim():
        size = [m if isinstance(m, int) else s for s, m in zip(size, mine.shape, strict=True)]
    return View("aten.view", (view.args[0], Arg("size", size)), view.overload, (), view.rank)


def _softmax(node: fx.Node, view: View) -> View:
    """(self, dim, dtype), the dtype being the one that comes out."""
    args = (view.args[0], Arg("dim", _value(view, "dim")), _dtype_out(node, view))
    return View("aten.softmax", args, "" if view.overload == "default" else view.overload, (), view.rank)


def _with_dtype(node: fx.Node, view: View) -> View:
    """The dtype of ``sum(x, dtype=float32)`` as what comes out; it may be left out if it is the input's own."""
    if not any(a.name == "dtype" for a in view.args) or tensor_of(view.args[0].value) is None:
        return view
    args = tuple(_dtype_out(node, view) if a.name == "dtype" else a for a in view.args)
    return View(view.op, args, view.overload, view.consumed, view.rank)


def _dtype_out(node: fx.Node, view: View) -> Arg:
    source, mine = tensor_of(view.args[0].value), tensor_of(node)
    keyword_only = any(a.name == "dtype" and a.keyword_only for a in view.args)
    if source is None or mine is None:
        given = _value(view, "dtype")
        return Arg("dtype", given, given is None, keyword_only)
    return Arg("dtype", mine.dtype, _value(view, "dtype") is None or mine.dtype == source.dtype, keyword_only)


# ---- the same value under another name

_Derive = Callable[[fx.Node, View], Iterator[View]]


def _call(op: str, *values: Any, consumed: tuple[fx.Node, ...] = (), rank: int | None = None) -> View:
    names = _NAMES.get(op, ("self", "other"))
    return View(op, tuple(Arg(n, v) for n, v in zip(names, values, strict=True)), "", consumed, rank)


_NAMES = {
    "aten.square": ("self",),
    "aten.pow": ("self", "exponent"),
    "aten.rsqrt": ("self",),
    "aten.reciprocal": ("self",),
    "aten.silu": ("self",),
    "aten.neg": ("self",),
    "aten.transpose": ("self", "dim0", "dim1"),
    "aten.slice": ("self", "dim", "start", "end"),
    PART: ("self", "index", "count", "dim"),
}


def _from_pow(node: fx.Node, view: View) -> Iterator[View]:
    base, exponent = view.args[0].value, strip(view.args[1].value)
    if isinstance(exponent, fx.Node | bool):
        return
    if exponent == 2:
        yield _call("aten.mul", base, base)
        yield _call("aten.square", base)
    if exponent == -0.5:
        yield _call("aten.rsqrt", base)


def _from_square(node: fx.Node, view: View) -> Iterator[View]:
    base = view.args[0].value
    yield _call("aten.pow", base, 2)
    yield _call("aten.mul", base, base)


def _from_mul(node: fx.Node, view: View) -> Iterator[View]:
    a, b = view.args[0].value, view.args[1].value
    if isinstance(a, fx.Node) and strip(a) is strip(b):
        yield _call("aten.pow", a, 2)
        yield _call("aten.square", a)
    for x, other in ((a, b), (b, a)):
        if _is_call(other, "aten.sigmoid") and strip(other.args[0]) is strip(x):
            yield _call("aten.silu", x, consumed=(other,))
        if not isinstance(other, fx.Node | bool) and other == -1:
            yield _call("aten.neg", x)


def _from_neg(node: fx.Node, view: View) -> Iterator[View]:
    yield _call("aten.mul", view.args[0].value, -1)


def _from_reciprocal(node: fx.Node, view: View) -> Iterator[View]:
    inner = view.args[0].value
    yield _call("aten.div", 1, inner)
    if _is_call(inner, "aten.sqrt"):
        yield _call("aten.rsqrt", inner.args[0], consumed=(inner,))


def _from_div(node: fx.Node, view: View) -> Iterator[View]:
    if _value(view, "rounding_mode") is not None:
        return
    one, inner = strip(view.args[0].value), view.args[1].value
    if not isinstance(one, fx.Node | bool) and one == 1 and isinstance(inner, fx.Node):
        yield _call("aten.reciprocal", inner)
        if _is_call(inner, "aten.sqrt"):
            yield _call("aten.rsqrt", inner.args[0], consumed=(inner,))


def _from_rsub(node: fx.Node, view: View) -> Iterator[View]:
    if _value(view, "alpha", 1) == 1:
        yield _call("aten.sub", view.args[1].value, view.args[0].value)


def _from_t(node: fx.Node, view: View) -> Iterator[View]:
    if view.rank == 2:
        yield _call("aten.transpose", view.args[0].value, 0, 1, rank=2)


def _from_permute(node: fx.Node, view: View) -> Iterator[View]:
    dims = view.args[1].value
    rank = view.rank
    if rank is None or not isinstance(dims, list | tuple) or not all(isinstance(d, int) for d in dims):
        return
    moved = [i for i, d in enumerate(dims) if d % rank != i]
    if len(moved) == 2:
        yield _call("aten.transpose", view.args[0].value, moved[0], moved[1], rank=rank)


def _from_getitem(node: fx.Node, view: View) -> Iterator[View]:
    """Part i of an even split, as ``slice`` and as part i of n."""
    source, index = view.args[0].value, view.args[1].value
    if not _is_call(source, "aten.split", "aten.chunk", "aten.split_with_sizes") or not isinstance(index, int):
        return
    whole, parts = tensor_of(source.args[0]), source.meta.get("val")
    mine = tensor_of(node)
    if whole is None or mine is None or not isinstance(parts, list | tuple):
        return
    dim = source.args[2] if len(source.args) > 2 else source.kwargs.get("dim", 0)
    if not isinstance(dim, int):
        return
    sizes = [p.shape[dim] for p in parts]
    if not all(isinstance(s, int) for s in sizes):
        return
    start = sum(sizes[:index])
    yield _call("aten.slice", source.args[0], dim, start, start + sizes[index], consumed=(source,), rank=whole.dim())
    if len(set(sizes)) == 1:
        yield _call(PART, source.args[0], index, len(sizes), dim, consumed=(source,), rank=whole.dim())


def _from_slice(node: fx.Node, view: View) -> Iterator[View]:
    """With start and end as plain numbers, and as part i of n where it is one."""
    source, mine = tensor_of(view.args[0].value), tensor_of(node)
    dim, start = _value(view, "dim", 0), _value(view, "start", 0)
    if source is None or mine is None or _value(view, "step", 1) != 1 or not isinstance(dim, int):
        return
    whole, length = source.shape[dim], mine.shape[dim]
    start = 0 if start is None else start
    if not (isinstance(whole, int) and isinstance(length, int) and isinstance(start, int)):
        return
    start = max(start + whole, 0) if start < 0 else start
    yield _call("aten.slice", view.args[0].value, dim, start, start + length, rank=view.rank)
    if 0 < length < whole and whole % length == 0 and start % length == 0:
        yield _call(PART, view.args[0].value, start // length, whole // length, dim, rank=view.rank)


def _from_softmax(node: fx.Node, view: View) -> Iterator[View]:
    """``softmax(x.float(), dim)`` as ``softmax(x, dim, float32)``."""
    inner, mine = view.args[0].value, tensor_of(node)
    if not _is_call(inner, CAST) or mine is None:
        return
    source, cast = tensor_of(inner.args[0]), tensor_of(inner)
    if source is None or cast is None or cast.dtype != mine.dtype or not source.dtype.is_floating_point:
        return
    if torch.promote_types(source.dtype, cast.dtype) == cast.dtype:
        args = (Arg("self", inner.args[0]), view.args[1], Arg("dtype", mine.dtype))
        yield View("aten.softmax", args, "", (inner,), view.rank)


def _is_call(value: Any, *families: str) -> bool:
    return isinstance(value, fx.Node) and value.op == "call_function" and op_family(value.target) in families


_DERIVED: dict[str, tuple[_Derive, ...]] = {
    "aten.pow": (_from_pow,),
    "aten.square": (_from_square,),
    "aten.mul": (_from_mul,),
    "aten.neg": (_from_neg,),
    "aten.reciprocal": (_from_reciprocal,),
    "aten.div": (_from_div,),
    "aten.rsub": (_from_rsub,),
    "aten.t": (_from_t,),
    "aten.permute": (_from_permute,),
    GETITEM: (_from_getitem,),
    "aten.slice": (_from_slice,),
    "aten.softmax": (_from_softmax,),
}


# ---- patterns


def canonical_expression(expression: Expression) -> Expression:
    """The pattern in the vocabulary of ``views``: synonyms under one name, composites as the one operator they are."""
    if isinstance(expression, Sequence):
        return Sequence(tuple(canonical_expression(item) for item in expression.items))
    if not isinstance(expression, Call):
        return expression
    args = tuple(canonical_expression(a) for a in expression.args)
    kwargs = tuple((k, canonical_expression(v)) for k, v in expression.kwargs)
    call = Call(canonical_op(expression.op), args, kwargs)
    return _composite(call) or call


def canonical_op(name: str) -> str:
    """An operator's name under its one synonym; an overload that was written is kept where it still means something."""
    parts = name.split(".")
    family = ".".join(parts[:2])
    if family not in SAME and family != CAST:
        return name
    return SAME.get(family, family)


def _composite(call: Call) -> Call | None:
    if call.kwargs:
        return None
    args = call.args
    if call.op == "aten.mul" and len(args) == 2:
        for x, other in (args, args[::-1]):
            if isinstance(other, Call) and other.op == "aten.sigmoid" and other.args == (x,):
                return Call("aten.silu", (x,), ())
    if call.op == "aten.pow" and len(args) == 2 and args[1] == Literal(-0.5):
        return Call("aten.rsqrt", args[:1], ())
    root = args[0] if call.op == "aten.reciprocal" and args else None
    if call.op == "aten.div" and len(args) == 2 and isinstance(args[0], Literal) and args[0].value == 1:
        root = args[1]
    if isinstance(root, Call) and root.op == "aten.sqrt" and len(root.args) == 1:
        return Call("aten.rsqrt", root.args, ())
    if call.op == "aten.t" and len(args) == 1:
        return Call("aten.transpose", (args[0], Literal(0), Literal(1)), ())
    if call.op == GETITEM:
        return _part(call)
    return None


def _part(call: Call) -> Call | None:
    """``aten.chunk(x, n, dim)[i]`` as part i of n; ``aten.split(x, size, dim)[i]`` as the slice it is."""
    source, index = call.args
    if not isinstance(source, Call) or source.op not in ("aten.chunk", "aten.split") or not isinstance(index, Literal):
        return None
    given = dict(zip(("self", "size", "dim"), source.args, strict=False)) | {
        {"chunks": "size", "split_size": "size"}.get(k, k): v for k, v in source.kwargs
    }
    x, size, dim = given.get("self"), given.get("size"), given.get("dim", Literal(0))
    if x is None or not isinstance(size, Literal) or type(size.value) is not int or type(index.value) is not int:
        return None
    if source.op == "aten.chunk":
        return Call(PART, (x, index, size, dim), ())
    start = index.value * size.value
    return Call("aten.slice", (x, dim, Literal(start), Literal(start + size.value)), ())

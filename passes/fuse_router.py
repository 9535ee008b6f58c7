"""fuse_router: from router logits to chosen experts and their weights → ``ktfx::route``."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from ktfx.canonical import tensor_of
from ktfx.fusion import Fusion, FusionPass
from ktfx.graph import insert_call
from ktfx.matcher import Match
from ktfx.pass_manager import PassContext, register_pass

# The last argument of topk (sorted) may be either: in whatever order they come, the chosen are the same.
_TOP = "aten.topk({}, k, -1, True, _)"
_SOFTMAX = "aten.softmax(logits, -1, 'float32')"
_SIGMOID = "aten.sigmoid(logits)"


def _normed(weights: str) -> str:
    return f"aten.div({weights}, aten.sum({weights}, [-1], True))"


def _mask(best: str) -> str:
    """Which experts lie in none of the ``keep`` groups that are best by ``best``, (T, groups)."""
    kept = f"aten.scatter(aten.zeros_like({best}), 1, aten.topk({best}, keep, -1, True, _)[1], 1)"
    spread = f"aten.expand(aten.unsqueeze({kept}, -1), _)"
    return f"aten.bitwise_not(aten.to(aten.view({spread}, _), 'bool'))"


# DeepSeek-V3 and its kin: sigmoid scores, chosen with a bias, in the groups whose two best sum highest.
_BIASED = f"aten.add({_SIGMOID}, bias)"
_TOP2 = f"aten.sum(aten.topk(aten.view({_BIASED}, [-1, groups, _]), 2)[0], [-1])"
_V3_IDS = _TOP.format(f"aten.masked_fill({_BIASED}, {_mask(_TOP2)}, fill)") + "[1]"
_V3_WEIGHTS = f"aten.gather({_SIGMOID}, 1, {_V3_IDS})"
_V3_NORMED = f"aten.div({_V3_WEIGHTS}, aten.add(aten.sum({_V3_WEIGHTS}, [-1], True), eps))"
# DeepSeek-V2: softmax scores, in the groups whose best is highest.
_BEST = f"aten.max(aten.view({_SOFTMAX}, [-1, groups, _]), -1)[0]"
_V2_TOP = _TOP.format(f"aten.masked_fill({_SOFTMAX}, {_mask(_BEST)}, fill)")


def _check(match: Match) -> str | None:
    """Logits are (T, E); softmax and sigmoid were formed in float32, as the op forms them."""
    logits, root = tensor_of(match.captures["logits"]), tensor_of(match.root)
    if logits is None or root is None or logits.dim() != 2:
        return "its logits are not (tokens, experts)"
    if not isinstance(match.captures["k"], int):
        return "the number of chosen experts is not fixed"
    return None


def _check_sigmoid(match: Match) -> str | None:
    logits = tensor_of(match.captures["logits"])
    if logits is not None and logits.dtype != torch.float32:
        return f"its sigmoid is formed in {logits.dtype}, not in float32"
    return _check_groups(match)


def _check_groups(match: Match) -> str | None:
    why = _check(match)
    if why is not None:
        return why
    logits = tensor_of(match.captures["logits"])
    assert logits is not None
    groups, keep, k = (match.captures[n] for n in ("groups", "keep", "k"))
    experts = logits.shape[1]
    if not isinstance(groups, int) or not isinstance(experts, int) or experts % groups:
        return f"{experts} experts do not lie in {groups} equal groups"
    if keep * (experts // groups) < k:
        return f"{k} experts cannot be chosen from {keep} groups of {experts // groups}"
    fill = match.captures["fill"]
    if not isinstance(fill, int | float) or fill not in (0.0, float("-inf")):
        return f"experts of other groups count as {fill}"
    return None


def _route(what: str, weights: str, ids: str, arguments: str, check: Callable[[Match], str | None] = _check) -> Fusion:
    call = f"ktfx.route({arguments})"
    return Fusion(f"{what} → ktfx.route", f"[{weights}, {ids}]", f"[{call}[0], {call}[1]]", check)


def _grouped(what: str, weights: str, ids: str, bias: str, scoring: str, renormalise: str) -> Fusion:
    score, check = ("top2", _check_sigmoid) if scoring == "sigmoid" else ("max", _check_groups)
    return _route(
        what,
        f"aten.mul({weights}, scale)",
        ids,
        f"logits, {bias}, k, '{scoring}', groups, keep, '{score}', {renormalise}, masked=fill, scale=scale",
        check,
    )


_PLAIN = _TOP.format(_SOFTMAX)
_CHOSEN = "aten.topk(logits, k, -1, True, _)"


def _take_in_casts(graph: fx.Graph) -> None:
    """Weights that ``route`` writes in float32 and that are only read in another dtype are written in that dtype."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.ktfx.route.default):
        weights = next((u for u in node.users if u.target is operator.getitem and u.args[1] == 0), None)
        if weights is None or len(weights.users) != 1 or node.kwargs.get("dtype", torch.float32) != torch.float32:
            continue
        (cast,) = weights.users
        if cast.target is torch.ops.aten._to_copy.default and set(cast.kwargs) == {"dtype"}:
            with graph.inserting_before(node):
                wanted = {**node.kwargs, "dtype": cast.kwargs["dtype"]}
                call = insert_call(graph, torch.ops.ktfx.route.default, node.args, wanted, like=node)
                written = insert_call(graph, operator.getitem, (call, 0), like=weights)
            cast.replace_all_uses_with(written)
            for unread in (cast, weights):
                graph.erase_node(unread)
            node.replace_all_uses_with(call)
            graph.erase_node(node)


@register_pass
class FuseRouter(FusionPass):
    """Softmax, top-k and renormalising (Mixtral, Qwen), softmax of the chosen (gpt-oss), groups (DeepSeek-V2 and -V3).

    Only inside modules that are routers or hold experts. Of equal scores ``ktfx::route`` takes the lower id, ATen any.
    """

    name = "fuse_router"
    numerics_preserving = True
    roles = ("router", "moe")
    only_in_roles = True
    fusions = (
        _grouped("sigmoid, bias, groups, renormalised", _V3_NORMED, _V3_IDS, "bias", "sigmoid", "True, eps=eps"),
        _grouped("sigmoid, bias, groups", _V3_WEIGHTS, _V3_IDS, "bias", "sigmoid", "False"),
        _grouped("softmax, groups", f"{_V2_TOP}[0]", f"{_V2_TOP}[1]", "None", "softmax", "False"),
        _route(
            "softmax, renormalised",
            f"aten.to({_normed(_PLAIN + '[0]')}, d)",
            f"{_PLAIN}[1]",
            "logits, None, k, 'softmax', dtype=d",
        ),
        _route(
            "softmax of the chosen",
            f"aten.softmax({_CHOSEN}[0], -1, d)",
            f"{_CHOSEN}[1]",
            "logits, None, k, 'softmax', dtype=d",
        ),
        _route(
            "softmax, scaled",
            f"aten.mul(aten.to({_PLAIN}[0], 'float32'), scale)",
            f"{_PLAIN}[1]",
            "logits, None, k, 'softmax', renormalise=False, scale=scale",
        ),
        _route(
            "softmax",
            f"aten.to({_PLAIN}[0], d)",
            f"{_PLAIN}[1]",
            "logits, None, k, 'softmax', renormalise=False, dtype=d",
        ),
    )

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        super().run(gm, context)
        if any(r.after[:1] == ("ktfx.route.default",) for r in context.rewrites):
            _take_in_casts(gm.graph)
            gm.recompile()

"""What part a module plays (experts, router, attention, …) and which decoder layer it belongs to.

Both are read off structure and class names, for any family of transformers 5 and for hand-written models alike; no list
of architectures is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

ROLES = (
    "layer",
    "moe",
    "experts",
    "router",
    "shared_experts",
    "attention",
    "mlp",
    "norm",
    "embedding",
    "head",
    "rope",
    "linear",
)
"""What ``match.module`` may name.

layer: a decoder layer · moe: the block that holds router and experts · experts: all routed experts of a layer, whatever
their layout · router: picks the experts · shared_experts: the expert every token takes · attention: attention or what
stands in its place (linear attention, a state-space mixer) · mlp: a dense feed-forward block · norm · embedding: token
and position tables · head: the linear that makes logits · rope: rotary position embedding · linear: other nn.Linears.
"""

_LAYER_LISTS = ("layers", "h", "blocks", "block", "layer", "decoder_layers")
_LAYER_PATH = re.compile(r"(?:^|\.)(?:" + "|".join(_LAYER_LISTS) + r")\.(\d+)(?=\.|$)")
_NOT_DECODER = re.compile(
    r"(?:^|\.)(?:visual|vision\w*|audio\w*|image\w*|encoder|speech\w*|mtp|nextn\w*)(?:\.|$)", re.I
)
_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention", "linear_attn", "mixer", "mamba")
_MLP_NAMES = ("mlp", "ffn", "feed_forward", "feedforward", "ff")
_HEAD_NAMES = ("lm_head", "embed_out", "output", "head", "output_projection")


def layer_of(path: str) -> int | None:
    """The decoder layer a module path lies in: ``model.layers.12.mlp`` → 12; None outside the layers.

    From the path alone: the number after the first ``layers``, ``h``, ``blocks``, …, and never inside a vision or audio
    tower. Where the model is at hand, ``decoder_layers`` is surer.
    """
    match = _LAYER_PATH.search(path)
    if match is None or _NOT_DECODER.search(path[: match.start() + 1]):
        return None
    return int(match[1])


def decoder_layers(model: nn.Module) -> str | None:
    """The path of the list that holds the decoder layers, or None.

    Of all outermost module lists it is the one with the most parameters, those in vision, audio or encoder towers left
    out unless there is nothing else.
    """
    lists: dict[str, int] = {}
    for path, module in model.named_modules():
        nested = any(path.startswith(outer + ".") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not nested and not _is_experts(module, path):
            lists[path] = sum(p.numel() for p in module.parameters())
    own = {path: size for path, size in lists.items() if not _NOT_DECODER.search(path)}
    candidates = own or lists
    return max(candidates, key=lambda path: candidates[path]) if candidates else None


def layer_within(path: str, layers: str | None) -> int | None:
    """The layer number of ``path`` in the list at ``layers`` (what ``decoder_layers`` found)."""
    if layers is None:
        return None
    if layers and not path.startswith(layers + "."):
        return None
    index = path[len(layers) + 1 if layers else 0 :].split(".", 1)[0]
    return int(index) if index.isdigit() else None


def roles_of(model: nn.Module) -> dict[str, str | None]:
    """The role of every module of a model, by path."""
    layers = decoder_layers(model)
    head = _output_embeddings(model)
    found: dict[str, str | None] = {}
    for path, module, parent in _with_parents(model):
        if layers is not None and path.rpartition(".")[0] == layers and path != layers and path:
            found[path] = "layer"
        elif head is not None and module is head:
            found[path] = "head"
        else:
            found[path] = role_of(path, module, parent)
    return found


def role_of(path: str, module: nn.Module, parent: nn.Module | None = None) -> str | None:
    """The role of one module (a name of ``ROLES``), or None.

    ``parent`` tells a hand-written router (a Linear beside the experts) from any other Linear. ``layer``, and a head
    with an unusual name, need the whole model: ``roles_of``.
    """
    name = path.rpartition(".")[2]
    kind = type(module).__name__
    if path == "" and parent is None:
        return None
    if re.fullmatch(r"shared_(expert|experts|mlp)", name) and not isinstance(module, nn.Linear):
        return "shared_experts"
    if _is_experts(module, path):
        return "experts"
    if _is_router(name, kind, module, parent):
        return "router"
    if re.search(r"Rotary|RoPE|Rope(?!r)", kind) and not any(True for _ in module.children()):
        return "rope"
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) or re.search(r"Norm(?!al)", kind):
        return "norm"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear):
        return "head" if name in _HEAD_NAMES and path.count(".") <= 1 and layer_of(path) is None else "linear"
    if _holds_experts(module, path):
        return "layer" if layer_of(path) is not None and name.isdigit() else "moe"
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return None
    if name.isdigit() and layer_of(path) is not None and _LAYER_PATH.search(path + ".") and _is_last_index(path):
        return "layer"
    if re.search(r"Attention|Attn|DeltaNet|Mamba|ShortConv|MLA$", kind):
        return "attention"
    if name in _MLP_NAMES or re.search(r"MLP|FeedForward|FFN|Mlp", kind):
        return "mlp"
    if name in _ATTENTION_NAMES:
        return "attention"
    return None


_Visit = tuple[str, nn.Module, nn.Module | None]


def _with_parents(model: nn.Module) -> Iterator[_Visit]:
    """(path, module, parent), every path once; a module that has two paths comes twice (tied modules)."""

    def walk(path: str, module: nn.Module, parent: nn.Module | None) -> Iterator[_Visit]:
        yield path, module, parent
        for name, child in module.named_children():
            yield from walk(f"{path}.{name}" if path else name, child, module)

    yield from walk("", model, None)


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    if not callable(getter):
        return None
    try:
        found = getter()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _is_experts(module: nn.Module, path: str) -> bool:
    name = path.rpartition(".")[2]
    if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):  # set by transformers' experts decorator
        return True
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        # Hand-written models keep one small module an expert.
        return "expert" in name and "shared" not in name and len(module) > 1
    if isinstance(module, nn.Linear | nn.Embedding) or "Conv" in type(module).__name__ or "shared" in name:
        return False
    stacks = [p for p in module.parameters(recurse=False) if p.dim() == 3 and p.shape[0] > 1]
    if len(stacks) >= 2 and len({p.shape[0] for p in stacks}) == 1:
        return True
    # Some families keep the stacked weights one level further down (aria, dbrx).
    return bool(re.search(r"Experts", type(module).__name__)) or (
        name == "experts" and any(True for _ in module.parameters())
    )


def _holds_experts(module: nn.Module, path: str) -> bool:
    return any(_is_experts(child, f"{path}.{name}") for name, child in module.named_children())


def _is_router(name: str, kind: str, module: nn.Module, parent: nn.Module | None) -> bool:
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return False
    if re.search(r"Router|(MoE|Moe|TopK|Topk)Gat(e|ing)(?!d)", kind):
        return True
    if isinstance(module, nn.Linear) and parent is not None and re.search(r"Router", type(parent).__name__):
        return True
    beside_experts = parent is not None and _holds_experts(parent, "")
    return beside_experts and name in ("gate", "router", "wg", "gating") and any(True for _ in module.parameters())


def _is_last_index(path: str) -> bool:
    """True if the path ends in its first layer number (``model.layers.3``, not ``model.layers.3.experts.0``)."""
    match = _LAYER_PATH.search(path)
    return match is not None and match.end() == len(path)

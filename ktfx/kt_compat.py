"""What the names in KTransformers' rule files mean here: operators, their classes, model classes, old module paths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ktfx.errors import Origin, RuleError
from ktfx.text import did_you_mean

DEFAULT_DEVICE = "cuda:0"
DEFAULT_CLASS = "default"


@dataclass(frozen=True)
class Operator:
    """A KTransformers operator as a ktfx op and a weight format (None: the model's own)."""

    op: str
    weights: str | None = None


OPERATORS: dict[str, Operator] = {
    "KExpertsCPU": Operator("experts.cpu"),
    "KSFTExpertsCPU": Operator("experts.cpu"),
    "MLPCPUExperts": Operator("experts.cpu"),
    "KExpertsCPUW8A8": Operator("experts.cpu", "int8"),
    "KExpertsTorch": Operator("experts.aten"),
    "KExpertsMarlin": Operator("experts.triton", "int4"),  # int4's own group is Marlin's: 64
    "MLPCUDAExperts": Operator("experts.triton"),
    "KLinearTorch": Operator("linear.aten"),
    "KLinearTorchW8A8A2": Operator("linear.aten", "int8"),
    "KLinearMarlin": Operator("linear.triton", "int4"),
    "VLinearMarlin": Operator("linear.triton", "int4"),
    "KLinearFP8": Operator("linear.triton", "fp8"),
    "KLinearQ8": Operator("linear.triton", "int8"),
    "KLinearCPUInfer": Operator("linear.cpu"),
    "None": Operator("none"),
}
_REFUSED = {"KLinearIPEXLLM": "it runs on Intel GPUs (xpu)"}

# AMXBF16 packs what bf16 models hold anyway: the model's own format.
BACKENDS: dict[str, str | None] = {
    "llamafile": None,
    "AMXBF16": None,
    "AMXInt8": "int8",
    "AMXInt4": "int4",
}
_MARLIN_BITS = {4: "int4", 8: "int8"}

_OPERATOR_MODULES = (
    "linear",
    "experts",
    "attention",
    "balance_serve_attention",
    "triton_attention",
    "gate",
    "RoPE",
    "models",
    "mlp",
    "layernorm",
)
_STRICT_CLASSES = {
    "linear": ("KTransformersLinear",),
    "experts": ("KTransformersExperts", "KTransformersExpertsV2", "KDeepseekV2MoE", "KDeepseekV3MoE"),
}
_MOE_BLOCK = re.compile(r"K\w*(MoE|Moe)\w*")

# KTransformers' model files whose family has another name in transformers.
_FAMILIES = {"deepseek": "deepseek_v2", "hunyuan": "hunyuan_v1_moe", "llama": "llama"}
_KT_MODEL = re.compile(r"ktransformers\.models\.(?:custom_)?modeling_(\w+)\.(\w+)")


def operator(name: str, kwargs: Mapping[str, Any], origin: Origin, rule: str) -> Operator:
    """The ktfx op of a KTransformers operator. RuleError, with the near name, for one that ktfx does not have."""
    if name in _REFUSED:
        raise RuleError(
            f"the operator {name!r} cannot run here: {_REFUSED[name]}",
            origin=origin,
            rule=rule,
            expected="an operator for the host or for NVIDIA GPUs",
            mend="use KLinearMarlin or KLinearTorch",
        )
    if name not in OPERATORS:
        raise RuleError(
            f"unknown operator {name!r}",
            origin=origin,
            rule=rule,
            expected="one of " + ", ".join(OPERATORS),
            mend=did_you_mean(name, OPERATORS) or "name one of these",
        )
    found = OPERATORS[name]
    if name in ("KExpertsCPU", "KSFTExpertsCPU") and kwargs.get("backend") is not None:
        return Operator(found.op, BACKENDS[kwargs["backend"]])
    if name == "KLinearMarlin" and kwargs.get("num_bits") is not None:
        return Operator(found.op, _MARLIN_BITS[kwargs["num_bits"]])
    return found


def check_backend(value: object, origin: Origin, rule: str) -> None:
    if value not in BACKENDS:
        raise RuleError(
            f"unknown backend {value!r}",
            origin=origin,
            rule=rule,
            expected="one of " + ", ".join(BACKENDS),
            mend=did_you_mean(str(value), BACKENDS),
        )


def check_num_bits(value: object, origin: Origin, rule: str) -> None:
    if value not in _MARLIN_BITS:
        raise RuleError(f"num_bits is {value!r}", origin=origin, rule=rule, expected="4 or 8")


def check_class(path: str, origin: Origin, rule: str) -> None:
    """RuleError if ``replace.class`` is neither ``default`` nor an operator class of KTransformers."""
    if path == DEFAULT_CLASS:
        return
    prefix = "ktransformers.operators."
    module, _, name = path.removeprefix(prefix).rpartition(".")
    strict = _STRICT_CLASSES.get(module)
    known = (
        path.startswith(prefix)
        and module in _OPERATOR_MODULES
        and (strict is None or name in strict or (module == "experts" and _MOE_BLOCK.fullmatch(name) is not None))
    )
    if known:
        return
    names = [DEFAULT_CLASS, *(f"{prefix}{m}.{n}" for m, classes in _STRICT_CLASSES.items() for n in classes)]
    names += [f"{prefix}{m}.…" for m in _OPERATOR_MODULES if m not in _STRICT_CLASSES]
    raise RuleError(
        f"unknown operator class {path!r}",
        origin=origin,
        rule=rule,
        expected="'default' or a class of " + ", ".join(f"{prefix}{m}" for m in _OPERATOR_MODULES),
        mend=did_you_mean(path, names) or "use 'default' to place the module and keep its own code",
    )


def is_model_class(path: str) -> bool:
    """True for ``ktransformers.models.modeling_….Class``: a name that stands for a class of transformers."""
    return _KT_MODEL.fullmatch(path) is not None


def stands_for(path: str, cls: type, role: str | None) -> bool:
    """Whether KTransformers' model class ``path`` means the transformers class ``cls`` (or one it derives from).

    Its own model files are copies of transformers' models, one module a family, so family and class name must both
    agree: ``modeling_deepseek_v3.MoEGate`` is no class of DeepSeek-V2. Names differ in case (``MoE``/``Moe``), in
    ``Yarn``-like prefixes of rotary embeddings, and routers had names of their own.
    """
    match = _KT_MODEL.fullmatch(path)
    if not match:
        return False
    family = _FAMILIES.get(match[1], match[1])
    name = match[2]
    for base in cls.__mro__:
        of_base = _family_of(base)
        if of_base is None and base.__name__ == name:  # a hand-written class that bears the same name
            return True
        if of_base != family:
            continue
        if _plain_name(base.__name__) == _plain_name(name):
            return True
        if role == "router" and re.search(r"Gate$|Router$", name):
            return True
    return False


def _family_of(cls: type) -> str | None:
    """``transformers.models.deepseek_v3.modeling_deepseek_v3`` → ``deepseek_v3``; remote code by its file's name."""
    parts = cls.__module__.split(".")
    if parts[:2] == ["transformers", "models"] and len(parts) > 2:
        return parts[2]
    return parts[-1].removeprefix("modeling_") if parts[-1].startswith("modeling_") else None


def _plain_name(name: str) -> str:
    name = re.sub(r"(Yarn|DynamicNTKScaling|DynamicNTKAlpha|LinearScaling)(?=RotaryEmbedding)", "", name)
    return name.lower()


def old_path(path: str, family: str | None) -> str | None:
    """The path that a module had before transformers 5, if it moved: Mixtral's ``mlp`` was ``block_sparse_moe``."""
    if family not in ("mixtral", "phimoe"):
        return None
    moved = re.sub(r"(^|\.)(layers\.\d+)\.mlp(?=\.|$)", r"\1\2.block_sparse_moe", path)
    return moved if moved != path else None


def family_of_model(model: object) -> str | None:
    """The family that a model's class belongs to, as ``transformers.models`` spells it."""
    for base in type(model).__mro__:
        if found := _family_of(base):
            return found
    return None

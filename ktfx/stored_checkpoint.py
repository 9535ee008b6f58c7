"""A checkpoint that comes quantised, into a model: which modules it stores, stand-ins for them, and their tensors.

``plan_of`` reads names alone and pairs them with the module tree of the unquantised model; ``put_in`` sets
``StoredLinear`` and ``StoredExperts`` in the place of the modules that are stored; ``fill`` reads their tensors, a
module at a time, straight to their device. All other weights are left to transformers' own loader.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ktfx.checkpoint import EXPERT_MATRICES, EXPERT_PATHS, Checkpoint, TensorFiles
from ktfx.checkpoint_schemes import Fp8Blocks, Scheme
from ktfx.errors import WeightError
from ktfx.formats import QuantizedWeight, storage
from ktfx.ops.experts import ExpertsSpec
from ktfx.ops.experts_layout import experts_layout
from ktfx.placed_tensor import physical_of
from ktfx.quantised_checkpoints import ImportedWeight
from ktfx.stored_experts import StoredExperts
from ktfx.stored_linears import StoredLinear

_ROLE = {leaf: role for names in EXPERT_MATRICES for role, leaf in zip(("gate", "up", "down"), names, strict=True)}
_ONE_EXPERT = re.compile(r"^(.+)\.(\d+)\.(" + "|".join(_ROLE) + r")$")
_STACKED = {"gate_up_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down"}


@dataclass(frozen=True)
class StoredModule:
    """One module that the checkpoint stores quantised.

    shape: a linear layer's (out, in). spec: of experts, in the layout of the model's own module. bases: ``weight`` →
    the layer's; for experts ``gate``, ``up`` and ``down`` → one for each expert, or ``gate_up`` and
    ``down`` → one for all. kind: the class of the model's own experts module.
    """

    path: str
    bases: Mapping[str, tuple[str, ...]]
    shape: tuple[int, int] = (0, 0)
    spec: ExpertsSpec | None = None
    kind: type | None = None


@dataclass(frozen=True)
class StoredPlan:
    """modules: in the model's order. without_module: bases that no module of the model takes."""

    scheme: Scheme
    checkpoint: Checkpoint
    modules: tuple[StoredModule, ...]
    without_module: tuple[str, ...]

    def unexpected(self) -> set[str]:
        """Regular expressions of the names that transformers' loader need not wonder at."""
        prefixes = {m.path for m in self.modules}
        prefixes |= {_prefix(base) for m in self.modules for bases in m.bases.values() for base in bases[:1]}
        return {re.sub(r"\d+", r"\\d+", re.escape(prefix)) + r"[._]" for prefix in prefixes if prefix}


def _prefix(base: str) -> str:
    found = _ONE_EXPERT.match(base)
    return found[1] if found else base


# --- which modules ---------------------------------------------------------------------------------------------------


def plan_of(model: nn.Module, checkpoint: Checkpoint, scheme: Scheme) -> StoredPlan:
    """Which modules of an unquantised model (meta will do) the checkpoint stores by this scheme.

    Raises WeightError for a checkpoint that stores nothing so, for experts of which some are stored and others not, and
    for experts whose own computation ktfx cannot express.
    """
    modules = dict(model.named_modules())
    prefix = getattr(model, "base_model_prefix", "")
    linears: dict[str, StoredModule] = {}
    experts: dict[str, dict[str, dict[int, str]]] = {}
    without: list[str] = []
    marker = scheme.separator + scheme.leaves[0]
    for name in checkpoint.where:
        if not name.endswith(marker):
            continue
        base = name.removesuffix(marker)
        path = next((p for p in _paths(base, prefix) if type(modules.get(p)) is nn.Linear), None)
        if path is not None:
            layer = modules[path]
            assert isinstance(layer, nn.Linear)
            linears[path] = StoredModule(path, {"weight": (base,)}, (layer.out_features, layer.in_features))
            continue
        place = _in_experts(base, prefix, modules)
        if place is None:
            without.append(base)
        else:
            experts.setdefault(place[0], {}).setdefault(place[1], {})[place[2]] = base
    found = linears | {path: _stored_experts(path, modules[path], parts) for path, parts in experts.items()}
    if not found:
        raise WeightError(
            f"{checkpoint.directory} has a quantization_config, and no weight of the model is stored so",
            expected=f"tensors named …{marker}",
            mend="fetch the weights that belong to this config.json, or remove its quantization_config",
        )
    ordered = tuple(found[path] for path in modules if path in found)
    return StoredPlan(scheme, checkpoint, ordered, tuple(without))


def _paths(base: str, prefix: str) -> Iterator[str]:
    """What a name of the checkpoint may be called in the model."""
    for old, new in EXPERT_PATHS:
        path = base.replace(new, old) if old else base
        yield path
        if prefix:
            yield f"{prefix}.{path}"
            yield path.removeprefix(f"{prefix}.")


def _in_experts(base: str, prefix: str, modules: Mapping[str, nn.Module]) -> tuple[str, str, int] | None:
    """(path, part, expert) of a weight of routed experts; expert 0 stands for all if they are stacked."""
    one = _ONE_EXPERT.match(base)
    if one is not None:
        place, part, number = one[1], _ROLE[one[3]], int(one[2])
    else:
        place, _, leaf = base.rpartition(".")
        if leaf not in _STACKED:
            return None
        part, number = _STACKED[leaf], 0
    for path in _paths(place, prefix):
        module = modules.get(path)
        if isinstance(getattr(module, "down_proj", None), torch.Tensor):
            return path, part, number
    return None


def _stored_experts(path: str, module: nn.Module, parts: Mapping[str, Mapping[int, str]]) -> StoredModule:
    layout = experts_layout(module)
    if isinstance(layout, str):
        raise WeightError(
            f"the checkpoint stores these experts quantised, and ktfx cannot run them so: {layout}",
            module=path,
            mend="dequantise the checkpoint",
        )
    spec = layout.spec
    stacked = "gate_up" in parts
    count = 1 if stacked else spec.num_experts
    gated = ("gate_up",) if stacked else ("up",) if spec.gate == "none" else ("gate", "up")
    for part in (*gated, "down"):
        missing = [e for e in range(count) if e not in parts.get(part, {})]
        if missing:
            raise WeightError(
                f"the checkpoint stores experts of this layer quantised, but not the {part} weight of "
                f"{'any' if len(missing) == count else 'expert ' + ', '.join(map(str, missing[:5]))}",
                module=path,
                expected=f"{part} of all {spec.num_experts} experts in one format",
                mend="fetch the whole checkpoint; one that keeps some experts unquantised must be dequantised",
            )
    bases = {part: tuple(parts[part][e] for e in range(count)) for part in (*gated, "down")}
    return StoredModule(path, bases, spec=spec, kind=type(module))


# --- stand-ins -------------------------------------------------------------------------------------------------------


def put_in(model: nn.Module, plan: StoredPlan) -> None:
    """Empty stand-ins in the place of the stored modules; a linear layer's bias stays a plain parameter of its own."""
    for entry in plan.modules:
        parent, _, leaf = entry.path.rpartition(".")
        made: nn.Module
        if entry.spec is None:
            old = model.get_submodule(entry.path)
            assert isinstance(old, nn.Linear)
            made = StoredLinear(entry.shape[1], entry.shape[0])
            made.bias = old.bias
        else:
            made = StoredExperts(entry.spec, entry.kind)
        if isinstance(plan.scheme, Fp8Blocks):
            made.block_size = plan.scheme.block  # type: ignore[assignment]
        setattr(model.get_submodule(parent), leaf, made.eval())


def outline(model: nn.Module, plan: StoredPlan, dtype: torch.dtype) -> None:
    """Meta tensors for the stand-ins of a model on the meta device, of the size that the scheme lets expect."""
    scheme = plan.scheme
    for entry in plan.modules:
        module = model.get_submodule(entry.path)
        scales = torch.float16 if scheme.format.startswith("int4") else torch.float32

        def empty(*shape: int, scales: torch.dtype = scales) -> list[torch.Tensor]:
            metas = storage(scheme.format, shape, scales)
            return [torch.empty(size, dtype=kind, device="meta") for size, kind in metas]

        if isinstance(module, StoredLinear):
            module.fill(empty(*entry.shape))
        elif isinstance(module, StoredExperts):
            spec = module.spec
            E, rows = spec.num_experts, spec.up_rows
            sizes = {"gate_up_bias": rows, "down_bias": spec.hidden} if spec.has_bias else {}
            biases = {part: torch.empty(E, size, dtype=dtype, device="meta") for part, size in sizes.items()}
            module.fill(empty(E, rows, spec.hidden), empty(E, spec.hidden, spec.intermediate), biases)


# --- tensors ---------------------------------------------------------------------------------------------------------


def fill(model: nn.Module, plan: StoredPlan, places: Mapping[str, torch.device], dtype: torch.dtype) -> None:
    """Read every stored module. places: module path → its device (the CPU if not named). dtype: that of biases."""
    with TensorFiles(plan.checkpoint) as files:
        for entry in plan.modules:
            module, device = model.get_submodule(entry.path), places.get(entry.path, torch.device("cpu"))
            if isinstance(module, StoredLinear):
                if module.bias is None:
                    _expect_no_bias(files, entry.bases["weight"][0])
                weight = _read(files, plan.scheme, entry.bases["weight"][0], entry.shape)
                order = None if weight.order is None else weight.order.to(device)
                module.fill([_own(t, device) for t in weight.weight.tensors()], None, order)
            elif isinstance(module, StoredExperts):
                tensors = read_experts(files, plan.scheme, entry, dtype)
                moved = {name: _own(t, device) for name, t in tensors.items()}
                module.fill_by_name(moved)
                if module.stored_call is None:
                    raise _mixed("gate, up and down have groups of different sizes", entry.path)
                module.origin = StoredOrigin(plan.checkpoint, plan.scheme, entry, dtype).noted(module)


def _own(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, in memory of its own: what was read may be a window on the file."""
    return tensor.contiguous().to(device, copy=True)


def _read(files: TensorFiles, scheme: Scheme, base: str, shape: tuple[int, ...] | None = None) -> ImportedWeight:
    """A stored weight; errors name its file and tensor."""
    name = f"{base}{scheme.separator}{scheme.leaves[0]}"
    file = files.checkpoint.where[name].name
    lacking = [leaf for leaf in scheme.leaves[: scheme.needed] if f"{base}{scheme.separator}{leaf}" not in files]
    if lacking:
        raise WeightError(
            f"{file} holds {name}, and no file holds {scheme.separator.join((base, lacking[0]))}",
            module=base,
            expected=", ".join(scheme.leaves[: scheme.needed]),
            mend="fetch the whole checkpoint",
        )

    def get(leaf: str) -> torch.Tensor | None:
        full = f"{base}{scheme.separator}{leaf}"
        return files.read(full) if full in files else None

    try:
        found = scheme.read(get)
    except WeightError as error:
        raise WeightError(f"{file}: {error.what}", module=base, expected=error.expected, mend=error.mend) from error
    if shape is not None and tuple(found.weight.shape) != shape:
        raise WeightError(
            f"{file}: {name} is a weight {tuple(found.weight.shape)}",
            module=base,
            expected=f"{shape}, as config.json makes the model",
            mend="use the config.json that belongs to these files; only 4 bits a value are read",
        )
    return found


def _expect_no_bias(files: TensorFiles, base: str) -> None:
    """Some packages write biases of zeros for layers that have none; others would be lost."""
    name = f"{base}.bias"
    if name in files and bool(files.read(name).any()):
        raise WeightError(
            f"{files.checkpoint.where[name].name} holds {name}, and the model's layer has no bias",
            module=base,
            expected="no bias, or one of zeros",
            mend="use the config.json that belongs to these files (attention_bias and the like)",
        )


def read_experts(
    files: TensorFiles, scheme: Scheme, entry: StoredModule, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The parameters of a ``StoredExperts`` by name, and ``input_order`` where experts sort their inputs."""
    spec = entry.spec
    assert spec is not None
    rows = spec.up_rows
    if "gate_up" in entry.bases:
        shapes = {"gate_up": (spec.num_experts, rows, spec.hidden)}
        shapes["down"] = (spec.num_experts, spec.hidden, spec.intermediate)
        up, down = (_read(files, scheme, entry.bases[p][0], shapes[p]).weight.tensors() for p in ("gate_up", "down"))
        orders: list[torch.Tensor] | None = None
        if spec.interleaved:
            up = [_apart(t) for t in up]
    else:
        up, down, orders = _one_by_one(files, scheme, entry, spec)
    made = StoredExperts(spec)
    biases = _biases(files, entry, made, dtype) if spec.has_bias else {}
    names = made.parameter_names(up, down)
    found = dict(zip(names, [*up, *down], strict=True)) | biases
    return found if orders is None else found | {"input_order": torch.stack(orders)}


def _one_by_one(
    files: TensorFiles, scheme: Scheme, entry: StoredModule, spec: ExpertsSpec
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor] | None]:
    """Experts that are stored as one linear layer each."""
    gated = [p for p in ("gate", "up") if p in entry.bases]
    ups, downs, orders = [], [], []
    for e in range(spec.num_experts):
        for part in entry.bases:
            _expect_no_bias(files, entry.bases[part][e])
        down = _read(files, scheme, entry.bases["down"][e], (spec.hidden, spec.intermediate))
        parts = [_read(files, scheme, entry.bases[p][e], (spec.intermediate, spec.hidden)) for p in gated]
        # A down projection whose inputs were sorted wants the rows before it in that order.
        weights = [p.weight if down.order is None else _rows(p.weight, down.order) for p in parts]
        ups.append(_above(weights, entry.path))
        downs.append(down.weight)
        straight = torch.arange(spec.hidden)
        orders.append(torch.stack([straight if p.order is None else p.order.cpu() for p in parts]))
    sorted_inputs = any(not torch.equal(order, straight.expand_as(order)) for order in orders)
    stacked = (_stack(ups, entry.path), _stack(downs, entry.path))
    if (len(stacked[0]) == 3) != (len(stacked[1]) == 3):  # one format for both: int4zp, if any has zero points
        ups, downs = [_zero_points(w) for w in ups], [_zero_points(w) for w in downs]
        stacked = _stack(ups, entry.path), _stack(downs, entry.path)
    return *stacked, [o.int() for o in orders] if sorted_inputs else None


def _rows(weight: QuantizedWeight, order: torch.Tensor) -> QuantizedWeight:
    """The rows of a weight (N, K) in another order; formats with a scale for each row alone."""
    parts = [t[order.to(t.device)] for t in weight.tensors()]
    return QuantizedWeight(weight.format, weight.shape, parts[0], parts[1], [*parts, None][2], weight.group)


def _above(weights: list[QuantizedWeight], path: str) -> QuantizedWeight:
    """Weights (N, K) of one format, one above the other."""
    if len({w.format for w in weights}) > 1:
        weights = [_zero_points(w) for w in weights]
    _same(weights, path)
    first = weights[0]
    parts = [torch.cat(ts) for ts in zip(*(w.tensors() for w in weights), strict=True)]
    shape = (sum(w.shape[0] for w in weights), first.shape[1])
    return QuantizedWeight(first.format, shape, parts[0], parts[1], [*parts, None][2], first.group)


def _stack(weights: list[QuantizedWeight], path: str) -> list[torch.Tensor]:
    if len({w.format for w in weights}) > 1:
        weights = [_zero_points(w) for w in weights]
    _same(weights, path)
    return [torch.stack(ts) for ts in zip(*(w.tensors() for w in weights), strict=True)]


def _same(weights: list[QuantizedWeight], path: str) -> None:
    kinds = {(w.format, w.group, *(t.dtype for t in w.tensors())) for w in weights}
    if len(kinds) > 1:
        named = " and ".join(sorted(f"{format} in groups of {group}" for format, group, *_ in kinds))
        raise _mixed(named, path)


def _mixed(found: str, path: str) -> WeightError:
    return WeightError(
        f"the checkpoint stores these experts in several formats: {found}",
        module=path,
        expected="one format for all experts of a layer",
        mend="dequantise the checkpoint and let a rule quantise it (weights: int4)",
    )


def _zero_points(weight: QuantizedWeight) -> QuantizedWeight:
    """int4 as int4zp: the same numbers, with its zero points of 8 written out."""
    if weight.format != "int4" or weight.scales is None:
        return weight
    zeros = torch.full_like(weight.scales, 8, dtype=torch.uint8)
    return QuantizedWeight("int4zp", weight.shape, weight.data, weight.scales, zeros, weight.group)


def _apart(tensor: torch.Tensor) -> torch.Tensor:
    """Rows g0, u0, g1, u1, … (dimension 1) as all gates, then all ups."""
    return torch.cat([tensor[:, 0::2], tensor[:, 1::2]], dim=1)


def _biases(
    files: TensorFiles, entry: StoredModule, made: StoredExperts, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    assert entry.spec is not None
    found = {}
    for part, name in (("gate_up", f"{made.up_name}_bias"), ("down", "down_proj_bias")):
        base = f"{entry.bases[part][0]}_bias"
        if base not in files:
            raise WeightError(f"no file holds {base}", module=entry.path, mend="fetch the whole checkpoint")
        bias = files.read(base).to(dtype)
        found[name] = _apart(bias) if part == "gate_up" and entry.spec.interleaved else bias
    return found


@dataclass(frozen=True)
class StoredOrigin:
    """Where a ``StoredExperts`` got its tensors, so that they can be read again once their memory was given back.

    stamps: parameter name → (address, write counter) after they were read.
    """

    checkpoint: Checkpoint
    scheme: Scheme
    entry: StoredModule
    dtype: torch.dtype
    stamps: dict[str, tuple[int, int]] = field(default_factory=dict)

    def noted(self, module: nn.Module) -> StoredOrigin:
        self.stamps.update({name: _stamp(p) for name, p in module.named_parameters(recurse=False)})
        return self

    def unchanged(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a parameter is still what was read."""
        return self.stamps.get(name) == _stamp(tensor)

    def read(self) -> dict[str, torch.Tensor]:
        """All parameters of the module, from the files again."""
        with TensorFiles(self.checkpoint) as files:
            return read_experts(files, self.scheme, self.entry, self.dtype)


@dataclass(frozen=True)
class StoredReader:
    """One parameter of a ``StoredExperts`` in its checkpoint; read like an ``ExpertsReader``.

    Reading one expert reads the layer.
    """

    origin: StoredOrigin
    name: str
    shape: tuple[int, ...]

    def read(self, experts: range) -> torch.Tensor:
        """(len(experts), …), bit for bit."""
        return self.origin.read()[self.name][experts.start : experts.stop]

    def matches(self, tensor: torch.Tensor) -> bool:
        """Whether the parameter was left alone since it was read."""
        return self.origin.unchanged(self.name, tensor)


def _stamp(tensor: torch.Tensor) -> tuple[int, int]:
    physical = physical_of(tensor)
    return physical.data_ptr(), physical._version

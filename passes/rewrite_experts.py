"""rewrite_experts: the region of an experts module → one ``ktfx::routed_experts`` call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ktfx.errors import PlacementError
from ktfx.experts_requests import kernel_of, read_parameters, request_for, requested_spec
from ktfx.graph import GraphInput, fake_mode_of, info, insert_call, insert_placeholder, op_name, placeholders
from ktfx.ops.experts import ExpertsSpec, experts_kernel
from ktfx.ops.experts_layout import ExpertsLayout, experts_layout
from ktfx.pass_manager import Pass, PassContext, Rewrite, register_pass
from ktfx.resolve import ModulePlacement
from ktfx.weights import PackedWeight

routed_experts = torch.ops.ktfx.routed_experts.default


@dataclass(frozen=True)
class Region:
    """The nodes of one experts module and the values that cross its border."""

    nodes: list[fx.Node]
    x: fx.Node
    ids: fx.Node
    weights: fx.Node
    result: fx.Node


@register_pass
class RewriteExperts(Pass):
    """Found by the experts module's path, whatever its own forward looks like; ``experts.aten`` leaves the nodes alone.

    A kernel that cannot take the module's layout is an error if a rule names the module, unless the rule says
    ``fallback: aten``; a rule by role or class falls back with a warning.
    """

    name = "rewrite_experts"

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        regions: dict[str, list[fx.Node]] = {}
        wanted = {
            path: placement
            for path, placement in context.resolution.placements.items()
            if placement.role == "experts" and kernel_of(placement, context.phase) is not None
        }
        for node in gm.graph.nodes:
            if node.op != "call_function":
                continue
            path = _enclosing(info(node).module, wanted)
            if path is not None:
                regions.setdefault(path, []).append(node)
        for path, nodes in regions.items():
            self._rewrite(gm, context, path, wanted[path], nodes)
        gm.graph.eliminate_dead_code()
        gm.recompile()

    def _rewrite(
        self, gm: fx.GraphModule, context: PassContext, path: str, placement: ModulePlacement, nodes: list[fx.Node]
    ) -> None:
        kernel_name = kernel_of(placement, context.phase)
        assert kernel_name is not None
        module = context.captured.model.get_submodule(path)
        layout = experts_layout(module)
        if isinstance(layout, str):
            return self._cannot(context, placement, layout)
        kernel = experts_kernel(kernel_name)
        spec = requested_spec(layout, placement, context.phase)
        device = context.devices[placement.at(context.phase).device]
        reason = kernel.unsupported(spec, layout.dtype, device)
        if reason is not None:
            return self._cannot(context, placement, f"experts.{kernel_name} cannot take it: {reason}")
        region = find_region(nodes, spec, context)
        if isinstance(region, str):
            return self._cannot(context, placement, region)
        if not context.allows(f"rewrite_experts → experts.{kernel_name}", path):
            return None
        self._replace(gm, context, path, placement, kernel_name, spec, layout, region)
        return None

    @staticmethod
    def _cannot(context: PassContext, placement: ModulePlacement, reason: str) -> None:
        rule = placement.rule
        fallback = rule is None or rule.generic or rule.replace.fallback == "aten"
        op = placement.at(context.phase).op
        if not fallback:
            assert rule is not None
            raise PlacementError(
                f"{op} cannot run this module: {reason}",
                origin=rule.origin,
                rule=rule.label,
                module=placement.module,
                mend="name another op, or add `fallback: aten` to the rule to run the model's own operations there",
            )
        context.warn(f"{placement.module}: {op} → experts.aten on {placement.at(context.phase).device} ({reason})")
        context.miss(placement.module, reason, rule.label if rule else None)

    @staticmethod
    def _replace(
        gm: fx.GraphModule,
        context: PassContext,
        path: str,
        placement: ModulePlacement,
        kernel_name: str,
        spec: ExpertsSpec,
        layout: ExpertsLayout,
        region: Region,
    ) -> None:
        graph = gm.graph
        packed = _parameters(graph, context, path, kernel_name, spec, layout)
        if packed is None:
            packed = _packed(graph, context, path, kernel_name, spec, layout)
        before = tuple(op_name(n) for n in region.nodes)
        names_before = tuple(n.name for n in region.nodes)
        like = region.result
        with graph.inserting_before(region.result):
            x = region.x
            shape = x.meta["val"].shape
            if len(shape) != 2:
                x = insert_call(graph, torch.ops.aten.reshape.default, (x, [-1, spec.hidden]), like=like, module=path)
            call = insert_call(
                graph,
                routed_experts,
                (x, region.ids, region.weights, packed, kernel_name, spec.encode()),
                like=like,
                name=f"{path.replace('.', '_')}",
                module=path,
            )
            out = call
            if len(shape) != 2:
                sizes = _size_nodes(graph, region.x, like)
                out = insert_call(graph, torch.ops.aten.reshape.default, (call, sizes), like=like, module=path)
        region.result.replace_all_uses_with(out)
        context.record(
            Rewrite(
                what=f"{placement.cls} → experts.{kernel_name} ({spec.weights})",
                module=path,
                rule=placement.rule.label if placement.rule else None,
                origin=placement.rule.origin if placement.rule else None,
                before=before,
                after=("ktfx.routed_experts.default",),
                nodes_before=names_before,
                nodes_after=(call.name,),
            )
        )


def _parameters(
    graph: fx.Graph, context: PassContext, path: str, kernel: str, spec: ExpertsSpec, layout: ExpertsLayout
) -> list[fx.Node] | None:
    """The placeholders of the model's own tensors where the kernel reads them as they are."""
    names = read_parameters(context.captured.model.get_submodule(path), layout, kernel, spec)
    if names is None:
        return None
    by_name = {context.captured.inputs[n.name].name: n for n in placeholders(graph)}
    found = [by_name.get(f"{path}.{name}") for name in names]
    return [n for n in found if n is not None] if None not in found else None


def _packed(
    graph: fx.Graph, context: PassContext, path: str, kernel: str, spec: ExpertsSpec, layout: ExpertsLayout
) -> list[fx.Node]:
    """New placeholders, one for each tensor that the kernel packs."""
    request = request_for(path, layout, kernel, spec)
    mode = fake_mode_of(graph)
    assert mode is not None
    packed = []
    for index, meta in enumerate(experts_kernel(kernel).packed_meta(spec, layout.dtype)):
        with mode:
            val = torch.empty(meta.shape, dtype=meta.dtype, device=context.captured.logical)
        node = insert_placeholder(graph, f"{path.replace('.', '_')}_packed_{index}", val)
        context.packed[node.name] = PackedWeight(request, index)
        context.captured.inputs[node.name] = GraphInput("packed", f"{path}[{index}]", -1)
        packed.append(node)
    return packed


def _size_nodes(graph: fx.Graph, x: fx.Node, like: fx.Node) -> list[object]:
    sizes: list[object] = []
    for dim, size in enumerate(x.meta["val"].shape):
        if isinstance(size, int):
            sizes.append(size)
        else:
            sizes.append(insert_call(graph, torch.ops.aten.sym_size.int, (x, dim), like=like))
    return sizes


def _enclosing(module: str, wanted: dict[str, ModulePlacement]) -> str | None:
    while module:
        if module in wanted:
            return module
        module = module.rpartition(".")[0]
    return None


def find_region(nodes: list[fx.Node], spec: ExpertsSpec, context: PassContext) -> Region | str:
    """The region's inputs and output by their shapes, or in words why they cannot be told."""
    inside = set(nodes)
    outside: list[fx.Node] = []
    for node in nodes:
        for argument in node.all_input_nodes:
            if argument not in inside and argument not in outside:
                outside.append(argument)
    tensors = [
        n
        for n in outside
        if isinstance(n.meta.get("val"), torch.Tensor)
        and context.captured.inputs.get(n.name, GraphInput("input", "", 0)).kind
        not in ("parameter", "buffer", "constant")
    ]
    ids = [n for n in tensors if not n.meta["val"].dtype.is_floating_point and n.meta["val"].dim() == 2]
    if len(ids) != 1:
        return f"its region reads {len(ids)} integer (tokens, chosen) tensors, not one"
    chosen = ids[0].meta["val"].shape[-1]
    floats = [n for n in tensors if n.meta["val"].dtype.is_floating_point]
    weights = [n for n in floats if n.meta["val"].dim() == 2 and n.meta["val"].shape == ids[0].meta["val"].shape]
    x = [n for n in floats if n.meta["val"].shape[-1] == spec.hidden and n not in weights]
    if len(weights) != 1 or len(x) != 1:
        return (
            f"its region reads {len(x)} tensors of width {spec.hidden} and {len(weights)} routing weights of width "
            f"{chosen}, not one of each"
        )
    results = [n for n in nodes if any(u not in inside for u in n.users)]
    results = [n for n in results if isinstance(n.meta.get("val"), torch.Tensor)]
    if len(results) != 1:
        return f"{len(results)} of its values are read outside it, not one"
    if results[0].meta["val"].shape != x[0].meta["val"].shape:
        return f"its result is {tuple(results[0].meta['val'].shape)}, not the input's {tuple(x[0].meta['val'].shape)}"
    return Region(nodes, x[0], ids[0], weights[0], results[0])

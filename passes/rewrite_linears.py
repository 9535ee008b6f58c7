"""rewrite_linears: the matrix product of a linear layer → one ``ktfx::linear_quant`` call over its weight's format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ktfx.errors import PlacementError
from ktfx.graph import GraphInput, fake_mode_of, info, insert_call, insert_placeholder, op_name, refresh_values
from ktfx.linear_rules import LinearChoice, linear_choice, read_as_they_are, why_not
from ktfx.ops import stored_linear as stored_linear  # registers the op that _STORED names
from ktfx.ops.linear import linear_kernel
from ktfx.pass_manager import Pass, PassContext, Rewrite, register_pass
from ktfx.resolve import ModulePlacement
from ktfx.stored_weights import SCALES, ZEROS
from ktfx.weight_requests import LINEAR, LinearRequest
from ktfx.weights import PackedWeight

aten = torch.ops.aten
linear_quant = torch.ops.ktfx.linear_quant.default

_STORED = torch.ops.ktfx.stored_linear.default
_PRODUCTS = (aten.mm.default, aten.matmul.default)
_TRANSPOSES = (aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default)


@dataclass(frozen=True)
class Product:
    """x·Wᵀ (+ bias) as the graph has it.

    node: the call that gives the result. reader: the call that reads the weight: ``node``, or a transpose before it.
    weight: the parameter's placeholder, (N, K). bias: (N,) or None. stored: of a weight that is stored quantised the
    scales and, where it has them, the zero points; ``weight`` is then the values.
    """

    node: fx.Node
    reader: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    stored: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """A layer that a rule gives a kernel. parameter: its weight."""

    path: str
    placement: ModulePlacement
    choice: LinearChoice
    module: nn.Module

    @property
    def parameter(self) -> torch.Tensor:
        return self.module.get_parameter("weight")


@register_pass
class RewriteLinears(Pass):
    """Found by the layer's path and weight: ``aten.linear``, or ``mm``, ``matmul``, ``addmm`` over its transpose.

    ``linear.aten`` without a format leaves the nodes alone. A kernel that cannot take the layer is an error if a rule
    names the module, unless the rule says ``fallback: aten``; a rule by role or class falls back with a warning.
    """

    name = "rewrite_linears"

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        wanted = _wanted(context)
        if not wanted:
            return
        products = _products(gm.graph, context)
        packed: dict[tuple[LinearRequest, str], list[fx.Node]] = {}
        done: list[tuple[Product, fx.Node]] = []
        for layer in wanted:
            for product in self._to_rewrite(gm.graph, context, layer, products):
                if context.allows(f"rewrite_linears → {layer.choice.op}", layer.path):
                    done.append((product, _replace(gm.graph, context, layer, product, packed)))
        gm.graph.eliminate_dead_code()
        gm.recompile()
        _note_other_readers(context, done)

    def _to_rewrite(
        self, graph: fx.Graph, context: PassContext, layer: Wanted, products: list[Product]
    ) -> list[Product]:
        """The layer's products in this graph; where it cannot be rewritten none, with a note, warning or error."""
        label = layer.placement.rule.label if layer.placement.rule else None
        own = [p for p in products if _belongs(p, layer, context)]
        if not own:
            reading = [n for w in _weights(graph, context, layer.parameter) for n in w.users]
            here = sorted({op_name(n) for n in reading if info(n).module == layer.path})
            if here:
                self._cannot(context, layer, f"its weight is read by {', '.join(here)}, not by a linear product")
            else:  # a layer that a graph does not run is no fault of the rule's
                context.miss(layer.path, f"{layer.choice.op}: this graph does not run it", label)
            return []
        device = layer.placement.at(context.phase).device
        declared = context.resolution.ruleset.devices
        reason = why_not(layer.choice, device, context.devices[device], declared)
        if reason is not None:
            self._cannot(context, layer, reason)
            return []
        return own

    @staticmethod
    def _cannot(context: PassContext, layer: Wanted, reason: str) -> None:
        rule, choice = layer.placement.rule, layer.choice
        assert rule is not None
        if not (rule.generic or rule.replace.fallback == "aten"):
            raise PlacementError(
                f"{choice.op} ({choice.spec.weights}) cannot run this layer: {reason}",
                origin=rule.origin,
                rule=rule.label,
                module=layer.path,
                mend="name another op, or add `fallback: aten` to the rule to run the model's own operation there",
            )
        device = layer.placement.at(context.phase).device
        context.warn(f"{layer.path}: {choice.op} ({choice.spec.weights}) → linear.aten on {device} ({reason})")
        context.miss(layer.path, reason, rule.label)


def _wanted(context: PassContext) -> list[Wanted]:
    found = []
    for path, placement in context.resolution.placements.items():
        if placement.rule is None or placement.at(context.phase).op is None:
            continue
        module = context.captured.model.get_submodule(path)
        choice = linear_choice(module, placement, context.phase)
        if choice is not None:
            found.append(Wanted(path, placement, choice, module))
    return found


def _products(graph: fx.Graph, context: PassContext) -> list[Product]:
    """Every product over a parameter's rows, in the graph's order."""
    found = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        product = _product(node)
        if product is not None and _is_parameter(product.weight, context):
            found.append(product)
    return found


def _product(node: fx.Node) -> Product | None:
    args: list[Any] = list(node.args)
    if node.target is aten.linear.default:
        bias = args[2] if len(args) > 2 else node.kwargs.get("bias")
        return _checked(node, node, args[0], args[1], bias)
    if node.target is _STORED:
        x, weight, scales, zeros, bias = args[:5]
        return _checked(node, node, x, weight, bias, tuple(n for n in (scales, zeros) if n is not None))
    bias = None
    if node.target is aten.addmm.default:
        if any(node.kwargs.get(scale, 1) != 1 for scale in ("alpha", "beta")):
            return None
        bias, args = args[0], args[1:]
    elif node.target not in _PRODUCTS:
        return None
    turned = args[1]
    if not isinstance(turned, fx.Node) or turned.target not in _TRANSPOSES or not _turns(turned):
        return None
    return _checked(node, turned, args[0], turned.args[0], bias)


def _checked(
    node: fx.Node, reader: fx.Node, x: Any, weight: Any, bias: Any, stored: tuple[Any, ...] = ()
) -> Product | None:
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or weight.op != "placeholder":
        return None
    if weight.meta["val"].dim() != 2 or (bias is not None and bias.meta["val"].dim() != 1):
        return None
    return Product(node, reader, x, weight, bias, stored)


def _turns(node: fx.Node) -> bool:
    """Whether a transpose swaps the two dimensions of a matrix."""
    if node.target is aten.transpose.int:
        dims: Any = node.args[1:]
        return {int(d) % 2 for d in dims} == {0, 1}
    if node.target is aten.permute.default:
        dims = node.args[1]
        return [int(d) % 2 for d in dims] == [1, 0]
    return True


def _is_parameter(node: fx.Node, context: PassContext) -> bool:
    entry = context.captured.inputs.get(node.name)
    return entry is not None and entry.kind == "parameter" and not entry.mutated


def _parameter_of(node: fx.Node, context: PassContext) -> torch.Tensor:
    path, _, leaf = context.captured.inputs[node.name].name.rpartition(".")
    found = getattr(context.captured.model.get_submodule(path), leaf)
    assert isinstance(found, torch.Tensor)
    return found


def _weights(graph: fx.Graph, context: PassContext, parameter: torch.Tensor) -> list[fx.Node]:
    """The placeholders that stand for a parameter."""
    nodes = graph.find_nodes(op="placeholder")
    return [n for n in nodes if _is_parameter(n, context) and _parameter_of(n, context) is parameter]


def _belongs(product: Product, layer: Wanted, context: PassContext) -> bool:
    """Whether a product is the layer's: made by it, or by a function that was handed its weight.

    Tied weights have one placeholder, under the name of either module; then the module that made the product decides.
    """
    if _parameter_of(product.weight, context) is not layer.parameter:
        return False
    module = info(product.node).module
    if module == layer.path:
        return True
    maker = context.captured.model.get_submodule(module)
    return getattr(maker, "weight", None) is not layer.parameter


def _replace(
    graph: fx.Graph,
    context: PassContext,
    layer: Wanted,
    product: Product,
    packed: dict[tuple[LinearRequest, str], list[fx.Node]],
) -> fx.Node:
    """Put the call in the product's place; returns the first node that it reads its weight from."""
    choice, like = layer.choice, product.node
    if read_as_they_are(choice, layer.module) is not None:
        weights = [product.weight, *product.stored]
    else:
        weights = _packed(graph, context, layer, product, packed)
    with graph.inserting_before(like):
        arguments = (product.x, weights, product.bias, choice.kernel, choice.spec.encode())
        name = layer.path.replace(".", "_")
        call = insert_call(graph, linear_quant, arguments, like=like, name=name, module=layer.path)
    like.replace_all_uses_with(call)
    if [str(s) for s in call.meta["val"].stride()] != [str(s) for s in like.meta["val"].stride()]:
        refresh_values([call])
    rule = layer.placement.rule
    context.record(
        Rewrite(
            what=f"{layer.placement.cls} → {choice.op} ({choice.spec.weights})",
            module=layer.path,
            rule=rule.label if rule else None,
            origin=rule.origin if rule else None,
            before=tuple(op_name(n) for n in dict.fromkeys((product.reader, like))),
            after=(op_name(call),),
            nodes_before=tuple(n.name for n in dict.fromkeys((product.reader, like))),
            nodes_after=(call.name,),
        )
    )
    return weights[0]


def _packed(
    graph: fx.Graph,
    context: PassContext,
    layer: Wanted,
    product: Product,
    packed: dict[tuple[LinearRequest, str], list[fx.Node]],
) -> list[fx.Node]:
    """Graph inputs for the weight in the kernel's layout, made once a request and device."""
    choice, device = layer.choice, layer.placement.at(context.phase).device
    nodes = zip(("weight", SCALES, ZEROS), (product.weight, *product.stored), strict=False)
    parts = tuple((part, context.captured.inputs[n.name].name) for part, n in nodes)
    request = LinearRequest(f"{LINEAR}{choice.kernel}", choice.spec, parts)
    if (request, device) in packed:
        return packed[request, device]
    mode = fake_mode_of(graph)
    assert mode is not None
    made = []
    for index, meta in enumerate(linear_kernel(choice.kernel).packed_meta(choice.spec, choice.dtype)):
        with mode:
            val = torch.empty(meta.shape, dtype=meta.dtype, device=context.captured.logical)
        node = insert_placeholder(graph, f"{layer.path.replace('.', '_')}_packed_{index}", val)
        context.packed[node.name] = PackedWeight(request, index)
        context.captured.inputs[node.name] = GraphInput("packed", f"{layer.path}[{index}]", -1, home=device)
        made.append(node)
    packed[request, device] = made
    return made


def _note_other_readers(context: PassContext, done: list[tuple[Product, fx.Node]]) -> None:
    """A weight that something else reads too (a tied embedding) stays in the model's format for that reader."""
    for product, held in done:
        if held is product.weight or not product.weight.users:
            continue
        context.shared[product.reader.name] = (product.weight.name, held.name)
        users = sorted({f"{op_name(n)} of {info(n).module or 'the model'}" for n in product.weight.users})
        note = f"its weight is also read by {', '.join(users)}, which keeps it in the model's format"
        context.miss(info(product.node).module, note)

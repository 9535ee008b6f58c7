"""Dynamo graph → normal form: functional pre-dispatch ATen with the module path on every node.

Every input is one placeholder described by a ``GraphInput``; every mutation of an input is an output, named in
``Captured.writes``, so that dead code may be removed and nodes may be moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._functorch.aot_autograd import aot_export_module

from ktfx.dynamo_access import current_frame, live_module, source_name, weight_source
from ktfx.errors import CaptureError
from ktfx.graph import INFO, GraphInput, NodeInfo, insert_placeholder, output_node, placeholders
from ktfx.graph_breaks import refuse_piece_of_layer
from ktfx.placed_tensor import PlacedTensor
from ktfx.roles import layer_of

QUERY_NAMES = ("input_ids", "inputs_embeds", "decoder_input_ids", "tokens", "idx", "hidden_states")


@dataclass
class Captured:
    """A graph in normal form and what is known about its ends.

    gm: outputs are first the new values of mutated inputs (``writes``), then the user's outputs.
    inputs: placeholder name → what it is.
    writes: (output position, placeholder name) of each mutated input.
    model: the module Dynamo started from, or the model it belongs to; ``prefix`` is its path in that model.
    phase: ``generate`` if the graph holds one query token, else ``prefill``; ``phase_reason`` says what was read.
    logical: the device that inputs come from and outputs go back to.
    constants: placeholder name → tensor, for tensors that the model's code makes from literals.
    """

    gm: fx.GraphModule
    inputs: dict[str, GraphInput]
    writes: list[tuple[int, str]]
    model: nn.Module
    prefix: str
    phase: str
    phase_reason: str
    logical: torch.device
    num_outputs: int
    constants: dict[str, torch.Tensor] = field(default_factory=dict)


def capture(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    model: nn.Module | None = None,
    query_input: str | None = None,
) -> Captured:
    """Turn what Dynamo hands over into the normal form.

    model: the model, where the caller knows it (``ktfx.compile``); otherwise it is found through the traced frame.
    query_input: the input whose second dimension is the query length, by a part of its source name.
    Raises CaptureError for grad enabled, training mode, a graph break inside a layer, mixed devices, accelerate hooks.
    """
    if torch.is_grad_enabled():
        raise CaptureError(
            "the model was traced with gradients enabled; ktfx compiles inference only",
            mend="call it under torch.no_grad() or torch.inference_mode() (generate() does so itself)",
        )
    nodes = placeholders(gm.graph)
    root, prefix = _find_model(gm, nodes, model)
    _check_model(root)
    fakes = [_plain_fake(n.meta.get("example_value", v)) for n, v in zip(nodes, example_inputs, strict=True)]
    exported, signature = aot_export_module(gm, fakes, trace_joint=False, pre_dispatch=True, decompositions={})
    assert isinstance(exported, fx.GraphModule)

    inputs = _describe_inputs(exported, nodes, prefix, signature)
    constants = _lift_constants(exported, inputs)
    _annotate(exported.graph, prefix, root)
    _drop_checks(exported.graph)
    phase, reason = _phase(exported.graph, inputs, query_input)
    by_old_name = {n.name: n for n in placeholders(exported.graph)}
    _name_inputs(exported.graph, inputs)
    writes = [(position, by_old_name[old].name) for position, old in _writes(exported.graph, signature)]
    exported.graph.lint()
    exported.recompile()
    return Captured(
        gm=exported,
        inputs={n.name: inputs[n] for n in placeholders(exported.graph)},
        writes=writes,
        model=root,
        prefix=prefix,
        phase=phase,
        phase_reason=reason,
        logical=_logical_device(fakes),
        constants={n.name: t for n, t in constants.items()},
        num_outputs=len(output_node(exported.graph).args[0]) - len(writes),  # type: ignore[arg-type]
    )


def _find_model(gm: fx.GraphModule, nodes: list[fx.Node], model: nn.Module | None) -> tuple[nn.Module, str]:
    """The model and the path in it of the module whose forward was traced."""
    frame = current_frame()
    roots: dict[str, int] = {}
    for node in nodes:
        source = weight_source(source_name(node))
        if source is not None:
            roots[source.root] = roots.get(source.root, 0) + 1
    if not roots:
        if model is not None:
            return model, ""
        raise CaptureError(
            "the traced graph uses no parameter of any module",
            expected="a graph of a model's forward",
            mend="compile the model, not a function that gets its weights as arguments; if a graph break cut the model "
            "into pieces, TORCH_LOGS=graph_breaks shows where",
        )
    traced = live_module(frame, max(roots, key=lambda r: roots[r]))
    if model is None or model is traced:
        return traced, ""
    for path, module in model.named_modules():
        if module is traced:
            refuse_piece_of_layer(model, path, frame.code_name if frame else "")
            return model, path
    return traced, ""


def _check_model(model: nn.Module) -> None:
    if model.training:
        raise CaptureError(
            "the model is in training mode; ktfx compiles inference only", mend="call model.eval() first"
        )
    for path, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise CaptureError(
                f"accelerate's hooks are on the model (device_map); they move tensors behind the compiler's back: "
                f"{type(module._hf_hook).__name__}",
                module=path,
                mend="load without device_map, or call accelerate.hooks.remove_hook_from_module(model, recurse=True); "
                "ktfx.from_pretrained(path, rules=…) places weights itself",
            )


def _plain_fake(value: Any) -> Any:
    """A placed tensor's fake as a plain fake on the logical device: ``aot_export_module`` refuses subclasses."""
    if isinstance(value, PlacedTensor):
        inner = value.stand_in()
        mode = inner.fake_mode if isinstance(inner, torch._subclasses.FakeTensor) else None
        if mode is None:
            return value
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return value


def _logical_device(fakes: Sequence[Any]) -> torch.device:
    devices = {v.device for v in fakes if isinstance(v, torch.Tensor)}
    if len(devices) > 1:
        raise CaptureError(
            f"the model's tensors and inputs lie on several devices: {', '.join(sorted(map(str, devices)))}",
            expected="everything on one logical device; the rules move it from there",
            mend="put the model and its inputs on one device (usually cpu), e.g. model.to('cpu')",
        )
    return devices.pop() if devices else torch.device("cpu")


def _describe_inputs(
    gm: fx.GraphModule, dynamo_nodes: list[fx.Node], prefix: str, signature: Any
) -> dict[fx.Node, GraphInput]:
    mutated = set(signature.user_inputs_to_mutate.values())
    result: dict[fx.Node, GraphInput] = {}
    for index, (node, original) in enumerate(zip(placeholders(gm.graph), dynamo_nodes, strict=True)):
        source = source_name(original)
        weight = weight_source(source)
        value = original.meta.get("example_value")
        if isinstance(node.meta.get("val"), (torch.SymInt, int)):
            kind, name = "symint", source or original.name
        elif weight is not None:
            kind, name = weight.kind, f"{prefix}.{weight.name}" if prefix else weight.name
        else:
            kind, name = "input", source or original.name
        home = value.device_name if isinstance(value, PlacedTensor) else None
        result[node] = GraphInput(kind, name, index, mutated=node.name in mutated, home=home)
    return result


def _lift_constants(gm: fx.GraphModule, inputs: dict[fx.Node, GraphInput]) -> dict[fx.Node, torch.Tensor]:
    """Tensors made from literals (``torch.tensor([-1])``) are attributes of the export; they become inputs."""
    constants: dict[fx.Node, torch.Tensor] = {}
    by_target: dict[str, fx.Node] = {}
    for node in list(gm.graph.nodes):
        if node.op != "get_attr":
            continue
        target = str(node.target)
        if target not in by_target:
            value = getattr(gm, target)
            placed = by_target[target] = insert_placeholder(gm.graph, target, node.meta["val"])
            inputs[placed] = GraphInput("constant", target, -1)
            constants[placed] = value
        node.replace_all_uses_with(by_target[target])
        gm.graph.erase_node(node)
    return constants


def _annotate(graph: fx.Graph, prefix: str, root: nn.Module) -> None:
    """Give every node its ``NodeInfo``: the innermost module of its stack, relative to the model."""
    last = NodeInfo(module=prefix)
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            path, cls = list(stack.values())[-1]
            module = _relative(path, prefix)
            last = NodeInfo(module=module, cls=getattr(cls, "__name__", str(cls)), layer=layer_of(module))
            node.meta[INFO] = last
        elif node.op == "call_function" and node.target is torch.ops.aten.alias.default:
            # Export adds these, without a stack; they belong where their input does.
            producer = next((a for a in node.all_input_nodes if a.op == "call_function"), None)
            node.meta[INFO] = producer.meta[INFO] if producer is not None else last
        else:
            node.meta[INFO] = NodeInfo(module=prefix)  # the traced module's own forward has no stack either


def _relative(path: str, prefix: str) -> str:
    """``L['self'].model.layers.1`` → ``model.layers.1``; with a prefix, that is put before it."""
    for closing in ("'].", "]."):
        if closing in path:
            head, _, rest = path.partition(closing)
            if head.startswith(("L[", "G[")):
                path = rest
                break
    else:
        if path.startswith(("L[", "G[")):
            path = ""
    path = path.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "")
    path = path.replace("._modules.", ".").replace("_modules.", "").strip(".")
    return ".".join(p for p in (prefix, path) if p)


def _drop_checks(graph: fx.Graph) -> None:
    """Export's metadata assertions name the logical device: they would fail wherever a node moves."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)


def _writes(graph: fx.Graph, signature: Any) -> list[tuple[int, str]]:
    by_output = signature.user_inputs_to_mutate
    outputs = output_node(graph).args[0]
    return [
        (position, by_output[node.name])
        for position, node in enumerate(outputs)  # type: ignore[arg-type]
        if position < len(by_output) and isinstance(node, fx.Node) and node.name in by_output
    ]


def _phase(graph: fx.Graph, inputs: dict[fx.Node, GraphInput], query_input: str | None) -> tuple[str, str]:
    """``generate`` if one query token enters the graph: a fact of the trace, since Dynamo specialises a length of 1."""
    named = [(n, i) for n, i in inputs.items() if i.kind == "input" and isinstance(n.meta.get("val"), torch.Tensor)]
    wanted = (query_input,) if query_input else QUERY_NAMES
    for want in wanted:
        for node, entry in named:
            if want in entry.name and node.meta["val"].dim() >= 2:
                return _phase_of(node, entry)
    if query_input:
        raise CaptureError(
            f"no input named like {query_input!r} enters the graph",
            expected="one of " + ", ".join(i.name for _, i in named),
            mend="name one of these in options={'query_input': …}",
        )
    for node, entry in named:
        val = node.meta["val"]
        if val.dim() == 2 and not val.dtype.is_floating_point and not entry.mutated:
            return _phase_of(node, entry)
    return "prefill", "no token ids or embeddings among the inputs"


def _phase_of(node: fx.Node, entry: GraphInput) -> tuple[str, str]:
    length = node.meta["val"].shape[1]
    if isinstance(length, int) and length == 1:
        return "generate", f"{entry.name} holds one token"
    return "prefill", f"{entry.name} holds {length} tokens"


def _name_inputs(graph: fx.Graph, inputs: dict[fx.Node, GraphInput]) -> None:
    """Readable placeholder names; every dump and message shows them."""
    for node in placeholders(graph):
        entry = inputs[node]
        text = entry.name.replace("L['self']", "").replace("['", "_").replace("']", "")
        clean = "".join(c if c.isalnum() else "_" for c in text).strip("_")
        new_name = graph._graph_namespace.create_name(clean or "input", None)
        _rename(node, new_name)


def _rename(node: fx.Node, name: str) -> None:
    node._rename(name)
    node.target = node.name

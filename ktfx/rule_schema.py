"""Every key a rule file may have, by section, with its meaning: for the parser, and for the reference in docs/."""

from __future__ import annotations

SCHEMA: dict[str, dict[str, str]] = {
    "file": {
        "ktfx": "The version of the format: 1. A bare list instead of a mapping is read as a KTransformers file.",
        "devices": "Names of your own → real devices (cpu, cuda:N). Names decide partitions and transfers, so several "
        "names may stand for one device.",
        "default_device": "Where modules go that nothing else places. Default: the first of `devices`, else cpu.",
        "layers": "Ranges of decoder layers, counted from 0, both ends included → device: {0-29: gpu0, 30-59: gpu1}. "
        "A list of devices splits the layers evenly: [gpu0, gpu1].",
        "passes": "The graph passes to run, in order: a name, or a name with its options. Default: the whole pipeline.",
        "rules": "The rules. For each module the first that matches applies; nothing is merged.",
    },
    "rule": {
        "match": "What the rule applies to. All keys given must hold.",
        "replace": "What happens to it.",
        "recursive": "true (default) or false: with false, no rule and no range applies inside a matched module; what "
        "lies inside follows it.",
    },
    "match": {
        "name": "A Python regular expression, searched in the dotted module path (anchor it with ^ and $).",
        "class": "A dotted class path or a bare class name; subclasses match too.",
        "module": "A role: layer, moe, experts, router, shared_experts, attention, mlp, norm, embedding, head, rope, "
        "linear. Works for any model.",
        "layers": "Decoder layers: 7, 0-29, '0-3,7', or a list of these.",
        "pattern": "A subgraph, as an expression over operators: aten.mul(aten.silu(gate), up). Bare names capture.",
        "where": "Further conditions.",
    },
    "where": {
        "dtype": "The dtype of the module's weights, or of the pattern's values: bfloat16, float32, …",
        "device": "The device the module has without the rule: a name, or cuda for any GPU.",
        "phase": "prefill or generate. In pattern rules only; for modules write it under `replace`.",
        "shapes": "Parameter or capture → its sizes, `any` for any size: {gate_up_proj: [8, any, any]}.",
    },
    "replace": {
        "op": "The implementation: experts.cpu, linear.triton, aten, … Its family must fit the module.",
        "device": "The device. Default: the one the module has without the rule; for ops of the host, the host.",
        "weights": "The storage format: model, int8, int4, int4zp, fp8, mxfp4, with a group as in int4-g128. Without "
        "an `op`, experts and linear layers run by the kernel of their device.",
        "group_size": "The group of the weight format, if not its default.",
        "out_device": "Where the module's output goes. Default: where it is read.",
        "prefill": "op, device, weights and group_size for prefill alone.",
        "generate": "op, device, weights and group_size for generation alone.",
        "fallback": "aten: if the op cannot take the module, run the model's own arithmetic instead, with a warning. "
        "Rules without `name` do so anyway for layouts the op cannot take.",
        "activations": "What a kernel may turn activations into: model, bf16 or int8 (the host's 4-bit kernels).",
        "with": "The expression that replaces a `pattern`; it may use the pattern's captures.",
        "class": "As in KTransformers files: an operator class, or default.",
        "kwargs": "As in KTransformers files: generate_device, generate_op, …",
    },
    "phase": {
        "op": "As in `replace`.",
        "device": "As in `replace`.",
        "weights": "As in `replace`.",
        "group_size": "As in `replace`.",
    },
}
"""section → key → meaning."""

KT_SCHEMA: dict[str, dict[str, str]] = {
    "match": {key: SCHEMA["match"][key] for key in ("name", "class")},
    "replace": {
        "class": "The operator class; default (the default) keeps the module and places it.",
        "kwargs": "The arguments of the operator.",
    },
    "kwargs": {
        "generate_device": "The device while generating.",
        "prefill_device": "The device in prefill.",
        "generate_op": "The operator while generating.",
        "prefill_op": "The operator in prefill. A phase without device and operator takes the other phase's.",
        "out_device": "Where the output goes.",
        "transfer_map": "First layer → device of the residual stream from that layer on. It moves no weights.",
        "backend": "Of KExpertsCPU: llamafile and AMXBF16 (the model's own format), AMXInt8, AMXInt4.",
        "num_bits": "Of KLinearMarlin: 4 or 8.",
        "device": "Both devices at once.",
        "absorb_for_prefill": "No effect here.",
        "per_layer_prefill_intput_threshold": "No effect here.",
        "n_deferred_experts": "No effect here; noted in a warning.",
    },
}
"""The sections of a KTransformers file that differ."""

"""resolve_rules: the one rule that applies to each node's module, written on the node."""

from __future__ import annotations

from torch import fx

from ktfx.graph import info, set_info
from ktfx.pass_manager import Pass, PassContext, register_pass


@register_pass
class ResolveRules(Pass):
    """First match wins, on module paths; a node of no module of its own takes its nearest ancestor's rule."""

    name = "resolve_rules"

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        for node in gm.graph.nodes:
            if node.op != "call_function":
                continue
            placement = context.resolution.of(info(node).module)
            set_info(
                node,
                rule=placement.rule.label if placement.rule is not None else None,
                layer=placement.layer,
                out_device=None,
            )

"""assign_devices: every node gets a device name. The only pass that decides one."""

from __future__ import annotations

import operator

from torch import fx

from ktfx.graph import info, is_tensor_node, op_name, set_info
from ktfx.pass_manager import Pass, PassContext, Rewrite, register_pass


@register_pass
class AssignDevices(Pass):
    """A node runs where its module is placed in this phase; what belongs to no child runs with the residual stream.

    Integers (sizes) have no device. ``getitem`` follows the op it reads. A module's ``out_device`` is noted on the
    nodes whose values leave it.
    """

    name = "assign_devices"

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        by_module: dict[str, str] = {}
        counts: dict[str, int] = {}
        for node in gm.graph.nodes:
            if node.op != "call_function" or not is_tensor_node(node):
                continue
            module = info(node).module
            if node.target is operator.getitem:
                producer = node.args[0]
                assert isinstance(producer, fx.Node)
                device = info(producer).device
            elif module == "" and (followed := self._producer(node)) is not None:
                device = info(followed).device
            else:
                if module not in by_module:
                    by_module[module] = context.resolution.glue_device(module, context.phase)
                device = by_module[module]
            set_info(node, device=device)
            counts[str(device)] = counts.get(str(device), 0) + 1
        self._note_out_devices(gm, context)
        context.record(
            Rewrite(what="devices assigned: " + ", ".join(f"{n} nodes on {d}" for d, n in sorted(counts.items())))
        )

    @staticmethod
    def _producer(node: fx.Node) -> fx.Node | None:
        """What the model's own forward does between modules runs where its input was computed: the last hidden states
        are sliced on the last GPU, not sent to the first."""
        return next((a for a in node.all_input_nodes if a.op == "call_function" and info(a).device is not None), None)

    def _note_out_devices(self, gm: fx.GraphModule, context: PassContext) -> None:
        for node in gm.graph.nodes:
            if node.op != "call_function" or info(node).device is None:
                continue
            module = info(node).module
            placement = context.resolution.of(module)
            out = placement.out_device
            if out is None or out == info(node).device or (op_name(node) == "getitem" and not is_tensor_node(node)):
                continue
            root = placement.module
            leaves = any(not _inside(info(user).module, root) for user in node.users)
            if leaves:
                set_info(node, out_device=out)


def _inside(module: str, root: str) -> bool:
    return module == root or module.startswith(root + ".")

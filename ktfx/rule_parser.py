"""Nodes of a rule file → ``Ruleset``. Everything that can be wrong with a file by itself is found here."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ktfx import kt_compat
from ktfx.devices import checked_name
from ktfx.errors import Origin, RuleError
from ktfx.op_names import checked_format, checked_op
from ktfx.patterns import Expression, captures, parse_pattern
from ktfx.roles import ROLES
from ktfx.rule_schema import KT_SCHEMA, SCHEMA
from ktfx.ruleset import LayerRange, Match, PassRequest, PhaseAction, Replace, Rule, Ruleset, Where
from ktfx.text import did_you_mean
from ktfx.yaml_source import (
    Entry,
    Items,
    Node,
    Scalar,
    Table,
    boolean,
    items,
    kind_of,
    known_keys,
    plain,
    string,
    table,
)

VERSION = 1
MAX_LAYER = 9999
PHASES = ("prefill", "generate")

DTYPES = ("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "int64", "int32", "int8", "uint8", "bool")
ACTIVATIONS = ("model", "bf16", "int8")


def parse_rules(root: Node, errors: list[RuleError] | None = None) -> Ruleset:
    """The ruleset of a whole file: a mapping is ktfx's dialect, a list KTransformers'.

    With ``errors`` given, rules that cannot be read are left out and their errors put there, so that lint can report
    all of them; anything wrong with the file as a whole is raised all the same.
    """
    if isinstance(root, Items):
        return _Parser("ktransformers", root.origin, errors).kt_file(root)
    if isinstance(root, Table):
        return _Parser("ktfx", root.origin, errors).ktfx_file(root)
    raise RuleError(
        f"the file holds {kind_of(root)}",
        origin=root.origin,
        expected="a mapping that begins with `ktfx: 1`, or a list of KTransformers rules",
        mend="start the file with `ktfx: 1` and `rules:`",
    )


def parse_layers(node: Node, what: str, rule: str | None = None) -> list[tuple[int, int]]:
    """Ranges of layers: ``7``, ``0-3``, ``0-3,7``, or a list of these; both ends included."""
    if isinstance(node, Items):
        return [pair for item in node.items for pair in parse_layers(item, what, rule)]
    text = node.text.strip() if isinstance(node, Scalar) else ""
    pairs: list[tuple[int, int]] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        if match is None:
            raise RuleError(
                f"{what} is {kind_of(node) if not text else repr(text)}",
                origin=node.origin,
                rule=rule,
                expected="a layer, a range or several: 7, 0-29, '0-3,7'",
                mend="count layers from 0; both ends of a range are included",
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise RuleError(
                f"the range {part.strip()} in {what} ends before it begins",
                origin=node.origin,
                rule=rule,
                expected=f"{last}-{first}",
                mend="put the smaller layer first",
            )
        if last > MAX_LAYER:
            raise RuleError(f"{what} names layer {last}", origin=node.origin, rule=rule, expected=f"≤ {MAX_LAYER}")
        pairs.append((first, last))
    return pairs


class _Parser:
    """Reads one file; holds what rules refer to: the device names, and where each was used first."""

    def __init__(self, dialect: str, origin: Origin, errors: list[RuleError] | None) -> None:
        self.dialect = dialect
        self.errors = errors
        self.file = Origin(origin.file)
        self.devices: dict[str, str] = {}
        self.device_origins: dict[str, Origin] = {}
        self.transfer_map: dict[int, str] = {}
        self.transfer_origins: dict[int, Origin] = {}

    # ---- whole files

    def kt_file(self, root: Items) -> Ruleset:
        if not root.items:
            raise RuleError("the file holds no rule", origin=root.origin, expected="at least one `- match:` rule")
        rules = self.rules(root)
        self.device_origins.setdefault(kt_compat.DEFAULT_DEVICE, self.file)
        return self.ruleset(rules, kt_compat.DEFAULT_DEVICE)

    def ktfx_file(self, root: Table) -> Ruleset:
        known_keys(root, tuple(SCHEMA["file"]), "the file")
        self.version(root)
        if (node := root.get("devices")) is not None:
            self.declare_devices(table(node, "`devices:`"))
        node = root.get("default_device")
        default = self.device(node, "`default_device:`", None) if node is not None else next(iter(self.devices), "cpu")
        layers, split, layers_origin = self.layers(root.get("layers"))
        passes = None
        if (node := root.get("passes")) is not None:
            passes = tuple(self.pass_request(item) for item in items(node, "`passes:`").items)
        rules: tuple[Rule, ...] = ()
        if (node := root.get("rules")) is not None:
            rules = self.rules(items(node, "`rules:`"))
        self.device_origins.setdefault(default, self.file)
        found = self.ruleset(rules, default)
        return replace(found, layers=layers, layer_devices=split, layers_origin=layers_origin, passes=passes)

    def ruleset(self, rules: tuple[Rule, ...], default_device: str) -> Ruleset:
        return Ruleset(
            dialect=self.dialect,
            rules=rules,
            default_device=default_device,
            origin=self.file,
            devices=self.devices,
            transfer_map=dict(sorted(self.transfer_map.items())),
            device_origins=self.device_origins,
            transfer_origins=self.transfer_origins,
        )

    def rules(self, nodes: Items) -> tuple[Rule, ...]:
        found: list[Rule] = []
        for number, node in enumerate(nodes.items, 1):
            try:
                found.append(self.rule(node, number))
            except RuleError as error:
                if self.errors is None:
                    raise
                self.errors.append(error)
        return tuple(found)

    def version(self, root: Table) -> None:
        node = root.get("ktfx")
        if node is None:
            raise RuleError(
                "the file does not say which format it is in",
                origin=root.origin,
                expected=f"`ktfx: {VERSION}`",
                mend=f"begin the file with `ktfx: {VERSION}`; a KTransformers file is a bare list (- match: …)",
            )
        if not isinstance(node, Scalar) or node.value != VERSION or isinstance(node.value, bool):
            raise RuleError(
                f"`ktfx:` is {kind_of(node)}",
                origin=node.origin,
                expected=f"`ktfx: {VERSION}`",
                mend="this version of ktfx reads format 1",
            )

    def declare_devices(self, node: Table) -> None:
        for entry in node.entries:
            name = entry.key.text
            if not re.fullmatch(r"[A-Za-z_][\w.\-]*(:\d+)?", name):
                raise RuleError(f"{name!r} is no device name", origin=entry.key.origin, expected="a word such as gpu0")
            target = string(entry.value, f"the device {name!r}")
            self.devices[name] = checked_name(target, (), entry.value.origin)

    def layers(self, node: Node | None) -> tuple[tuple[LayerRange, ...], tuple[str, ...], Origin | None]:
        if node is None:
            return (), (), None
        if isinstance(node, Items):
            split = tuple(self.device(item, "a device of `layers:`", None) for item in node.items)
            if not split:
                raise RuleError("`layers:` is an empty list", origin=node.origin, expected="at least one device")
            return (), split, node.origin
        found: list[LayerRange] = []
        for entry in table(node, "`layers:`").entries:
            device = self.device(entry.value, f"the device of layers {entry.key.text}", None)
            for first, last in parse_layers(entry.key, "a key of `layers:`"):
                self.refuse_overlap(found, first, last, entry)
                found.append(LayerRange(first, last, device, entry.key.origin))
        return tuple(sorted(found, key=lambda r: r.first)), (), node.origin

    def refuse_overlap(self, found: list[LayerRange], first: int, last: int, entry: Entry) -> None:
        for other in found:
            if first <= other.last and other.first <= last:
                layer = max(first, other.first)
                raise RuleError(
                    f"layer {layer} is in two ranges of `layers:`: {other.first}-{other.last} and {first}-{last}",
                    origin=entry.key.origin,
                    expected=f"each layer once (the other range is at line {other.origin.line})",
                    mend="give each layer to one device",
                )

    def pass_request(self, node: Node) -> PassRequest:
        if isinstance(node, Scalar):
            return PassRequest(string(node, "a pass"), {}, node.origin)
        entries = table(node, "a pass").entries
        if len(entries) != 1:
            raise RuleError(
                f"a pass has {len(entries)} keys",
                origin=node.origin,
                expected="a name, or one name with its options: - fuse_norms: {device: cuda}",
                mend="start each pass with its own '-'",
            )
        name, value = entries[0].key.text, entries[0].value
        if isinstance(value, Scalar) and value.value is None:
            return PassRequest(name, {}, entries[0].key.origin)
        return PassRequest(name, plain(table(value, f"the options of {name}")), entries[0].key.origin)

    # ---- one rule

    def rule(self, node: Node, number: int) -> Rule:
        label = f"rule {number}"
        if not isinstance(node, Table):
            raise RuleError(
                f"the rule is {kind_of(node)}",
                origin=node.origin,
                rule=label,
                expected="a mapping with `match:` and `replace:`",
                mend="write `- match: {name: …}` and, under it, `replace: {…}`",
            )
        known_keys(node, tuple(SCHEMA["rule"]), "the rule", label)
        for key in ("match", "replace"):
            if node.get(key) is None:
                raise RuleError(
                    f"the rule has no `{key}:`",
                    origin=node.origin,
                    rule=label,
                    expected="`match:` and `replace:`",
                    mend="check the indentation: both belong to the same '-'",
                )
        recursive_node = node.get("recursive")
        recursive = boolean(recursive_node, "`recursive:`", label) if recursive_node is not None else True
        match_node = table(node.get("match") or node, "`match:`", label)
        replace_node = table(node.get("replace") or node, "`replace:`", label)
        match, pattern, name_origin = self.match(match_node, label)
        if self.dialect == "ktransformers":
            known_keys(replace_node, tuple(KT_SCHEMA["replace"]), "`replace:`", label)
            action, with_ = self.kt_replace(replace_node, label), None
        else:
            action, with_ = self.replace(replace_node, label)
        self.check_pattern_rule(match, pattern, with_, action, node, replace_node, label)
        return Rule(number, match, action, recursive, node.origin, pattern, with_, name_origin)

    def match(self, node: Table, label: str) -> tuple[Match, Expression | None, Origin | None]:
        keys = tuple((KT_SCHEMA if self.dialect == "ktransformers" else SCHEMA)["match"])
        known_keys(node, keys, "`match:`", label)
        if not node.entries:
            raise RuleError(
                "`match:` is empty",
                origin=node.origin,
                rule=label,
                expected="at least one of " + ", ".join(keys),
                mend="to match every module, write name: '.*'",
            )
        name, name_origin = None, None
        if (found := node.get("name")) is not None:
            name, name_origin = self.regex(found, label), found.origin
        cls = None
        if (found := node.get("class")) is not None:
            cls = self.class_path(found, "`match.class`", label)
        role = None
        if (found := node.get("module")) is not None:
            role = self.one_of(found, ROLES, "`match.module`", label)
        layers = None
        if (found := node.get("layers")) is not None:
            pairs = parse_layers(found, "`match.layers`", label)
            layers = frozenset(layer for first, last in pairs for layer in range(first, last + 1))
        pattern, text = None, None
        if (found := node.get("pattern")) is not None:
            text, pattern = self.expression(found, "`match.pattern`", label)
        where = None
        if (found := node.get("where")) is not None:
            where = self.where(table(found, "`where:`", label), label, pattern)
        return Match(name, cls, role, layers, text, where), pattern, name_origin

    def regex(self, node: Node, label: str) -> str:
        if not isinstance(node, Scalar) or not isinstance(node.value, str):
            raise RuleError(
                f"`match.name` is {kind_of(node)}", origin=node.origin, rule=label, expected="a regular expression"
            )
        try:
            re.compile(node.value)
        except (re.error, RecursionError, OverflowError) as error:
            at = f" at character {error.pos + 1}" if isinstance(error, re.error) and error.pos is not None else ""
            raise RuleError(
                f"`match.name` does not compile: {error.msg if isinstance(error, re.error) else error}{at}",
                origin=node.origin,
                rule=label,
                expected=f"a Python regular expression, not {node.value!r}",
                mend="write dots as \\. and close every bracket; single quotes need no doubled backslashes",
            ) from None
        return node.value

    def class_path(self, node: Node, what: str, label: str) -> str:
        path = string(node, what, label)
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", path):
            raise RuleError(f"{what} is {path!r}", origin=node.origin, rule=label, expected="a dotted class path")
        return path

    def one_of(self, node: Node, known: tuple[str, ...], what: str, label: str | None) -> str:
        word = string(node, what, label)
        if word not in known:
            raise RuleError(
                f"{what} is {word!r}",
                origin=node.origin,
                rule=label,
                expected="one of " + ", ".join(known),
                mend=did_you_mean(word, known),
            )
        return word

    def expression(self, node: Node, what: str, label: str) -> tuple[str, Expression]:
        text = string(node, what, label)
        origin = node.origin
        if isinstance(node, Scalar) and node.block and origin.line:
            origin = Origin(origin.file, origin.line + 1, 1)
        elif isinstance(node, Scalar) and node.quoted:
            origin = Origin(origin.file, origin.line, origin.column + 1)
        return text, parse_pattern(text, origin, label)

    def where(self, node: Table, label: str, pattern: Expression | None) -> Where:
        known_keys(node, tuple(SCHEMA["where"]), "`where:`", label)
        dtype = device = phase = None
        if (found := node.get("dtype")) is not None:
            short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
            written = string(found, "`where.dtype`", label).removeprefix("torch.")
            dtype = self.one_of(replace_text(found, short.get(written, written)), DTYPES, "`where.dtype`", label)
        if (found := node.get("device")) is not None:
            # `cuda` here is any GPU, as in {where: {device: cuda}}.
            text = string(found, "`where.device`", label)
            device = text if text in ("cuda", "cpu") else self.device(found, "`where.device`", label)
        if (found := node.get("phase")) is not None:
            phase = self.one_of(found, PHASES, "`where.phase`", label)
            if pattern is None:
                raise RuleError(
                    "`where.phase` stands in a rule for modules",
                    origin=found.origin,
                    rule=label,
                    expected="phases under `replace:`",
                    mend=f"write replace: {{{phase}: {{…}}}}",
                )
        shapes = None
        if (found := node.get("shapes")) is not None:
            shapes = {}
            names = captures(pattern) if pattern is not None else None
            for entry in table(found, "`where.shapes`", label).entries:
                name = entry.key.text
                if names is not None and name not in names:
                    raise RuleError(
                        f"`where.shapes` names {name!r}, which the pattern does not capture",
                        origin=entry.key.origin,
                        rule=label,
                        expected="one of " + ", ".join(names),
                        mend=did_you_mean(name, names),
                    )
                shapes[name] = tuple(self.size(item, label) for item in items(entry.value, f"shape of {name}").items)
        return Where(dtype, device, phase, shapes)

    def size(self, node: Node, label: str) -> int | None:
        if isinstance(node, Scalar) and (node.value is None or node.value == "any"):
            return None
        if isinstance(node, Scalar) and type(node.value) is int and node.value >= 0:
            return node.value
        raise RuleError(f"a size is {kind_of(node)}", origin=node.origin, rule=label, expected="a number, or any")

    # ---- what a rule does, ktfx dialect

    def replace(self, node: Table, label: str) -> tuple[Replace, Expression | None]:
        known_keys(node, tuple(SCHEMA["replace"]), "`replace:`", label)
        if node.get("class") is not None or node.get("kwargs") is not None:
            for entry in node.entries:
                if entry.key.text not in KT_SCHEMA["replace"]:
                    raise RuleError(
                        f"`{entry.key.text}:` stands beside `class:` or `kwargs:`",
                        origin=entry.key.origin,
                        rule=label,
                        expected="either ktfx's keys or KTransformers' class and kwargs",
                        mend="use op and device instead of class and kwargs",
                    )
            return self.kt_replace(node, label), None
        if not node.entries:
            raise RuleError(
                "`replace:` is empty", origin=node.origin, rule=label, expected="one of " + ", ".join(SCHEMA["replace"])
            )
        both = self.action(node, label)
        phases = {phase: both for phase in PHASES}
        for phase in PHASES:
            if (found := node.get(phase)) is not None:
                own = table(found, f"`{phase}:`", label)
                known_keys(own, tuple(SCHEMA["phase"]), f"`{phase}:`", label)
                said = self.action(own, label)
                phases[phase] = PhaseAction(
                    said.device or both.device, said.op or both.op, said.weights or both.weights
                )
        out_device = fallback = None
        if (found := node.get("out_device")) is not None:
            out_device = self.device(found, "`out_device:`", label)
        if (found := node.get("fallback")) is not None:
            fallback = self.one_of(found, ("aten",), "`fallback:`", label)
        options: dict[str, Any] = {}
        if (found := node.get("activations")) is not None:
            options["activations"] = self.one_of(found, ACTIVATIONS, "`activations:`", label)
        if (found := node.get("group_size")) is not None:
            options["group_size"] = plain(found)
        text, with_ = None, None
        if (found := node.get("with")) is not None:
            text, with_ = self.expression(found, "`replace.with`", label)
        return Replace(phases["prefill"], phases["generate"], out_device, text, fallback, options), with_

    def action(self, node: Table, label: str) -> PhaseAction:
        device = op = weights = None
        if (found := node.get("device")) is not None:
            device = self.device(found, "`device:`", label)
        if (found := node.get("op")) is not None:
            op = checked_op(string(found, "`op:`", label), found.origin, label)
        group_node, group = node.get("group_size"), None
        if group_node is not None:
            if not isinstance(group_node, Scalar) or type(group_node.value) is not int:
                raise RuleError(
                    f"`group_size:` is {kind_of(group_node)}",
                    origin=group_node.origin,
                    rule=label,
                    expected="a number: 32, 64 or 128",
                )
            group = group_node.value
        if (found := node.get("weights")) is not None:
            weights = checked_format(string(found, "`weights:`", label), group, found.origin, label)
        elif group_node is not None:
            raise RuleError(
                "`group_size:` without `weights:`",
                origin=group_node.origin,
                rule=label,
                expected="a weight format that has groups",
                mend="add weights: int4",
            )
        return PhaseAction(device, op, weights)

    def device(self, node: Node, what: str, label: str | None) -> str:
        name = checked_name(string(node, what, label), self.devices, node.origin, label)
        self.device_origins.setdefault(name, node.origin)
        return name

    # ---- what a rule does, KTransformers dialect

    def kt_replace(self, node: Table, label: str) -> Replace:
        if not node.entries:
            raise RuleError(
                "`replace:` is empty", origin=node.origin, rule=label, expected="`class:`, `kwargs:` or both"
            )
        nodes: dict[str, Node] = {}
        if (found := node.get("kwargs")) is not None and not (isinstance(found, Scalar) and found.value is None):
            kwargs_node = table(found, "`kwargs:`", label)
            known_keys(kwargs_node, tuple(KT_SCHEMA["kwargs"]), "`kwargs:`", label)
            nodes = {entry.key.text: entry.value for entry in kwargs_node.entries}
        kwargs = {key: plain(value) for key, value in nodes.items()}
        devices = {
            key: self.device(nodes[key], f"`{key}:`", label)
            for key in ("generate_device", "prefill_device", "out_device", "device")
            if kwargs.get(key) is not None
        }
        if (found := node.get("class")) is not None:
            kt_class = self.class_path(found, "`replace.class`", label)
            kt_compat.check_class(kt_class, found.origin, label)
        else:
            kt_class = kt_compat.DEFAULT_CLASS
        if kwargs.get("backend") is not None:
            kt_compat.check_backend(kwargs["backend"], nodes["backend"].origin, label)
        if kwargs.get("num_bits") is not None:
            kt_compat.check_num_bits(kwargs["num_bits"], nodes["num_bits"].origin, label)
        if "transfer_map" in nodes:
            self.read_transfer_map(table(nodes["transfer_map"], "`transfer_map:`", label), label)
        actions = {}
        for phase in PHASES:
            op_node = nodes.get(f"{phase}_op")
            device = devices.get(f"{phase}_device", devices.get("device"))
            if op_node is None or (isinstance(op_node, Scalar) and op_node.value is None):
                actions[phase] = PhaseAction(device)
                continue
            kt_op = string(op_node, f"`{phase}_op:`", label)
            found_op = kt_compat.operator(kt_op, kwargs, op_node.origin, label)
            actions[phase] = PhaseAction(device, found_op.op, found_op.weights, kt_op)
        return Replace(
            prefill=actions["prefill"],
            generate=actions["generate"],
            out_device=devices.get("out_device"),
            kt_class=kt_class,
            kt_kwargs=kwargs,
        )

    def read_transfer_map(self, node: Table, label: str) -> None:
        first_one = not self.transfer_map
        for entry in node.entries:
            if not entry.key.text.isdigit() or int(entry.key.text) > MAX_LAYER:
                raise RuleError(
                    f"the key {entry.key.text!r} of `transfer_map:` is no layer",
                    origin=entry.key.origin,
                    rule=label,
                    expected="the number of the first layer on the device, counted from 0",
                )
            device = self.device(entry.value, f"`transfer_map:` at {entry.key.text}", label)
            # A later rule's map is never reached where the first one's rule matched.
            if first_one:
                self.transfer_map[int(entry.key.text)] = device
                self.transfer_origins[int(entry.key.text)] = entry.key.origin

    # ---- pattern rules

    def check_pattern_rule(
        self,
        match: Match,
        pattern: Expression | None,
        with_: Expression | None,
        action: Replace,
        node: Table,
        replace_node: Table,
        label: str,
    ) -> None:
        if pattern is None and with_ is None:
            return
        if pattern is None or with_ is None:
            has, lacks = (
                ("`match.pattern`", "`replace.with`") if with_ is None else ("`replace.with`", "`match.pattern`")
            )
            raise RuleError(
                f"the rule has {has} but no {lacks}",
                origin=node.origin,
                rule=label,
                expected="both, or neither",
                mend=f"add {lacks}",
            )
        for key in ("op", "device", "weights", "out_device", "prefill", "generate", "fallback"):
            if replace_node.get(key) is not None:
                raise RuleError(
                    f"`{key}:` stands in a pattern rule",
                    origin=(replace_node.get(key) or replace_node).origin,
                    rule=label,
                    expected="`with:` alone",
                    mend="write a second rule for the modules",
                )
        known = captures(pattern)
        for name in captures(with_):
            if name not in known:
                raise RuleError(
                    f"`replace.with` uses {name!r}, which the pattern does not capture",
                    origin=(replace_node.get("with") or replace_node).origin,
                    rule=label,
                    expected="one of " + ", ".join(known),
                    mend=did_you_mean(name, known),
                )


def replace_text(node: Node, text: str) -> Scalar:
    """The same place with another text."""
    return Scalar(text, text, node.origin)

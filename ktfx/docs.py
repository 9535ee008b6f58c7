"""``python -m ktfx.docs``: write docs/rule-file-reference.md from the schema that the parser itself reads."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from ktfx.formats import FORMATS
from ktfx.kt_compat import BACKENDS, OPERATORS
from ktfx.lint import CODES
from ktfx.op_names import ANY_MODULE, builtin_ops
from ktfx.options import CompileOptions
from ktfx.pass_manager import DEFAULT_PIPELINE, REQUIRED
from ktfx.roles import ROLES
from ktfx.rule_schema import KT_SCHEMA, SCHEMA

REFERENCE = Path("docs") / "rule-file-reference.md"

_SECTIONS = {
    "file": ("The file", "A YAML mapping. An unknown key is an error that names the near one."),
    "rule": ("A rule", "An item of `rules:`. For each module the first rule that matches applies, top to bottom."),
    "match": ("`match:`", "All keys given must hold."),
    "where": ("`match.where:`", "Further conditions."),
    "replace": ("`replace:`", "What happens to what was matched."),
    "phase": ("`replace.prefill:` and `replace.generate:`", "What differs in one phase."),
}


def rule_file_reference() -> str:
    """The page, as Markdown."""
    parts = [
        "# Rule file reference",
        "<!-- Written by `python -m ktfx.docs`; edit ktfx/rule_schema.py, not this file. -->",
        "Every key a rule file may have. [How to write rules](how-to-write-rules.md) shows them at work.",
    ]
    for name, keys in SCHEMA.items():
        title, about = _SECTIONS[name]
        parts += [f"## {title}", about, _table(("key", "meaning"), ((f"`{k}`", v) for k, v in keys.items()))]
    parts += [
        "## Roles",
        "What `match.module` may name. They are read off structure and class names, so they hold for any model.",
        ", ".join(f"`{role}`" for role in ROLES),
        "## Ops",
        "What `op` may name; experts kernels of installed packages come on top. `aten` is the model's own arithmetic.",
        ", ".join(f"`{op}`" for op in (*ANY_MODULE, *builtin_ops())),
        "## Weight formats",
        "What `weights` may name; a group is written behind it: `int4-g128`.",
        _table(
            ("format", "bits", "groups", "meaning"),
            (
                (f"`{f.name}`", str(f.bits or "–"), ", ".join(map(str, f.groups)) or "–", f.description)
                for f in FORMATS.values()
            ),
        ),
        "## Passes",
        f"Without `passes:` these run: {_listed(DEFAULT_PIPELINE)}. {_listed(sorted(REQUIRED))} always run and need "
        "not be named. `ktfx passes` lists every pass there is, with its options; `ktfx pipeline RULES` what a file "
        "comes to.",
        "## KTransformers files",
        "A bare list is read in KTransformers' dialect: an unmatched module goes to `cuda:0` and nothing is inherited.",
    ]
    for name, keys in KT_SCHEMA.items():
        title = "`replace.kwargs:`" if name == "kwargs" else f"`{name}:`"
        parts += [f"### {title}", _table(("key", "meaning"), ((f"`{k}`", v) for k, v in keys.items()))]
    parts += [
        "### Operators",
        _table(
            ("operator", "op here", "weights"),
            ((f"`{name}`", f"`{found.op}`", found.weights or "model") for name, found in OPERATORS.items()),
        ),
        "### Backends of `KExpertsCPU`",
        _table(("backend", "weights"), ((f"`{name}`", weights or "model") for name, weights in BACKENDS.items())),
        "## What `ktfx lint` finds",
        _table(("code", "meaning"), ((f"`{code}`", meaning) for code, meaning in CODES.items())),
        "## Options of a compile",
        "Not of the file: what `torch.compile(…, options=…)`, `ktfx.compile` and `ktfx.from_pretrained` take. The last "
        "two also take `cache`, `release_host` and `dynamic`, which their docstrings describe.",
        _options(),
    ]
    return "\n\n".join(parts) + "\n"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [headings, ("---",) * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _options() -> str:
    """The fields' descriptions in the class's docstring, as a table."""
    found: dict[str, str] = {}
    last = ""
    for line in (CompileOptions.__doc__ or "").splitlines()[1:]:
        name, colon, meaning = line.strip().partition(": ")
        if colon and name in CompileOptions.__dataclass_fields__:
            last = name
            found[name] = meaning
        elif line.strip() and last:
            found[last] += " " + line.strip()
    del found["mode"]  # an argument of torch.compile, no option
    return _table(("option", "meaning"), ((f"`{k}`", _sentence(v)) for k, v in found.items()))


def _sentence(text: str) -> str:
    text = text.replace("``", "`")
    return text[:1].upper() + text[1:]


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else REFERENCE
    target.write_text(rule_file_reference(), encoding="utf-8")
    print(f"wrote {target}")

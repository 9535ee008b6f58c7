"""``ktfx rules``: the rule files that ship."""

from __future__ import annotations

from importlib import resources

from rich.table import Table

from ktfx.cli import common


@common.guarded
def rules(as_json: common.Json = False, debug: common.Debug = False) -> None:
    """List the rule files that ship with ktfx; each name can be given wherever RULES is asked for."""
    found = {name: _summary(text) for name, text in _texts().items()}
    if as_json:
        common.print_json([{"name": name, "summary": summary} for name, summary in found.items()])
        return
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("name", no_wrap=True, style="cyan")
    table.add_column("what it places where")
    for name, summary in found.items():
        table.add_row(name, summary)
    common.stdout().print(table)


def _texts() -> dict[str, str]:
    files = sorted(
        (f for f in resources.files("ktfx.rules").iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name
    )
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in files}


def _summary(text: str) -> str:
    """The first sentence of the comment that a rule file begins with."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
        if not lines[-1]:
            break
    paragraph = " ".join(line for line in lines if line)
    sentence, dot, _ = paragraph.partition(". ")
    return sentence + "." if dot else paragraph

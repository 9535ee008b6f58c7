"""Documentation pages as things to run: their fenced blocks, in order, and the comments that steer them.

Comments on the lines before a block steer it:
``<!-- file: NAME -->`` writes the block to that file; ``<!-- not run: REASON -->`` leaves it alone;
``<!-- wrong: REASON -->`` says that a rule file has mistakes on purpose;
``<!-- slow: REASON -->`` leaves it to the slow tests; ``<!-- compared from: TEXT -->`` compares the output from the
first line that begins so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(
    r"^(?P<comments>(?:<!-- *(?:file|not run|wrong|slow|compared from) *:.*?-->\n)*)"
    r"```(?P<kind>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_SPEED = re.compile(r"\d[\d.,]* (tokens/s|ms|s)(?=\s|$)")


@dataclass(frozen=True)
class Block:
    """kind: the fence's word. steer: the comments before it. line: of the text's first line in the page."""

    page: Path
    kind: str
    text: str
    line: int
    steer: dict[str, str]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A ``$ `` line of a console block and the output shown below it."""

    text: str
    shown: list[str]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, m["kind"], m["text"], text[: m.start("text")].count("\n") + 1, _steer(m["comments"]))
        for m in _BLOCK.finditer(text)
    ]


def _steer(comments: str) -> dict[str, str]:
    return {key: value.strip() for key, value in re.findall(r"<!-- *([^:]+?) *:(.*?)-->", comments)}


def commands(block: Block) -> list[Command]:
    """A command line that ends in a backslash goes on in the next."""
    found: list[Command] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append(Command(line[2:], []))
        elif found and found[-1].text.endswith("\\") and not found[-1].shown:
            found[-1] = Command(found[-1].text[:-1].rstrip() + " " + line.strip(), [])
        elif found:
            found[-1].shown.append(line)
        else:
            raise AssertionError(f"{block}: a console block begins with `$ `")
    return found


def missing_line(shown: list[str], output: str, start: str | None = None) -> str | None:
    """The first line that the page shows and the output lacks there; None if all come, in order.

    ``…`` stands for anything, a line ``…`` for any lines; blanks and measured speeds are not compared.
    """
    if start is not None:
        first = next(i for i, line in enumerate(shown) if line.startswith(start))
        shown = shown[first:]
    lines = [_plain(line) for line in output.splitlines()]
    at = 0
    for line in shown:
        wanted = _plain(line)
        if wanted in ("", "…"):
            continue
        pattern = re.compile(".*".join(re.escape(part) for part in wanted.split("…")))
        found = next((i for i in range(at, len(lines)) if pattern.fullmatch(lines[i])), None)
        if found is None:
            return line
        at = found + 1
    return None


def _plain(line: str) -> str:
    return " ".join(_SPEED.sub(r"N \1", line).split())


def mentions(page: Path) -> list[list[str]]:
    """Every mention of a ktfx command, in a `$ ` line or as inline code, as words."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^\$ (ktfx [^\n#>]*)", text, re.MULTILINE)
    found += re.findall(r"`(ktfx [^`\n]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [mention.replace("'", " ").replace(",", " ").split() for mention in found]


def links(page: Path) -> list[str]:
    """Targets of the relative links, without anchors."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [t.split("#")[0] for t in targets if "://" not in t and not t.startswith("#")]

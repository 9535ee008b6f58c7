"""The demo model's training text: the documentation strings of Python's standard library (PSF licence).

The text is read from the interpreter that runs this, by parsing its source files; nothing is imported or downloaded.
One interpreter gives one text: files, documents and the held-out part follow from names and contents alone.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
SHORTEST_DOCUMENT = 40
HELD_OUT_ONE_IN = 40


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order: those to train on, and about one in forty held out to measure on."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    def digest(self) -> str:
        """SHA-256 of the whole text, to tell whether two interpreters give the same."""
        digest = hashlib.sha256()
        for document in self.train + self.held_out:
            digest.update(document.encode() + b"\0")
        return digest.hexdigest()

    def vocabulary(self) -> frozenset[str]:
        """The words of the training text, in lower case."""
        return frozenset(word for document in self.train for word in words(document))


def words(text: str) -> list[str]:
    """Runs of two or more ASCII letters, in lower case."""
    return re.findall(r"[a-z]{2,}", text.lower())


def build_corpus(stdlib: Path | None = None) -> Corpus:
    """The corpus of this interpreter's standard library, or of another folder of Python files."""
    root = stdlib or Path(sysconfig.get_paths()["stdlib"])
    train: list[str] = []
    held_out: list[str] = []
    seen: set[str] = set()
    for document in _documents(root):
        if len(document) < SHORTEST_DOCUMENT or document in seen:
            continue
        seen.add(document)
        chosen = int.from_bytes(hashlib.sha256(document.encode()).digest()[:4]) % HELD_OUT_ONE_IN == 0
        (held_out if chosen else train).append(_narrow(document))
    return Corpus(tuple(train), tuple(held_out))


def _documents(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).parts):
        if SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # the library keeps a few files that are broken on purpose
            continue
        if path.parts[-2:] == ("pydoc_data", "topics.py"):
            yield from _help_topics(tree)
        else:
            yield from _docstrings(tree, path.stem)


def _docstrings(tree: ast.Module, module: str) -> Iterator[str]:
    """Each docstring under the line that it documents: ``module json``, ``class Decoder``, ``dumps(obj, indent)``."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text:
            yield f"{_heading(node, module)}\n\n{_tidy(text)}"


def _heading(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, module: str) -> str:
    if isinstance(node, ast.Module):
        return f"module {module}"
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    arguments = [a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
    return f"{node.name}({', '.join(a for a in arguments if a not in ('self', 'cls'))})"


def _help_topics(tree: ast.Module) -> Iterator[str]:
    """The chapters of the language reference that ``help()`` shows, which the library keeps as one dictionary."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            for name, text in sorted(topics.items()):
                yield f"topic {name}\n\n{_tidy(text)}"


def _tidy(text: str) -> str:
    """Without common indentation, trailing blanks or runs of empty lines."""
    lines = "\n".join(line.rstrip() for line in inspect.cleandoc(text).expandtabs(4).splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


def _narrow(text: str) -> str:
    """Without long runs of the blanks and rules that align and frame things: a small model that has learnt such runs
    writes little else once it is in one."""
    return re.sub(r"([-=*~^_.#+])\1{7,}", lambda run: run[1] * 8, re.sub(r" {5,}", " " * 4, text))

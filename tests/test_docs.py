"""The README and docs/: every command and snippet runs as shown, links lead somewhere, the reference is up to date."""

from __future__ import annotations

import linecache
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import Result
from doc_pages import PAGES, ROOT, Block, Command, blocks, commands, links, mentions, missing_line
from typer.main import get_command
from typer.testing import CliRunner

import ktfx.ops.experts
import ktfx.pass_manager
from ktfx.cli.main import app
from ktfx.docs import REFERENCE, rule_file_reference
from ktfx.ops import load_ops
from ktfx.pass_manager import registered_passes
from ktfx.ruleset import parse_ruleset

RUN_KINDS = ("console", "python")
# Pages that are linked to already and come with changes of their own.
COMING: set[str] = set()
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with registries that forget what the page registers."""
    load_ops()
    registered_passes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ktfx.pass_manager, "_PASSES", dict(ktfx.pass_manager._PASSES))
    monkeypatch.setattr(ktfx.ops.experts, "_KERNELS", dict(ktfx.ops.experts._KERNELS))
    torch._dynamo.reset()
    return tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.kind in RUN_KINDS for b in blocks(p))], ids=name)
def test_page_runs_as_shown(page: Path, place: Path) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if "file" in block.steer:
            (place / block.steer["file"]).write_text(block.text, encoding="utf-8")
        elif not block.steer.keys() & {"not run", "slow"}:
            run(block, namespace)


SLOW = [b for p in PAGES for b in blocks(p) if "slow" in b.steer]


@pytest.mark.slow
@pytest.mark.parametrize("block", SLOW, ids=str)
def test_slow_block_runs_as_shown(block: Block, place: Path) -> None:
    for before in blocks(block.page):
        if "file" in before.steer and before.line < block.line:
            (place / before.steer["file"]).write_text(before.text, encoding="utf-8")
    run(block, {"__name__": "__main__"})


def run(block: Block, namespace: dict[str, object]) -> None:
    if block.kind == "python":
        # The lines of the page in tracebacks, and where inspect looks for a class's source.
        file = f"<{block}>"
        linecache.cache[file] = (len(block.text), None, block.text.splitlines(keepends=True), file)
        exec(compile(block.text, file, "exec"), namespace)
    elif block.kind == "console":
        for command in commands(block):
            run_command(block, command)


def run_command(block: Block, command: Command) -> None:
    """``ktfx`` runs; ``make TARGET`` would run all this again, so its recipe is looked at instead."""
    words = shlex.split(command.text, comments=True)
    if words[0] == "make":
        check_make(block, words[1])
        if words[1] != "demo" or not command.shown:
            return
        words = ["ktfx", "run", "--backend", "eager"]  # its recipe, but for the compiler
    assert words[0] == "ktfx", f"{block}: mark `{command.text}` as not run, with the reason"
    arguments, target = (words[1:-2], words[-1]) if ">" in words else (words[1:], None)
    expected = re.search(r"# exit code (\d+)", command.text)
    if expected and words[1] == "run" and torch.cuda.is_available():
        return  # asks for devices that may be there
    result = invoke(tuple(arguments))
    torch._dynamo.reset()  # a command is a process of its own: the lengths that it traced are not known to the next
    assert result.exit_code == (int(expected[1]) if expected else 0), f"{block}: {command.text}\n{result.output}"
    if target is not None:
        Path(target).write_text(result.stdout, encoding="utf-8")
        return
    if torch.cuda.is_available() and words[1] in ("run", "doctor"):
        return  # the pages show a machine without GPUs
    lacking = missing_line(command.shown, result.output, block.steer.get("compared from"))
    assert lacking is None, f"{block}: `{command.text}` does not print\n  {lacking}\nbut\n{result.output}"


def invoke(arguments: tuple[str, ...]) -> Result:
    if arguments == ("run", "--backend", "eager"):  # on two pages, and reads nothing of theirs
        return run_the_demo(arguments)
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100"})


@cache
def run_the_demo(arguments: tuple[str, ...]) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100"})


def check_make(block: Block, target: str) -> None:
    recipe = re.search(rf"^{re.escape(target)}:[^\n]*\n((?:\t[^\n]*\n)*)", MAKEFILE, re.MULTILINE)
    assert recipe is not None, f"{block}: the Makefile has no target {target!r}"
    if target == "demo":
        assert recipe[1].split() == ["$(BIN)/ktfx", "run"], f"{block}: make demo does something else now"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    missing = {Path(t).name for t in links(page) if not (page.parent / t).exists()}
    assert missing <= COMING


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_that_are_mentioned_exist(page: Path) -> None:
    """Also where a page only speaks of a command: it exists, and has the options."""
    known = get_command(app).commands  # type: ignore[attr-defined]
    for _, *words in mentions(page):
        if not words or not words[0].isalpha() or words[0].isupper():
            continue  # ktfx --help, ktfx COMMAND
        assert words[0] in known, f"{name(page)} speaks of `ktfx {words[0]}`"
        options = {"--help"}.union(*(p.opts + p.secondary_opts for p in known[words[0]].params))
        unknown = {w.partition("=")[0] for w in words if w.startswith("--")} - options
        assert not unknown, f"{name(page)}: `ktfx {words[0]}` has no {', '.join(unknown)}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_yaml_can_be_read(page: Path) -> None:
    """Whole rule files are read by ktfx; fragments at least by YAML."""
    for block in (b for b in blocks(page) if b.kind == "yaml" and "wrong" not in b.steer):
        if re.search(r"^(ktfx: 1|- match:)", block.text, re.MULTILINE):
            parse_ruleset(block.text, str(block))
        else:
            assert isinstance(yaml.safe_load(block.text), dict | list), str(block)


def test_blocks_that_are_not_run_say_why() -> None:
    for block in (b for p in PAGES for b in blocks(p)):
        for key in block.steer.keys() & {"not run", "slow"}:
            assert len(block.steer[key]) > 10, f"{block}: give the reason"
        if block.kind in ("bash", "sh", "shell"):
            pytest.fail(f"{block}: write commands as a console block, with `$ `")


def test_rule_file_reference_is_up_to_date() -> None:
    assert (ROOT / REFERENCE).read_text(encoding="utf-8") == rule_file_reference(), "run python -m ktfx.docs"


@pytest.mark.parametrize(
    ("shown", "output", "missing"),
    [
        (["a  b", "…", "d"], "a b\nc\nd\n", None),
        (["took 1.5 s"], "took 22.75 s", None),
        (["1.5 KiB"], "1.6 KiB", "1.5 KiB"),
        (["b", "a"], "a\nb\n", "a"),
        (["x … z"], "x y z", None),
    ],
)
def test_shown_output_is_compared(shown: list[str], output: str, missing: str | None) -> None:
    assert missing_line(shown, output) == missing

"""``pytest --bless`` rewrites golden files; a person reads the diff before committing it.

The garbage collector looks less often than it would: tracing a model makes millions of objects that live for long, and
walking them all took a tenth of the suite's time.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bless", action="store_true", help="rewrite the golden files under tests/golden with what came out"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that no process is left with one of them when the others are done."""
    items.sort(key=lambda item: "test_in_the_interpreter" not in item.name)


def pytest_collection_finish() -> None:
    gc.freeze()  # the modules that are imported by now stay
    gc.set_threshold(5000, 20, 10)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # extension modules complain of leaks otherwise


@pytest.fixture(autouse=True, scope="module")
def nothing_traced() -> None:
    """Each file begins with a Dynamo that has seen no model: lengths that differ from another file's would be symbolic,
    which takes twice as long to trace."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)``: the text equals tests/golden/name, or is written there under ``--bless``."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--bless"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        assert path.is_file(), f"{path.name} does not exist yet: run pytest --bless and read it"
        assert text == path.read_text(encoding="utf-8"), f"{path.name} differs: if that is right, pytest --bless"

    return check

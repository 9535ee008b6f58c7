"""``pytest --bless`` rewrites golden files; a person reads the diff before committing it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bless", action="store_true", help="rewrite the golden files under tests/golden with what came out"
    )


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

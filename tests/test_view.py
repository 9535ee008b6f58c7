"""The viewer in a headless Chromium: opens, steps, searches, follows deep links, and writes nothing to the console."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from debug_models import rules_file, tiny_session

from ktfx.debug.tracing import write_session
from ktfx.debug.view import write_page
from ktfx.errors import OptionError


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trace")
    write_session(tiny_session(), directory, command=["ktfx", "trace"])
    return write_page(directory)


needs_browser = pytest.mark.skipif(browser.missing() is not None, reason=browser.missing() or "")


@pytest.fixture(scope="module", params=["light", "dark"])
def chromium(request: pytest.FixtureRequest) -> Iterator[browser.Browser]:
    opened = browser.Browser(dark=request.param == "dark")
    assert opened.run("return matchMedia('(prefers-color-scheme: dark)').matches") == (request.param == "dark")
    yield opened
    opened.close()


def test_the_page_needs_nothing_from_outside(page: Path) -> None:
    text = page.read_text()
    assert len(text) < 5_000_000
    assert not re.search(r"<(?:script|link|img|iframe)[^>]*\s(?:src|href)=\"(?!data:)", text)
    assert (
        "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text.split("<script")[0]
    )


def test_text_of_a_model_cannot_end_the_script(tmp_path: Path) -> None:
    from ktfx.debug.trace_dir import read_traces
    from ktfx.debug.view import page as render

    write_session(tiny_session(), tmp_path, command=["</script><script>alert(1)</script>"])
    text = render(read_traces(tmp_path), "</title><b>")
    assert text.count("<script") == 2 and "</title><b>" not in text


def test_a_file_of_others_is_not_replaced(page: Path) -> None:
    write_page(page.parent)
    other = page.parent / "notes.html"
    other.write_text("mine")
    with pytest.raises(OptionError, match="no ktfx page"):
        write_page(page.parent, other)
    assert other.read_text() == "mine"


@needs_browser
def test_opens_and_steps_through_every_rewrite(page: Path, chromium: browser.Browser) -> None:
    chromium.open(page.as_uri())
    chromium.wait("document.body.dataset.ready")
    graph = tiny_session().graphs[0]
    total = sum(1 + len(r.rewrites) for r in graph.records)
    assert chromium.run("return document.getElementById('count').textContent") == f"step 1 of {total}"
    seen = set()
    for step in range(2, total + 1):
        if step % 2:
            chromium.press("\ue014")  # arrow right
        else:
            chromium.run("document.getElementById('next').click()")
        text = f"step {step} of {total}"
        chromium.wait(f"document.getElementById('count').textContent === {text!r}")
        seen.add(chromium.run("return location.hash"))
    assert len(seen) == total - 1
    assert chromium.run("return document.getElementById('next').disabled")
    assert chromium.console() == []


@needs_browser
def test_a_rewrite_shows_both_sides_its_rule_and_its_source(page: Path, chromium: browser.Browser) -> None:
    chromium.open("about:blank")
    chromium.open(page.as_uri() + "#g=0&tab=rewrites&p=1&r=0")
    chromium.wait("document.getElementById('sides')")
    rule = chromium.run("return document.getElementById('rule').textContent")
    assert f"{rules_file()}:6" in rule and "- match: {module: experts}" in rule
    assert "moe.py:" in chromium.run("return document.getElementById('sources').textContent")
    removed = chromium.run("return [...document.querySelectorAll('.cell.del b')].map(b => b.textContent)")
    added = chromium.run("return [...document.querySelectorAll('.cell.add b')].map(b => b.textContent)")
    assert "histc" in removed and added == ["model_layers_0_mlp_experts"]
    assert chromium.console() == []


@needs_browser
def test_search_leads_to_the_node(page: Path, chromium: browser.Browser) -> None:
    chromium.open("about:blank")
    chromium.open(page.as_uri() + "#g=1&tab=rewrites&p=1&r=-1")
    chromium.wait("document.querySelectorAll('.block').length > 2")
    chromium.run(
        "const box = document.getElementById('search'); box.value = 'layers.1 softmax';"
        "box.dispatchEvent(new Event('input'))"
    )
    chromium.wait("document.querySelector('#hits button')")
    chromium.run("document.querySelector('#hits button').click()")
    assert "softmax" in chromium.wait("document.querySelector('.hit') && document.querySelector('.hit').textContent")
    link = chromium.run("return location.href")
    chromium.open("about:blank")
    chromium.open(link)
    assert "softmax" in chromium.wait("document.querySelector('.hit') && document.querySelector('.hit').textContent")
    assert chromium.run("return document.getElementById('graph').selectedOptions[0].textContent") == "generate"
    assert chromium.console() == []


@needs_browser
def test_graph_partitions_timeline_and_about(page: Path, chromium: browser.Browser, tmp_path: Path) -> None:
    graph = tiny_session().graphs[0]
    chromium.open("about:blank")
    chromium.open(page.as_uri() + "#g=0&tab=graph")
    chromium.wait("document.querySelectorAll('#modules .edge').length > 0")
    rows = chromium.run("return document.querySelectorAll('#modules [data-row]').length")
    chromium.run("document.querySelector('#modules [data-row=\"layer 1\"]').dispatchEvent(new Event('click'))")
    chromium.wait(f"document.querySelectorAll('#modules [data-row]').length > {rows}")
    shots = Path(os.environ.get("KTFX_SCREENSHOTS") or tmp_path)
    dark = chromium.run("return matchMedia('(prefers-color-scheme: dark)').matches")
    chromium.screenshot(shots / f"graph-{'dark' if dark else 'light'}.png")
    chromium.run("document.querySelector('[data-tab=partitions]').click()")
    assert chromium.wait("document.querySelectorAll('#units tr').length - 1") == len(graph.built.units)
    assert "shared" in chromium.run("return document.getElementById('units').textContent")
    chromium.run("document.querySelector('[data-tab=timeline]').click()")
    assert chromium.wait("document.querySelectorAll('#lanes .lane span').length") == len(graph.built.program.steps)
    chromium.run("document.querySelector('[data-tab=about]').click()")
    assert "ktfx trace" in chromium.wait("document.getElementById('main').textContent")
    assert chromium.console() == []


@needs_browser
def test_a_link_to_nowhere_opens_the_start(page: Path, chromium: browser.Browser) -> None:
    chromium.open("about:blank")
    chromium.open(page.as_uri() + "#g=9&tab=nothing&p=77&r=5&n=nobody")
    chromium.wait("document.getElementById('count')")
    assert chromium.run("return document.getElementById('count').textContent").startswith("step 1 of")
    assert chromium.console() == []

"""The page and the record of a measurement: what they say, and how the page looks in a browser, wide and narrow."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

from slipstream.bench.plots import Plot, Series, svg_of, ticks
from slipstream.bench.report import Report, Table, facts_here, to_html, to_markdown
from slipstream.bench.run_plots import in_flight, plots_of, rounds_of
from slipstream.bench.timeline import Run, Timeline
from tests.serve.browser import chromium


def run_of(load: str, count: int) -> Run:
    return Run(load, [
        Timeline(0.1 * k, 8, num_output=4, arrivals=[0.1 * k + 0.2 + 0.05 * (n + k) for n in range(4)],
                 ended=0.1 * k + 0.6 + 0.05 * k) for k in range(count)
    ])  # fmt: skip


RUNS = [run_of("1 clients", 3), run_of("8 clients", 9)]
TITLE = "a <model> & more at http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def report() -> Report:
    columns = ("load", *(f"number {index}" for index in range(14)))
    rows = [(run.load, *range(1000, 1014)) for run in RUNS]
    facts = facts_here(["bench", "serve", "http://127.0.0.1:8000", "--api_key", "secret-1", "--api_key=secret-2"])
    return Report(
        TITLE, facts, [Table("Loads", columns, rows)], [*plots_of(RUNS), *rounds_of(["a", "b"], [RUNS, RUNS])]
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_in_a_browser(report: Report, browser: Browser, tmp_path: Path, width: int, scheme: str) -> None:
    file = tmp_path / "report.html"
    file.write_text(to_html(report), encoding="utf-8")
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
    page, problems = context.new_page(), list[str]()
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: request.url == file.as_uri() or problems.append(request.url))
    page.goto(file.as_uri())
    assert page.locator("h1").inner_text() == TITLE
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # a wide table scrolls inside its own box
    assert page.locator("svg").count() == 6
    for box in (page.locator("svg").nth(index).bounding_box() for index in range(6)):
        assert box is not None and box["width"] > 300 and box["x"] >= 0 and box["x"] + box["width"] <= width
    texts = page.locator("svg").first.locator("text").all_text_contents()
    assert "output tokens/s" in texts and "TTFT, ms" in texts and "0" in texts
    assert page.locator("td").all_inner_texts()[:2] == ["1 clients", "1000"]
    found = Axe().run(page, options={"resultTypes": ["violations"]})
    assert found.violations_count == 0, found.generate_report()
    context.close()
    assert problems == []


def test_the_record_says_where_and_how(report: Report) -> None:
    text = to_markdown(report)
    assert text.startswith(f"# {TITLE}\n")
    for name in ("date", "machine", "load", "version", "command"):
        assert re.search(rf"^- {name}: \S", text, re.MULTILINE)
    assert "`slipstream bench serve http://127.0.0.1:8000 --api_key *** --api_key=***`" in text
    assert "secret" not in text + to_html(report)
    assert "| 8 clients | 1000 | 1001 |" in text
    assert re.search(r"commit [0-9a-f]{7,}", text)


def test_nothing_in_the_page_is_taken_for_markup_or_asked_of_others(report: Report) -> None:
    page = to_html(report)
    assert "<model>" not in page and "&lt;model&gt; &amp; more" in page
    assert not re.search(r"(src|href)=|url\(|@import|<script", page)


def test_in_flight_counts_those_who_wait() -> None:
    run = Run("x", [Timeline(1.0, ended=3.0), Timeline(2.0, ended=5.0), Timeline(5.0, ended=6.0)])
    assert in_flight(run).points == [(0, 1), (1, 2), (2, 1), (4, 0), (4, 1), (5, 0)]


@pytest.mark.parametrize(
    ("most", "expected"),
    [(0, [0, 1]), (1, [0, 0.2]), (7, [0, 2]), (12, [0, 2]), (33, [0, 10]), (100, [0, 20]), (0.03, [0, 0.005])],
)
def test_ticks_are_round_and_reach_the_largest(most: float, expected: list[float]) -> None:
    found = ticks(most)
    assert found[:2] == pytest.approx(expected) and found[-1] >= most and 2 <= len(found) <= 7


def test_a_plot_is_drawn_to_scale() -> None:
    svg = svg_of(Plot("p", "x", "y", [Series("s", [(0, 0), (10, 100)], labels=["a", "b"])]))
    (x0, y0), (x1, y1) = (map(float, each) for each in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg))
    assert (x0, y0, x1, y1) == (62, 256, 546, 12)
    assert "NaN" not in svg_of(Plot("empty", "x", "y", [Series("s", [])]))

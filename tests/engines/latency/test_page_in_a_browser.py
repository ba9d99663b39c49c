"""The page as a person sees it: in Chromium, on a phone and on a desk, by day and by night."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from reports import RATIOS, point, report

from engines.latency.page import page
from engines.latency.report import Load
from engines.latency.verdict import MERGED

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHONE, DESK = {"width": 400, "height": 740}, {"width": 1280, "height": 900}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

# The contrast of an element's text with what lies behind it: https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio
CONTRAST = """element => {
  const channels = colour => colour.match(/[\\d.]+/g).map(Number);
  const linear = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  let behind = element, colour;
  do {
    colour = channels(getComputedStyle(behind).backgroundColor);
    behind = behind.parentElement;
  } while (colour[3] === 0 && behind);
  const [one, other] = [light(channels(getComputedStyle(element).color)), light(colour)].sort((a, b) => b - a);
  return (one + .05) / (other + .05);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(
    params=[(size, scheme) for size in (PHONE, DESK) for scheme in ("light", "dark")],
    ids=lambda given: f"{given[0]['width']} px, {given[1]}",
)
def seen(request: pytest.FixtureRequest, browser: Any, tmp_path: Path) -> Iterator[tuple[Any, list[str], list[str]]]:
    """The page of a long report, opened; every address that was asked for; every complaint of the console."""
    size, scheme = request.param
    long_name = "a-name-that-goes-on-and-on-without-any-place-to-break-it"
    made = report(
        replace(
            point(cpu=True), help="CPU time decides here: --clock cpu", instructions={"base": 10**9, MERGED: 10**9}
        ),
        point({**RATIOS, MERGED: 1.05, long_name: 1.2}, load=Load(32, 512, tokens=64)),
        left_out={"unmerged": f"'{long_name}' has none"},
    )
    (tmp_path / "report.html").write_text(page(made), encoding="utf-8")
    opened = browser.new_page(viewport=size, color_scheme=scheme)
    asked: list[str] = []
    complaints: list[str] = []
    opened.on("request", lambda sent: asked.append(sent.url))
    opened.on("console", lambda message: complaints.append(message.text))
    opened.goto((tmp_path / "report.html").as_uri())
    yield opened, asked, complaints
    opened.close()


def test_no_request_leaves_the_page_and_nothing_complains(seen: tuple[Any, list[str], list[str]]):
    opened, asked, complaints = seen
    assert [address for address in asked if not address.endswith("/report.html")] == []
    assert complaints == []
    assert len(asked) == 1
    assert opened.title().startswith("slower: latency of movies")


def test_the_page_does_not_scroll_sideways(seen: tuple[Any, list[str], list[str]]):
    opened, _, _ = seen
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_verdict_is_on_the_first_screen(seen: tuple[Any, list[str], list[str]]):
    opened, _, _ = seen
    box = opened.locator(".verdict").first.bounding_box()
    assert box["y"] + box["height"] < opened.viewport_size["height"]
    assert opened.locator(".verdict").first.inner_text().lower() == "slower"


def test_every_text_stands_out_and_is_large_enough(seen: tuple[Any, list[str], list[str]]):
    opened, _, _ = seen
    for selector in (
        "p",
        ".note",
        "small",
        "h1",
        ".verdict",
        ".row b",
        ".row .words span span",
        ".axis span",
        "th",
        "td",
        "dt",
        "dd",
        "caption",
    ):
        for element in opened.locator(selector).all():
            assert element.evaluate(CONTRAST) >= 4.5, (selector, element.inner_text())
            assert float(element.evaluate("element => parseFloat(getComputedStyle(element).fontSize)")) >= 12


def test_labels_of_an_axis_do_not_run_into_one_another(seen: tuple[Any, list[str], list[str]]):
    opened, _, _ = seen
    for axis in opened.locator(".axis").all():
        boxes = sorted((label.bounding_box() for label in axis.locator("span").all()), key=lambda box: box["x"])
        assert len(boxes) >= 2
        assert all(left["x"] + left["width"] <= right["x"] for left, right in pairwise(boxes))


def test_marks_are_drawn(seen: tuple[Any, list[str], list[str]]):
    opened, _, _ = seen
    for plot in opened.locator(".plot svg").all():
        assert plot.bounding_box()["width"] > 250
    # Of two loads, the first by both clocks: every arm but the base, one arm more in the second, and two answers.
    assert opened.locator(".interval").count() == 2 * (len(RATIOS) - 1) + len(RATIOS) + 2
    assert opened.locator(".interval.cpu").count() == len(RATIOS)

"""The page and the Markdown: every figure is the report's, nothing is fetched, and a hostile name is only a name."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from reports import RATIOS, point, report

from engines.latency.markdown import markdown
from engines.latency.page import page
from engines.latency.report import DeviceTimes, Load, Report
from engines.latency.verdict import AGAIN, BASE, MERGED, UNMERGED

HOSTILE = '<script>alert("1")</script>|`x`'


class Parsed(HTMLParser):
    """The page's tags with their attributes, its text, and its tables' cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "rect", "line"):
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text.append(data)
            if self._open and self._open[-1] in ("td", "th"):
                self.rows[-1].append(data)


def parsed(made: Report) -> Parsed:
    return Parsed(page(made))


def test_every_figure_of_the_table_is_the_reports():
    made = report(point(rounds=120))
    header, *rows = parsed(made).rows
    assert header[:4] == ["arm", "p50 ms", "p90 ms", "p99 ms"]
    for row, reading in zip(rows, made.points[0].readings, strict=True):
        at_p90 = reading.ratio_p90
        assert reading.p99 is not None
        assert row == [
            reading.arm,
            *(f"{value:.3f}" for value in (reading.p50, reading.p90, reading.p99)),
            f"{reading.rate:.1f}",
            f"{reading.opening:.1f}",
            f"{reading.first:.2f}",
            f"{at_p90.median:.4f} [{at_p90.low:.4f}, {at_p90.high:.4f}]",
        ]


def test_the_devices_own_times_are_shown_where_there_are_any():
    there = replace(
        point(), device=(DeviceTimes("merged", 0.0123, 1.2345, 0.0678), DeviceTimes(HOSTILE, 1.0, 2.0, 3.0))
    )
    rows = Parsed(page(report(there))).rows
    assert ["merged", "0.012", "1.234", "0.068"] in rows
    assert [HOSTILE, "1.000", "2.000", "3.000"] in rows
    assert "| merged | 0.012 | 1.234 | 0.068 |" in markdown(report(there)).splitlines()
    assert "<script" not in markdown(report(there))
    for shown in (page, markdown):
        assert "on the device" not in shown(report()).lower()


def test_verdict_reasons_and_every_ratio_are_in_words():
    made = report(point(), point({**RATIOS, MERGED: 1.05}, load=Load(8, 16)))
    text = " ".join(parsed(made).text)
    assert made.verdict == "slower"
    for one in made.points:
        assert f"{one.load}:" in text
        assert one.reason in text
        for reading in one.readings[1:]:
            assert f"{reading.ratio.median:.4f} [{reading.ratio.low:.4f}, {reading.ratio.high:.4f}]" in text


def test_both_clocks_are_drawn_and_the_one_that_decides_is_named():
    made = report(point(cpu=True))
    found = parsed(made)
    text = " ".join(found.text)
    drawn = [attributes.get("class") for tag, attributes in found.tags if tag == "line"]
    assert drawn.count("interval wall") == len(RATIOS) - 1
    assert drawn.count("interval cpu") == len(RATIOS)  # and the answer
    assert text.count("CPU time, which decides") == len(RATIOS) - 1
    assert f"By itself, the wall clock says {made.verdict}: " in text
    assert {"By the wall clock", "By CPU time"} <= set(found.text)
    assert "| merged | CPU |" in markdown(made)
    assert "CPU time" not in " ".join(parsed(report()).text)


def test_no_arm_has_a_word_where_the_null_control_failed():
    made = report(replace(point(spread=0.1), help="pin a core"))
    text = " ".join(parsed(made).text)
    for shown in (text, markdown(made)):
        assert "No figure: the base against itself is not within the margin" in shown
        assert shown.count("not said") >= len(RATIOS) - 2
        assert "pin a core" in shown
        assert "Merged takes" not in shown


def test_instructions_are_shown_where_they_were_counted():
    counted = report(replace(point(), instructions={BASE: 10_000, MERGED: 10_001, UNMERGED: 10_143}))
    assert [MERGED, "10,001", "+0.010 %"] in parsed(counted).rows
    assert "| unmerged | 10143 | +1.430 % |" in markdown(counted).splitlines()
    assert "nstructions of" not in page(report()) + markdown(report())


def test_nothing_is_fetched_and_nothing_runs():
    html = page(report())
    assert "default-src 'none'" in html
    assert re.findall(r"https?:|//|@import|url\(", html) == []
    assert not {tag for tag, _ in Parsed(html).tags} & {"script", "link", "img", "iframe", "object"}


def test_hostile_names_are_only_names():
    made = report(
        point({**RATIOS, HOSTILE: 1.0}),
        subject=HOSTILE,
        left_out={HOSTILE: HOSTILE},
        machine={HOSTILE: HOSTILE},
        digests={HOSTILE: HOSTILE},
    )
    found = parsed(made)
    assert "script" not in {tag for tag, _ in found.tags}
    assert "".join(found.text).count(HOSTILE) >= 4
    table = [line for line in markdown(made).splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {8}
    assert "<script" not in markdown(made)


def test_every_chart_says_in_words_what_it_shows():
    labels = [attributes.get("aria-label") for tag, attributes in parsed(report()).tags if tag == "svg"]
    assert len(labels) == 1 + len(RATIOS) - 1 + len(RATIOS)  # the answer, the ratios, the times
    assert all(labels)
    merged = report().points[0].reading(MERGED)
    assert (
        f"merged by the wall clock: {merged.ratio.median:.4f} of the base's time, between {merged.ratio.low:.4f} and"
        f" {merged.ratio.high:.4f}: {merged.decision}" in labels
    )


@pytest.mark.parametrize(
    "made",
    [
        report(point({BASE: 1, AGAIN: 1, MERGED: 1}, sets=6, rounds=1)),
        report(point({BASE: 1, AGAIN: 1, MERGED: 1}, spread=0)),
        report(point({BASE: 1, AGAIN: 1, MERGED: 30})),
        report(point({BASE: 1, AGAIN: 1, MERGED: 0.01})),
        report(point(sets=200, rounds=5)),
        report(*(point(load=Load(batch, 8)) for batch in range(1, 9))),
    ],
    ids=["one round", "identical times", "thirty times slower", "a hundred times faster", "200 sets", "eight loads"],
)
def test_every_place_is_on_the_chart(made: Report):
    tags = parsed(made).tags
    places = [float(attributes[end] or "nan") for tag, attributes in tags if tag == "line" for end in ("x1", "x2")]
    places += [
        float(attributes["x"] or "nan") + float(attributes["width"] or "nan")
        for tag, attributes in tags
        if tag == "rect"
    ]
    assert places
    assert all(0 <= place <= 100.01 for place in places)
    assert markdown(made).count("| merged |") == len(made.points)


def test_the_margin_is_where_it_belongs():
    made = report(point({BASE: 1, AGAIN: 1, MERGED: 1.0099}, spread=0))
    tags = parsed(made).tags
    band = [attributes for tag, attributes in tags if tag == "rect" and attributes.get("class") == "band"][1]
    _, *middles = [float(attributes["x1"] or "nan") for tag, attributes in tags if attributes.get("class") == "middle"]
    right = float(band["x"] or "nan") + float(band["width"] or "nan")
    assert float(band["x"] or "nan") < middles[0] < middles[1] < right
    assert right - middles[1] < 0.02 * (right - middles[0])


def test_times_beyond_the_axis_are_counted():
    made = report(point({BASE: 1, AGAIN: 1, MERGED: 1, UNMERGED: 1}))
    made.points[0].samples.runs[0][0][2] = 10**12
    assert any(
        "of them beyond the axis" in (attributes.get("aria-label") or "") for tag, attributes in parsed(made).tags
    )
    assert " ".join(parsed(made).text).count("beyond the axis") >= 1


@pytest.mark.parametrize(
    ("digests", "said"),
    [({BASE: "0", MERGED: "0"}, "are the same"), ({BASE: "0", MERGED: "1"}, "GRAPH DIFFER"), ({}, "not compared")],
)
def test_the_graphs_digests_are_put_into_words(digests: dict[str, str], said: str):
    assert said in " ".join(parsed(report(digests=digests)).text)


def test_the_same_report_gives_the_same_bytes():
    assert page(report()) == page(report())

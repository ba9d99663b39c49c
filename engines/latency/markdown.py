"""The report as Markdown: for a pull request's comment."""

from __future__ import annotations

from engines.latency import words
from engines.latency.report import Point, Report


def markdown(report: Report) -> str:
    """A heading with the verdict, and a table for each load."""
    return "\n".join(
        [
            (
                f"## {report.verdict.capitalize()}: latency of {_plain(report.subject)}, at a margin of"
                f" {report.margin:.3g}"
            ),
            *map(_section, report.points),
        ]
    )


def _section(point: Point) -> str:
    rows = [
        f"| {_plain(r.arm)} | {clock} | {r.p50:.3f} | {r.p90:.3f} | {r.ratio.median:.4f} | [{r.ratio.low:.4f},"
        f" {r.ratio.high:.4f}] | {r.decision} |"
        for clock, readings in (("wall", point.readings), ("CPU", point.by_cpu))
        for r in readings
    ]
    head = ["| arm | clock | p50 ms | p90 ms | ratio to base | interval | |", "|---|---|---|---|---|---|---|"]
    said = [text for text in (words.headline(point), words.beside(point), point.help) if text]
    return "\n".join(
        [
            "",
            f"**{point.load}**: {point.verdict}; {point.reason}",
            *said,
            "",
            *head,
            *rows,
            "",
            *_counted(point),
            *_device(point),
        ]
    )


def _counted(point: Point) -> list[str]:
    if not point.instructions:
        return []
    rows = [
        f"| {_plain(arm)} | {count} | {words.counted(point.instructions, arm)} |"
        for arm, count in point.instructions.items()
    ]
    return ["| instructions of a run | | beside the base |", "|---|---|---|", *rows, ""]


def _device(point: Point) -> list[str]:
    if not point.device:
        return []
    rows = [f"| {_plain(d.arm)} | {d.copies_there:.3f} | {d.engine:.3f} | {d.copies_back:.3f} |" for d in point.device]
    return ["| on the device | copies there ms | engine ms | copies back ms |", "|---|---|---|---|", *rows, ""]


def _plain(name: str) -> str:
    """Without what Markdown or HTML would take for its own."""
    return name.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("`", "'").replace("\n", " ")

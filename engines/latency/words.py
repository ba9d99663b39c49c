"""What a report says in sentences: the same on the terminal, on the page and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from engines.latency.clocks import NAMES
from engines.latency.equivalence import Ratio
from engines.latency.report import Point
from engines.latency.verdict import BASE, MERGED


def headline(point: Point) -> str:
    """The figure that the verdict rests on; none where the null control failed, for then it says nothing."""
    merged = point.reading(MERGED, point.clock)
    if merged.decision == "not said":
        return "No figure: the base against itself is not within the margin, so no arm's can be believed."
    return f"Merged takes {interval(merged.ratio)} of the base's time, by {NAMES[point.clock]}."


def beside(point: Point) -> str:
    """What the other clock says by itself; nothing where there is none."""
    others = [said for said in point.said if said.clock != point.clock]
    return " ".join(f"By itself, {NAMES[said.clock]} says {said.verdict}: {said.reason}." for said in others)


def proof(digests: Mapping[str, str]) -> str:
    """What the digests of the graphs prove without a clock."""
    if MERGED not in digests or BASE not in digests:
        return "The graphs of base and merged were not compared."
    if digests[MERGED] == digests[BASE]:
        return (
            "Merged and unadapted graph are the same: the same nodes, edges and shapes, by their digest"
            f" {digests[MERGED][:12]}. Only weights differ. This proof needs no clock."
        )
    return (
        "MERGED AND UNADAPTED GRAPH DIFFER: they do not compute the same nodes, and this is no proof that merging costs"
        " nothing."
    )


def counted(instructions: Mapping[str, int], arm: str) -> str:
    """An arm's instructions beside the base's, in per cent; nothing where they were not counted."""
    if arm not in instructions or not instructions.get(BASE):
        return "–"
    return f"{100 * (instructions[arm] / instructions[BASE] - 1):+.3f} %"


def interval(ratio: Ratio) -> str:
    """A ratio with its bounds."""
    return f"{ratio.median:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]"

"""``lorafuse bench compare``: two reports, arm by arm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engines.commands.options import (
    AsJson,
    Margin,
)
from engines.commands.terminal import DONE, NO, UNDECIDED, print_json, print_table


def compare_reports(
    first: Annotated[Path, typer.Argument(help="A report that --out wrote.")],
    second: Annotated[Path, typer.Argument(help="Another, of another machine or version.")],
    margin: Margin = "1%",
    as_json: AsJson = False,
) -> None:
    """Compare two reports, arm by arm: times, and what each arm costs beside its own base.

    Exit status 0: no arm is slower; 1: one is slower by more than the margin; 2: undecided.

    Example: lorafuse bench compare before.json after.json
    """
    from dataclasses import asdict

    from engines.latency.compare import compare
    from engines.latency.report import read_report
    from engines.latency.words import interval

    compared = compare(read_report(first), read_report(second), margin)
    if as_json:
        print_json([asdict(one) for one in compared])
    else:
        rows = [
            (
                one.arm,
                str(one.load),
                f"{one.before:.3f}",
                f"{one.after:.3f}",
                interval(one.time),
                interval(one.cost) if one.cost else "-",
                one.decision,
            )
            for one in compared
        ]
        print_table(
            f"{second} against {first}",
            ("arm", "load", "ms before", "ms after", "time", "cost beside its base", f"at {margin:.1%}"),
            rows,
        )
    decisions = {one.decision for one in compared}
    raise typer.Exit(NO if "slower" in decisions else UNDECIDED if "inconclusive" in decisions else DONE)

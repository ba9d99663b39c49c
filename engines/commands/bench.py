"""``lorafuse bench``: the group of its commands. ``lorafuse bench BUNDLE`` is the verdict."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from engines.commands.bench_compare import compare_reports
from engines.commands.bench_serve import serve
from engines.commands.bench_verdict import verdict

VERDICT = "verdict"


class _VerdictUnlessNamed(TyperGroup):
    """``lorafuse bench BUNDLE`` is ``lorafuse bench verdict BUNDLE``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = bool(args) and (args[0] in self.commands or args[0] == "--help")
        return list(super().parse_args(ctx, args if named else [VERDICT, *args]))


app = typer.Typer(cls=_VerdictUnlessNamed)


@app.callback()
def bench() -> None:
    """Time a task's engine: ``lorafuse bench BUNDLE --task TASK`` says whether merging cost latency.

    Example: lorafuse bench bundle --task movies
    """


app.command(VERDICT)(verdict)
app.command()(serve)
app.command("compare")(compare_reports)

"""What every command prints: results on stdout, progress on stderr, an expected error in one line."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lora.progress import Progress
from lora.wording import printable

DONE, NO, UNDECIDED, BAD_INPUT = 0, 1, 2, 3


def print_json(value: Any) -> None:
    """One JSON document on stdout. JSON has no word for NaN and the infinities: they are null."""
    sys.stdout.write(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(held) for key, held in value.items()}
        case list() | tuple():
            return [_finite(held) for held in value]
    return value


def print_error(message: str) -> None:
    """One line on stderr, whatever the message holds."""
    sys.stderr.write(f"lorafuse: {printable(' '.join(message.split()))}\n")


def print_note(message: str) -> None:
    """A line on stderr that is no error."""
    sys.stderr.write(f"{printable(message)}\n")


def print_table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A table on stdout; columns after the first are right-aligned where every cell starts with a digit or sign."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        numeric = index > 0 and all(row[index][:1] in "0123456789+-" for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    wide = None if sys.stdout.isatty() else 250  # a file or a pipe has no width to fold to
    console = Console(markup=False, width=wide)
    console.print(
        printable(title), style="bold", highlight=False
    )  # not as the table's own, which would fold it to the table's width
    console.print(table)


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """A live line on stderr with the current step and the time it has taken; silent where stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def show(step: str, share: float | None = None, /) -> None:
            bar.update(
                task, description=f"{title}: {step}", total=None if share is None else 1.0, completed=share or 0.0
            )

        yield show

"""Texts and their targets, out of a file.

CSV, JSON lines, parquet, or a folder that Hugging Face's datasets saved.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lora.errors import CheckpointError

Kind = Literal["classification", "regression", "causal-lm"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LARGEST = 1e15  # of numbers that are learnt: the loss sums their squares in float32, which ends at 3e38


@dataclass(frozen=True)
class Columns:
    """The names of the columns of text and target.

    A causal language model's target is the text that follows.
    """

    text: str = "text"
    target: str = "label"


@dataclass(frozen=True)
class Examples:
    """Texts with their targets: a class's index, a number, or the text that follows ("" to learn the whole text)."""

    texts: tuple[str, ...]
    targets: tuple[Any, ...]
    labels: tuple[str, ...] = ()  # of a classification, in the order of the indices

    def __len__(self) -> int:
        return len(self.texts)

    def chosen(self, indices: Sequence[int]) -> Examples:
        """Those examples."""
        return Examples(
            tuple(self.texts[index] for index in indices), tuple(self.targets[index] for index in indices), self.labels
        )


def read_examples(path: Path, kind: Kind, columns: Columns, labels: Sequence[str] = ()) -> Examples:
    """Read the examples. ``labels`` are the classes, where another file has already said them.

    Raises CheckpointError naming the file, and the row, where a file can't be read, is empty, lacks a column, or holds
    an empty text, a target that is not a number, or a class that is not among ``labels``.
    """
    table = _table(path)
    texts = _column(path, table, columns.text)
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip() or not _is_unicode(text):
            raise CheckpointError(
                f"{path}: row {row + 1} has no text in column '{columns.text}' ({text!r:.40}); remove it, or name"
                " another column"
            )
    match kind:
        case "classification":
            named = [
                _class_name(path, columns.target, row, value)
                for row, value in enumerate(_column(path, table, columns.target))
            ]
            classes = tuple(labels) or tuple(sorted(set(named)))
            return Examples(
                tuple(texts),
                tuple(_index(path, columns.target, row, name, classes) for row, name in enumerate(named)),
                classes,
            )
        case "regression":
            return Examples(
                tuple(texts),
                tuple(
                    _number(path, columns.target, row, value)
                    for row, value in enumerate(_column(path, table, columns.target))
                ),
            )
        case "causal-lm":
            following = _column(path, table, columns.target) if columns.target in table.names else [""] * len(texts)
            return Examples(
                tuple(texts), tuple(_following(path, columns.target, row, value) for row, value in enumerate(following))
            )


def held_out(examples: Examples, share: float, path: Path) -> tuple[Examples, Examples]:
    """(training, validation): the texts with the lowest hashes are held out, whatever their order in the file."""
    order = sorted(range(len(examples)), key=lambda index: hashlib.sha256(examples.texts[index].encode()).digest())
    count = max(1, round(share * len(examples)))
    if count >= len(examples):
        raise CheckpointError(
            f"{path}: {len(examples)} examples are too few to hold some out; give more, or another file with"
            " --validation"
        )
    return examples.chosen(sorted(order[count:])), examples.chosen(sorted(order[:count]))


@dataclass(frozen=True)
class _Table:
    """The columns' names, and a column by its name: as strings of a CSV file, else as the file has its values."""

    names: tuple[str, ...]
    rows: int
    column: Callable[[str], list[Any]]


def _table(path: Path) -> _Table:
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file; give a .csv, .tsv, .jsonl, .json or .parquet file, or a folder of Hugging Face's"
            " datasets"
        )
    read = _reader(path)
    try:
        table = read(path)
    except CheckpointError:
        raise
    except Exception as error:  # of pandas, pyarrow and datasets, each with classes of its own
        reason = " ".join(str(error.__cause__ or error).split())
        raise CheckpointError(f"{path}: can't be read as a table ({reason[:160]})") from error
    if table.rows == 0:
        raise CheckpointError(f"{path}: has no rows; give examples to train on")
    return table


def _reader(path: Path) -> Callable[[Path], _Table]:
    if path.is_dir():
        return _from_datasets
    if path.suffix not in READERS:
        raise CheckpointError(
            f"{path}: not a kind of file that is known; expected {', '.join(READERS)}, or a folder of Hugging Face's"
            " datasets"
        )
    return READERS[path.suffix]


def _from_csv(path: Path) -> _Table:
    import pandas

    # The names as a row like the others: pandas takes the first column of rows with a field too many for their index,
    # and
    # what has no name for no column. As strings: numbers would lose their zeros.
    separator = "\t" if path.suffix == ".tsv" else ","
    frame = pandas.read_csv(path, sep=separator, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    names = tuple(frame.iloc[0])
    return _Table(names, len(frame) - 1, lambda name: list(frame[names.index(name)].iloc[1:]))


def _from_json_lines(path: Path) -> _Table:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number}: {error.msg}") from None
    return _of_rows(rows)


def _from_json(path: Path) -> _Table:
    """A list of rows; or columns, each a list or, as pandas writes them, an object by rows."""
    found = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(found, dict):
        return _of_rows(found)
    columns = {name: list(values.values()) if isinstance(values, dict) else values for name, values in found.items()}
    if (
        not all(isinstance(values, list) for values in columns.values())
        or len({len(values) for values in columns.values()}) > 1
    ):
        raise ValueError("expected a list of objects, or columns of one length")
    return _Table(tuple(columns), max(map(len, columns.values()), default=0), lambda name: columns[name])


def _of_rows(rows: Any) -> _Table:
    """What a row lacks is None."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected an object in every row")
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    return _Table(names, len(rows), lambda name: [row.get(name) for row in rows])


def _from_parquet(path: Path) -> _Table:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    return _Table(tuple(table.column_names), table.num_rows, lambda name: list(table.column(name).to_pylist()))


def _from_datasets(path: Path) -> _Table:
    import datasets

    datasets.disable_progress_bars()
    table = datasets.load_from_disk(str(path))
    if isinstance(table, dict):
        raise CheckpointError(f"{path}: holds several splits ({', '.join(table)}); give the folder of one")
    return _Table(tuple(table.column_names), len(table), lambda name: list(table[name]))


READERS: dict[str, Callable[[Path], _Table]] = {
    ".csv": _from_csv,
    ".tsv": _from_csv,
    ".jsonl": _from_json_lines,
    ".json": _from_json,
    ".parquet": _from_parquet,
}


def _column(path: Path, table: _Table, name: str) -> list[Any]:
    if name not in table.names:
        raise CheckpointError(
            f"{path}: has no column '{name}'; it has {', '.join(table.names)}; name one with --text or --target"
        )
    if table.names.count(name) > 1:
        raise CheckpointError(f"{path}: has {table.names.count(name)} columns '{name}'; rename all but one")
    return table.column(name)


def _is_unicode(text: str) -> bool:
    """JSON may hold one half of a pair of surrogates, which is no character."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _is_missing(value: Any) -> bool:
    """None or not a number; and what can't be one value: a list or an object."""
    return value is None or value != value or isinstance(value, list | dict)


def _following(path: Path, column: str, row: int, value: Any) -> str:
    if _is_missing(value) or not _is_unicode(str(value)):
        raise CheckpointError(
            f"{path}: row {row + 1} has no text in column '{column}' ({value!r:.40}); remove it, or give the text that"
            " follows"
        )
    return str(value)


def _class_name(path: Path, column: str, row: int, value: Any) -> str:
    name = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    if _is_missing(value) or not name or not _is_unicode(name):
        raise CheckpointError(
            f"{path}: row {row + 1} has no class in column '{column}'; remove it, or name another column"
        )
    return name


def _index(path: Path, column: str, row: int, name: str, classes: Sequence[str]) -> int:
    if name not in classes:
        raise CheckpointError(
            f"{path}: row {row + 1} is of the class '{name}' (column '{column}'), which is none of {', '.join(classes)}"
        )
    return classes.index(name)


def _number(path: Path, column: str, row: int, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise CheckpointError(
            f"{path}: row {row + 1} has no number in column '{column}' ({value!r:.40}); remove it, or name another"
            " column"
        )
    if abs(number) > LARGEST:
        raise CheckpointError(
            f"{path}: row {row + 1} has {number:g} in column '{column}', more than {LARGEST:g}; write the numbers in a"
            " larger unit"
        )
    return number

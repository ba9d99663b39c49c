"""Texts and what they should give, out of a file: CSV, JSON lines, parquet, or a folder that Hugging Face's datasets saved."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lora.errors import CheckpointError

Kind = Literal["classification", "regression", "causal-lm"]
KINDS: tuple[Kind, ...] = get_args(Kind)
READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Columns:
    """What the columns of the text and of the target are called; of a causal language model, the target is what follows the text."""

    text: str = "text"
    target: str = "label"


@dataclass(frozen=True)
class Examples:
    """Texts with their targets: a class's index, a number, or the text that follows ("" where a whole text is learnt)."""

    texts: tuple[str, ...]
    targets: tuple[Any, ...]
    labels: tuple[str, ...] = ()  # of a classification, in the order of the indices

    def __len__(self) -> int:
        return len(self.texts)

    def chosen(self, indices: Sequence[int]) -> Examples:
        """Those examples."""
        return Examples(tuple(self.texts[index] for index in indices), tuple(self.targets[index] for index in indices), self.labels)


def read_examples(path: Path, kind: Kind, columns: Columns, labels: Sequence[str] = ()) -> Examples:
    """Read the examples. ``labels`` are the classes, where another file has already said them.

    Raises CheckpointError naming the file, and the row, where a file can't be read, is empty, lacks a column, or holds a text
    that is none, a number that is none, or a class that ``labels`` lack.
    """
    table = _table(path)
    texts = _column(path, table, columns.text)
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise CheckpointError(f"{path}: row {row + 1} has no text in column '{columns.text}' ({text!r:.40}); remove it, or name another column")
    match kind:
        case "classification":
            named = [_class_name(path, columns.target, row, value) for row, value in enumerate(_column(path, table, columns.target))]
            classes = tuple(labels) or tuple(sorted(set(named)))
            return Examples(tuple(texts), tuple(_index(path, columns.target, row, name, classes) for row, name in enumerate(named)), classes)
        case "regression":
            return Examples(tuple(texts), tuple(_number(path, columns.target, row, value) for row, value in enumerate(_column(path, table, columns.target))))
        case "causal-lm":
            following = _column(path, table, columns.target) if columns.target in table.column_names else [""] * len(texts)
            return Examples(tuple(texts), tuple(str(text) for text in following))


def held_out(examples: Examples, share: float, path: Path) -> tuple[Examples, Examples]:
    """(training, validation): the texts with the lowest hashes are held out, whatever their order in the file."""
    order = sorted(range(len(examples)), key=lambda index: hashlib.sha256(examples.texts[index].encode()).digest())
    count = max(1, round(share * len(examples)))
    if count >= len(examples):
        raise CheckpointError(f"{path}: {len(examples)} examples are too few to hold some out; give more, or another file with --validation")
    return examples.chosen(sorted(order[count:])), examples.chosen(sorted(order[:count]))


def _table(path: Path) -> Any:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; give a .csv, .tsv, .jsonl, .json or .parquet file, or a folder of Hugging Face's datasets")
    read = _reader(path)
    try:
        table = read()
    except Exception as error:  # of pandas, pyarrow and datasets, each with classes of its own
        reason = " ".join(str(error.__cause__ or error).split())
        raise CheckpointError(f"{path}: can't be read as a table ({reason[:160]})") from error
    if isinstance(table, dict):
        raise CheckpointError(f"{path}: holds several splits ({', '.join(table)}); give the folder of one")
    if len(table) == 0:
        raise CheckpointError(f"{path}: has no rows; give examples to train on")
    return table


def _reader(path: Path) -> Callable[[], Any]:
    import datasets

    datasets.disable_progress_bars()
    if path.is_dir():
        return lambda: datasets.load_from_disk(str(path))
    if path.suffix not in READERS:
        raise CheckpointError(f"{path}: not a kind of file that is known; expected {', '.join(READERS)}, or a folder of Hugging Face's datasets")
    match READERS[path.suffix]:
        case "csv":
            import pandas

            # Not datasets' own reader, which keeps a copy of every file that it has read.
            return lambda: datasets.Dataset.from_pandas(pandas.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", keep_default_na=False))
        case "json":
            import pandas

            return lambda: datasets.Dataset.from_pandas(pandas.read_json(path, lines=path.suffix == ".jsonl", dtype=False, convert_dates=False))
    import pyarrow.parquet

    return lambda: datasets.Dataset(pyarrow.parquet.read_table(path))


def _column(path: Path, table: Any, name: str) -> list[Any]:
    if name not in table.column_names:
        raise CheckpointError(f"{path}: has no column '{name}'; it has {', '.join(table.column_names)}; name one with --text or --target")
    return list(table[name])


def _class_name(path: Path, column: str, row: int, value: Any) -> str:
    name = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    if value is None or not name.strip():
        raise CheckpointError(f"{path}: row {row + 1} has no class in column '{column}'; remove it, or name another column")
    return name


def _index(path: Path, column: str, row: int, name: str, classes: Sequence[str]) -> int:
    if name not in classes:
        raise CheckpointError(f"{path}: row {row + 1} is of the class '{name}' (column '{column}'), which is none of {', '.join(classes)}")
    return classes.index(name)


def _number(path: Path, column: str, row: int, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise CheckpointError(f"{path}: row {row + 1} has no number in column '{column}' ({value!r:.40}); remove it, or name another column")
    return number

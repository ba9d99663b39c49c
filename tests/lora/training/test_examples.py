"""Examples out of files of every kind; and what is wrong with a file is said with its row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

from lora.errors import CheckpointError
from lora.training.examples import Columns, Examples, held_out, read_examples

ROWS = [
    {"text": 'good, "very"', "label": "yes"},
    {"text": "bad\nindeed", "label": "no"},
    {"text": "NA", "label": "yes"},
]


@pytest.fixture(params=[".csv", ".tsv", ".jsonl", ".json", ".parquet", "a folder"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"examples{request.param if request.param.startswith('.') else ''}"
    table = pandas.DataFrame(ROWS)
    match request.param:
        case ".csv" | ".tsv":
            table.to_csv(path, sep="," if request.param == ".csv" else "\t", index=False)
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        case ".json":
            path.write_text(json.dumps(ROWS))
        case ".parquet":
            table.to_parquet(path)
        case _:
            datasets.Dataset.from_list(ROWS).save_to_disk(path)
    return path


def test_every_kind_of_file_gives_the_same(file: Path):
    assert read_examples(file, "classification", Columns()) == Examples(
        ('good, "very"', "bad\nindeed", "NA"), (1, 0, 1), ("no", "yes")
    )


def written(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_classes_may_be_numbers_and_columns_have_any_name(tmp_path: Path):
    path = written(tmp_path, [{"review": "a", "stars": 5}, {"review": "b", "stars": 1}])
    assert read_examples(path, "classification", Columns("review", "stars")) == Examples(("a", "b"), (1, 0), ("1", "5"))


def test_of_a_language_model_a_target_may_be_missing(tmp_path: Path):
    assert read_examples(written(tmp_path, [{"text": "a"}]), "causal-lm", Columns()).targets == ("",)
    assert read_examples(written(tmp_path, [{"text": "a", "label": " b"}]), "causal-lm", Columns()).targets == (" b",)


def test_what_a_csv_file_has_stays_as_it_is_written(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n7,01\n8,1.50\n9,NA\n")
    assert read_examples(path, "classification", Columns()) == Examples(
        ("7", "8", "9"), (0, 1, 2), ("01", "1.50", "NA")
    )
    assert read_examples(path, "causal-lm", Columns()).targets == ("01", "1.50", "NA")


@pytest.mark.parametrize("content", ["text,label\na,yes,\nb,no,\n", "text,label\na,yes\nWell, b,no\n"])
def test_a_row_with_a_field_too_many_is_refused(tmp_path: Path, content: str):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(
        CheckpointError, match=r"rows\.csv: can't be read as a table \(.*Expected 2 fields in line [23], saw 3\)"
    ):
        read_examples(path, "classification", Columns())


def test_two_columns_of_the_same_name_are_refused(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text("text,text,label\na,b,yes\n")
    with pytest.raises(CheckpointError, match="has 2 columns 'text'; rename all but one"):
        read_examples(path, "classification", Columns())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", "text,label\na,4\nb,x\n"),
        ("rows.jsonl", '{"text": "a", "label": 4}\n\n{"text": "b", "label": "x"}\n'),
        ("rows.json", '[{"text": "a", "label": 4.0}, {"text": "b", "label": " x"}]'),
        ("columns.json", '{"text": {"0": "a", "1": "b"}, "label": [4, "x"]}'),
    ],
)
def test_a_byte_order_mark_and_a_mixture_of_numbers_and_words_are_read(tmp_path: Path, name: str, content: str):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_examples(tmp_path / name, "classification", Columns()) == Examples(("a", "b"), (0, 1), ("4", "x"))


def test_numbers_keep_their_meaning_as_text(tmp_path: Path):
    assert read_examples(written(tmp_path, [{"text": "2 + 2 =", "label": 4}]), "causal-lm", Columns()).targets == ("4",)
    pandas.DataFrame({"text": ["2 + 2 ="], "label": [4]}).to_parquet(tmp_path / "rows.parquet")
    assert read_examples(tmp_path / "rows.parquet", "causal-lm", Columns()).targets == ("4",)


def test_a_class_that_is_not_a_number_is_named(tmp_path: Path):
    pandas.DataFrame({"text": ["a", "b", "c"], "label": [1.0, float("nan"), 0.0]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(CheckpointError, match="row 2 has no class in column 'label'"):
        read_examples(tmp_path / "rows.parquet", "classification", Columns())


@pytest.mark.parametrize(
    ("kind", "rows", "said"),
    [
        ("classification", [], "rows.jsonl: "),
        (
            "classification",
            [{"words": "a", "label": 1}],
            "has no column 'text'; it has words, label; name one with --text or --target",
        ),
        (
            "classification",
            [{"text": "a", "class": 1}],
            "has no column 'label'; it has text, class; name one with --text or --target",
        ),
        (
            "classification",
            [{"text": "a", "label": 1}, {"text": " ", "label": 1}],
            r"row 2 has no text in column 'text' \(' '\); remove it",
        ),
        (
            "classification",
            [{"text": 7, "label": 1}],
            r"row 1 has no text in column 'text' \(7\); remove it, or name another column",
        ),
        (
            "classification",
            [{"text": "a", "label": "x"}, {"text": "b", "label": ""}],
            "row 2 has no class in column 'label'",
        ),
        ("regression", [{"text": "a", "label": "much"}], r"row 1 has no number in column 'label' \('much'\)"),
        ("regression", [{"text": "a", "label": None}], "row 1 has no number in column 'label'"),
        (
            "regression",
            [{"text": "a", "label": -1e30}],
            r"row 1 has -1e\+30 in column 'label', more than 1e\+15; write the numbers in a larger unit",
        ),
        (
            "classification",
            [{"text": "a", "label": 1}, {"text": "b", "label": None}],
            "row 2 has no class in column 'label'",
        ),
        (
            "classification",
            [{"text": "a", "label": 1}, {"text": "b", "label": [2]}],
            "row 2 has no class in column 'label'",
        ),
        (
            "classification",
            [{"text": "a", "label": 1}, {"text": "\ud800", "label": 1}],
            "row 2 has no text in column 'text'",
        ),
        (
            "causal-lm",
            [{"text": "a", "label": " b"}, {"text": "a", "label": None}],
            r"row 2 has no text in column 'label' \(None\); remove it, or give",
        ),
        (
            "causal-lm",
            [{"text": "a"}, {"text": "a", "label": " b"}],
            r"row 1 has no text in column 'label' \(None\); remove it, or give the text",
        ),
        ("causal-lm", [{"text": "a", "label": ["b"]}], r"row 1 has no text in column 'label' \(\['b'\]\); remove it"),
    ],
)
def test_what_is_wrong_is_said_with_its_row(tmp_path: Path, kind: Any, rows: list[dict[str, Any]], said: str):
    with pytest.raises(CheckpointError, match=said) as refused:
        read_examples(written(tmp_path, rows), kind, Columns())
    assert str(refused.value).startswith(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_a_class_that_only_the_validation_file_has_is_refused(tmp_path: Path):
    with pytest.raises(
        CheckpointError, match=r"row 1 is of the class 'maybe' \(column 'label'\), which is none of no, yes"
    ):
        read_examples(written(tmp_path, [{"text": "a", "label": "maybe"}]), "classification", Columns(), ("no", "yes"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nowhere.csv", None, "no such file; give a .csv"),
        ("notes.txt", b"a", "not a kind of file that is known; expected .csv, .tsv, .jsonl"),
        ("empty.csv", b"", "can't be read as a table"),
        ("head.csv", b"text,label\n", "has no rows; give examples to train on"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', r"can't be read as a table \(line 2: Expecting value\)"),
        ("scalar.json", b"5", r"can't be read as a table \(expected an object in every row\)"),
        (
            "columns.json",
            b'{"text": ["a"], "label": []}',
            r"can't be read as a table \(expected a list of objects, or columns of one length\)",
        ),
        ("broken.parquet", b"PAR1", "can't be read as a table"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, name: str, content: bytes | None, said: str):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as refused:
        read_examples(tmp_path / name, "classification", Columns())
    assert "\n" not in str(refused.value)


def test_a_folder_of_splits_or_of_something_else_is_refused(tmp_path: Path):
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "splits")
    with pytest.raises(CheckpointError, match=r"splits: holds several splits \(train\); give the folder of one"):
        read_examples(tmp_path / "splits", "classification", Columns())
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="other: can't be read as a table"):
        read_examples(tmp_path / "other", "classification", Columns())


def test_held_out_examples_do_not_depend_on_the_order(tmp_path: Path):
    examples = Examples(tuple(f"text {number}" for number in range(30)), tuple(range(30)))
    backwards = examples.chosen(range(29, -1, -1))
    one, two = held_out(examples, 0.1, tmp_path), held_out(backwards, 0.1, tmp_path)
    assert [set(part.texts) for part in one] == [set(part.texts) for part in two]
    assert [len(part) for part in one] == [27, 3]
    with pytest.raises(CheckpointError, match="1 examples are too few to hold some out"):
        held_out(examples.chosen([0]), 0.1, tmp_path)

"""The report as a file: what was written is read again, and anything else is refused in one line."""

from __future__ import annotations

import json
import os
import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engines.latency.report import (
    SCHEMA,
    DeviceTimes,
    Load,
    Report,
    check_writable,
    overall,
    read_report,
    write_report,
    write_text,
)
from lora.errors import LorafuseError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["schema", "points", "samples", "x"]) | st.text(), inner, max_size=4)
    ),
)
ANYTHING = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refusal(path: Path) -> str:
    with pytest.raises(LorafuseError) as refused:
        read_report(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert str(refused.value).isprintable()  # and so is one line
    return str(refused.value)


def test_what_was_written_is_read_again(make_report: Callable[..., Report], tmp_path: Path):
    report = make_report(loads=[Load(1, 8), Load(4, 1, past=8), Load(1, 8, tokens=3)])
    points = (replace(report.points[0], device=(DeviceTimes("merged", 0.1, 0.2, 0.3),)), *report.points[1:])
    report = replace(report, left_out={"résident\n": "“why”"}, points=points)
    write_report(tmp_path / "report.json", report)
    assert read_report(tmp_path / "report.json") == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_report_of_schema_1_is_read_as_the_wall_clocks(make_report: Callable[..., Report], tmp_path: Path):
    """It knew no other clock; what came later has a default."""
    content = json.loads(msgspec.json.encode(make_report()))
    content["schema"] = 1
    for point in content["points"]:
        for later in ("clock", "by_cpu", "said", "help", "instructions"):
            del point[later]
        del point["samples"]["cpu"]
        for reading in point["readings"]:
            del reading["sets"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    old = read_report(tmp_path / "old.json")
    assert (old.points[0].clock, old.points[0].by_cpu) == ("wall", ())
    assert old.points[0].reading("merged").ratio == make_report().points[0].reading("merged").ratio


def test_a_report_of_both_clocks_is_read_again(make_report: Callable[..., Report], tmp_path: Path):
    report = make_report(cpu=True)
    write_report(tmp_path / "report.json", report)
    assert read_report(tmp_path / "report.json") == report
    assert report.points[0].clock == "cpu"


def test_writing_replaces_the_former_report(make_report: Callable[..., Report], tmp_path: Path):
    for seed in (0, 1):
        write_report(tmp_path / "report.json", make_report(seed=seed))
    assert read_report(tmp_path / "report.json") == make_report(seed=1) != make_report(seed=0)


@pytest.mark.parametrize("name", ["", "missing/report.json", "file/report.json", "fifo", "x" * 300, "x" * 250])
def test_what_could_not_be_written_is_said_before_and_after_and_leaves_nothing(tmp_path: Path, name: str):
    """A folder, in no folder, in a file, a pipe; a name too long for the file system, and one too long with what is put
    to it.
    """
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    before = sorted(tmp_path.iterdir())
    path = tmp_path / name
    for write in (lambda: check_writable([tmp_path / "fine", path]), lambda: write_text(path, "text")):
        with pytest.raises(LorafuseError) as refused:
            write()
        assert str(refused.value).startswith(f"{path}: can't be written (")
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_someone_else_is_refused_even_where_the_file_is_ones_own(tmp_path: Path):
    (tmp_path / "report.json").touch()
    tmp_path.chmod(0o500)
    with pytest.raises(LorafuseError, match="can't be written"):
        check_writable([tmp_path / "report.json"])


def test_a_device_is_not_replaced_by_a_file():
    with pytest.raises(LorafuseError, match=r"^/dev/null: can't be written \(not a file\)"):
        check_writable([Path("/dev/null")])


def test_what_can_be_written_is_left_as_it_is(tmp_path: Path):
    (tmp_path / "there").write_text("former")
    check_writable([tmp_path / "there", tmp_path / "new"])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("there", "former")]


def test_writing_that_fails_leaves_the_former_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "report.json").write_text("former")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(LorafuseError, match=r"report\.json: can't be written \(No space left on device\)"):
        write_text(tmp_path / "report.json", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.json", "former")]


def test_missing_report_and_folder_are_refused(tmp_path: Path):
    assert "can't be read (No such file or directory)" in refusal(tmp_path / "nope")
    assert "can't be read (Is a directory)" in refusal(tmp_path)


@ANYTHING
@given(content=st.binary())
@example(b"")
@example(b'{"schema":' * 100_000)
@example(b'{"schema": 1, "x": ' + b"[" * 100_000)
@example(b'{"schema": 1, "verdict": "\\u001b[2J\\n\\u0085"}')
def test_any_bytes_are_refused_in_one_line(tmp_path: Path, content: bytes):
    (tmp_path / "report.json").write_bytes(content)
    refusal(tmp_path / "report.json")


@ANYTHING
@given(value=JSON)
def test_any_json_that_is_no_report_is_refused_in_one_line(tmp_path: Path, value: Any):
    (tmp_path / "report.json").write_text(json.dumps(value))
    refusal(tmp_path / "report.json")


@ANYTHING
@given(data=st.data())
def test_a_report_with_anything_put_anywhere_is_read_whole_or_refused_in_one_line(
    make_report: Callable[..., Report], tmp_path: Path, data: st.DataObject
):
    content = json.loads(msgspec.json.encode(make_report(sets=6)))
    place, keys = content, []
    while isinstance(place, dict | list) and place and (not keys or data.draw(st.integers(0, 7))):
        keys.append(data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place)))))
        parent, place = place, place[keys[-1]]
    parent[keys[-1]] = data.draw(JSON | st.integers(-1, 3))
    (tmp_path / "report.json").write_text(json.dumps(content))
    try:
        report = read_report(tmp_path / "report.json")
    except LorafuseError as error:
        assert str(error).isprintable()
    else:
        assert {len(times) for point in report.points for one in point.samples.runs for times in one} == {
            len(report.arms)
        }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"points": []}, "holds no readings; measure again"),
        ({"schema": SCHEMA + 1}, f"schema {SCHEMA + 1}; this lorafuse reads 1 and 2; measure again, or read it with"),
        (
            {"schema": SCHEMA + 1, "points": {"are": "something else by then"}},
            f"schema {SCHEMA + 1}; this lorafuse reads 1 and 2",
        ),
        ({"schema": 0}, "schema 0; this lorafuse reads 1 and 2"),
        ({"schema": "1"}, "not a latency report (Expected `int`, got `str` - at `$.schema`)"),
        ({"verdict": "faster"}, "not a latency report (Invalid enum value 'faster' - at `$.verdict`)"),
    ],
    ids=string.ascii_lowercase[:6],
)
def test_report_of_another_kind_says_what_it_is(
    make_report: Callable[..., Report], tmp_path: Path, change: dict[str, Any], said: str
):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(json.loads(msgspec.json.encode(make_report())) | change))
    assert said in refusal(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda point: point["samples"].update(runs=[]), "do not go with its arms"),
        (lambda point: point["samples"].update(runs=[[] for _ in point["samples"]["runs"]]), "do not go with its arms"),
        (lambda point: point["samples"]["cpu"][2].pop(), "do not go with its arms"),
        (lambda point: point["samples"]["cpu"].pop(), "do not go with its arms"),
        (lambda point: point["samples"].update(cpu=[]), "do not go with its arms"),
        (lambda point: point.update(by_cpu=[]), "do not go with its arms"),
        (lambda point: point["by_cpu"].pop(), "do not go with its arms"),
        (lambda point: point["samples"]["runs"][2][1].pop(), "do not go with its arms"),
        (lambda point: point["samples"]["opening"].pop(), "do not go with its arms"),
        (lambda point: point["samples"]["first"][0].append(5), "do not go with its arms"),
        (lambda point: point["readings"].pop(), "do not go with its arms"),
        (lambda point: point["readings"][0].update(arm="another"), "do not go with its arms"),
        (lambda point: point.update(readings=[]), "holds no readings"),
        (lambda point: point["samples"]["runs"][2][1].__setitem__(0, 0), "Expected `int` >= 1"),
        (lambda point: point["samples"]["runs"][2][1].__setitem__(0, 10**30), "not a latency report ("),
        (lambda point: point.pop("samples"), "missing required field `samples`"),
    ],
    ids=string.ascii_lowercase[:16],
)
def test_samples_that_are_not_whole_are_refused(
    make_report: Callable[..., Report], tmp_path: Path, change: Callable[[Any], object], said: str
):
    """The second of two points; every figure of a comparison is taken from its samples."""
    content = json.loads(msgspec.json.encode(make_report(loads=[Load(1, 8), Load(2, 8)], cpu=True)))
    change(content["points"][1])
    (tmp_path / "report.json").write_text(json.dumps(content))
    assert said in refusal(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("merged", "verdict"),
    [((1.0, 1.0), "equivalent"), ((1.0, 1.3), "slower"), ((1.0, 1.01), "undecided"), ((1.3, 1.01), "slower")],
)
def test_slower_at_one_load_is_slower_and_equivalent_at_all_is_equivalent(
    make_report: Callable[..., Report], merged: tuple[float, float], verdict: str
):
    points = [make_report(slow={"merged": factor}).points[0] for factor in merged]
    assert overall(tuple(points)) == overall(tuple(points[::-1])) == verdict


def test_loads_read_as_a_sentence():
    assert [str(load) for load in (Load(1, 8), Load(2, 1, past=8), Load(1, 8, tokens=4))] == [
        "batch 1, length 8",
        "batch 2, length 1 after 8",
        "batch 1, length 8, then 4 tokens generated",
    ]

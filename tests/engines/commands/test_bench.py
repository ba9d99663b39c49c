"""``lorafuse bench`` as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from command import BAD_INPUT, DONE, NO, UNDECIDED, answer, lorafuse, refusal
from reports import RATIOS, point, report

import engines.latency.arms
from engines.backends import Session
from engines.latency.arm_engines import OnnxRuntimeOpener
from engines.latency.report import Load, read_report, write_report
from engines.latency.verdict import MERGED
from exporter.bundle.manifest import Bundle
from exporter.bundle.task_part import task_part
from lora.files.tensorfile import Array

# Quick: the least that the harness measures.
BENCH = ("bench", "{bundle}", "--task", "first", "--length", "8", "--seconds", "0")
NAMES = ["base", "base again", "merged", "unmerged"]


def test_bench_writes_every_sample_and_every_report(fill: Callable[..., list[str]], tmp_path: Path):
    files = [tmp_path / name for name in ("report.json", "report.html", "report.md")]
    written = [
        part for option, path in zip(("--out", "--html", "--markdown"), files, strict=True) for part in (option, path)
    ]
    done = lorafuse(*fill(BENCH), "--batch", "2", "--margin", "900%", *written)
    assert (done.returncode, done.stderr) == (DONE, "")
    found = read_report(files[0])
    (measured,) = found.points
    runs = np.array(measured.samples.runs, float)
    assert runs.shape[::2] == (6, 4)
    assert np.nanmin(runs) > 0
    assert [reading.arm for reading in measured.readings] == NAMES
    assert (found.subject, measured.load.batch, measured.load.length, found.margin) == ("first", 2, 8, 9)
    assert {"processor", "threads", "onnxruntime"} <= found.machine.keys()
    assert found.before.keys() == found.after.keys()
    assert set(found.hashes) == {"base", "merged", "adapter"}
    assert f"{measured.verdict.upper()}: {measured.reason}" in done.stdout.splitlines()
    assert measured.reason in files[1].read_text()
    assert measured.reason in files[2].read_text()
    assert sorted(tmp_path.iterdir()) == sorted(files)


@pytest.mark.parametrize(
    ("margin", "verdict", "status"), [("900%", "equivalent", DONE), ("0.0001", "undecided", UNDECIDED)]
)
def test_status_follows_the_verdict(fill: Callable[..., list[str]], margin: str, verdict: str, status: int):
    """A margin that nothing exceeds, and one that no machine is quiet enough for."""
    found = answer(*fill(BENCH), "--margin", margin, status=status)
    assert found["verdict"] == found["points"][0]["verdict"] == verdict
    assert "samples" not in found["points"][0]


@dataclass
class Thrice:
    """A session that does everything three times: the slow arm that merging does not make."""

    session: Session

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return [self.session.run(inputs) for _ in range(3)][-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.__exit__(None, None, None)


def test_slower_is_status_one(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, in_process: Callable[..., tuple[int, str]]
):
    found = engines.latency.arms.arms_of(task_part(tiny_bundle, "first"), OnnxRuntimeOpener(1))
    slowed = [
        replace(arm, open=lambda arm=arm: Thrice(arm.open())) if arm.name == MERGED else arm for arm in found.arms
    ]
    monkeypatch.setattr(engines.latency.arms, "arms_of", lambda *_: replace(found, arms=tuple(slowed)))
    status, printed = in_process(
        "bench", tiny_bundle.path, "--task", "first", "--length", "8", "--margin", "50%", "--json"
    )
    assert (status, json.loads(printed)["verdict"]) == (NO, "slower")


@pytest.mark.parametrize("clock", ["wall", "cpu", "auto"])
def test_the_verdict_names_its_clock_and_both_are_shown(fill: Callable[..., list[str]], clock: str):
    done = lorafuse(*fill(BENCH), "--margin", "900%", "--clock", clock)
    assert done.returncode == DONE
    by = {"wall": "the wall clock", "cpu": "CPU time"}
    said = next(line for line in done.stdout.splitlines() if line.startswith("EQUIVALENT: "))
    assert any(said.split(";")[0].endswith(f"unadapted base by {name}") for name in by.values())
    if clock != "auto":
        assert f"by {by[clock]}" in said
    assert "CPU ratio to base" in done.stdout
    assert "By itself, " in done.stdout
    assert "Merged and unadapted graph are the same: " in done.stdout
    assert "This proof needs no clock." in done.stdout


def test_engines_with_more_threads_have_no_cpu_time_of_their_own(fill: Callable[..., list[str]]):
    assert "--clock cpu: the engine does not run on the calling thread alone" in refusal(
        *fill(BENCH), "--clock", "cpu", "--threads", "2"
    )
    found = answer(*fill(BENCH), "--clock", "auto", "--threads", "2", "--margin", "900%")
    assert (found["points"][0]["clock"], found["points"][0]["by_cpu"]) == ("wall", [])


def test_an_undecided_verdict_says_what_would_help_and_gives_no_arm_a_word(fill: Callable[..., list[str]]):
    done = lorafuse(*fill(BENCH), "--margin", "0.0001")
    assert done.returncode == UNDECIDED
    assert "What would help: " in done.stdout
    assert "not said" in done.stdout
    (gate,) = lorafuse(*fill(BENCH), "--gate", "0.0001").stdout.splitlines()
    assert gate.startswith("UNDECIDED: first, batch 1, length 8: this machine is too noisy")


def test_a_gate_is_one_line(fill: Callable[..., list[str]]):
    done = lorafuse(*fill(BENCH), "--gate", "900%")
    assert done.returncode == DONE
    (line,) = done.stdout.splitlines()
    assert line.startswith("EQUIVALENT: first, batch 1, length 8: ")


def test_a_grid_has_a_table_and_a_verdict_for_each_load(fill: Callable[..., list[str]]):
    done = lorafuse(*fill(BENCH), "--batch", "3", "--batch", "1", "--margin", "900%")
    titles = [line for line in done.stdout.splitlines() if line.startswith("first: ")]
    assert [title.split(", 6 sets")[0] for title in titles] == ["first: batch 3, length 8", "first: batch 1, length 8"]
    assert done.stdout.count("EQUIVALENT: ") == 2


def test_further_arms_are_timed_and_those_that_cannot_be_had_are_said(tiny_copy: Path, write_adapter, tiny_base: Path):
    random = np.random.default_rng(3)
    modules = [
        f"base_model.model.bert.encoder.layer.{layer}.attention.self.{target}"
        for layer in (0, 1)
        for target in ("query", "value")
    ]
    adapter = write_adapter(
        config={"use_dora": True},
        tensors={f"{module}.lora_magnitude_vector": random.uniform(0.5, 1.5, 32) for module in modules},
    )
    assert lorafuse("export", tiny_base, adapter, "--task", "dora", "--out", tiny_copy).returncode == DONE
    assert lorafuse("verify", tiny_copy, "--task", "dora").returncode == DONE
    done = lorafuse("bench", tiny_copy, "--task", "dora", "--length", "8", "--seconds", "0", "--with", "resident")
    assert (
        "no arm 'unmerged': 'bert.encoder.layer.0.attention.self.query.weight' is changed by more than" in done.stdout
    )
    assert "resident" in done.stdout
    assert done.returncode in (DONE, NO, UNDECIDED)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", "0"], "Invalid value for '--batch'"),
        (["--length", "many"], "Invalid value for '--length'"),
        (["--margin", "0"], "'0' is no share between 0.01% and 1000%, such as 1% or 0.01"),
        (["--margin", "inf"], "'inf' is no share"),
        (["--margin", "nan%"], "'nan%' is no share"),
        (["--margin", "0.0099%"], "'0.0099%' is no share"),
        (["--margin", "1000.1%"], "'1000.1%' is no share"),
        (["--margin", "-1%"], "'-1%' is no share"),
        (["--margin", "1%%"], "'1%%' is no share"),
        (["--gate", "one"], "'one' is no share"),
        (["--gate", "1"], "'1' would be 100%; write it with its sign, such as 1%"),
        (["--margin", "0.5"], "'0.5' would be 50%; write it with its sign, such as 1%"),
        (["--seconds", "nan"], "Invalid value for '--seconds'"),
        (["--with", "adapter-x"], "'adapter-x' is not one of 'resident', 'adapter-h', 'adapter-l'"),
        (["--arm", "pruned.onnx"], "--arm 'pruned.onnx': expected NAME=FILE, such as pruned=pruned.onnx"),
        (["--arm", "=pruned.onnx"], "--arm '=pruned.onnx': expected NAME=FILE"),
        (["--arm", "pruned="], "--arm 'pruned=': expected NAME=FILE"),
        (["--arm", "pruned={tmp}/nope.onnx"], "{tmp}/nope.onnx: can't be read (No such file or directory)"),
        (["--arm", "merged={tmp}/nope.onnx"], "arm 'merged': the name of an arm that is there anyway; choose another"),
        (["--arm", "two\nlines=a.onnx"], "the name is no text that can be printed; choose another"),
        (["--arm", b"\xff=a.onnx"], "the name is no text that can be printed; choose another"),
        (["--arm", "x=a.onnx", "--arm", "x=b.onnx"], "--arm 'x=b.onnx': the name is given twice; choose another"),
        (["--clock", "sun"], "'sun' is not one of 'wall', 'cpu', 'auto'"),
        (["--tokens", "4"], "task 'first' is of type SEQ_CLS and generates no tokens; leave --tokens out"),
        (["--length", "65"], "batch 1, length 65 is more than the 64 tokens that the base takes"),
        (
            ["--out", "{tmp}"],
            "{tmp}: can't be written (not a file); choose a file in a folder that exists and is yours",
        ),
        (
            ["--html", "{tmp}/missing/page.html"],
            (
                "{tmp}/missing/page.html: can't be written (No such file or directory); choose a file in a folder that"
                " exists and is yours"
            ),
        ),
    ],
)
def test_bad_options_are_refused_in_one_line(fill: Callable[..., list[str]], arguments: list[str | bytes], said: str):
    filled = [argument if isinstance(argument, bytes) else fill([argument])[0] for argument in arguments]
    assert fill([said])[0] in refusal(*fill(BENCH), *filled)


@pytest.mark.parametrize("option", ["--out", "--html", "--markdown"])
def test_what_cannot_be_written_is_said_before_anything_is_opened(tmp_path: Path, option: str):
    message = refusal("bench", tmp_path / "no bundle", "--task", "first", option, tmp_path / "missing" / "file")
    assert message.startswith(f"{tmp_path / 'missing' / 'file'}: can't be written (No such file or directory)")


@pytest.mark.parametrize("command", ["verdict", "serve", "compare"])
def test_help_of_each_command_shows_an_example(command: str):
    done = lorafuse("bench", command, "--help")
    assert (done.returncode, done.stderr) == (DONE, "")
    assert "Example: lorafuse bench " in done.stdout


def test_without_arguments_bench_says_what_is_missing():
    done = lorafuse("bench")
    assert (done.returncode, done.stdout, done.stderr) == (
        BAD_INPUT,
        "",
        "lorafuse: Missing argument 'bundle'. (see lorafuse --help)\n",
    )


@pytest.mark.parametrize("rate", [[], ["--rate", "200"]])
def test_serve_counts_requests_and_tells_percentiles(tiny_bundle: Bundle, rate: list[str]):
    found: Any = answer(
        "bench", "serve", tiny_bundle.path, "--task", "first", "--length", "8", "--seconds", "0.4", *rate
    )
    assert [service["arm"] for service in found] == ["base", "merged"]
    for service in found:
        assert service["requests"] > 0
        assert "p50" in service["percentiles"]
        assert not service["overloaded"]
        assert sorted(service["percentiles"].values()) == list(service["percentiles"].values())
    assert (
        lorafuse(
            "bench", "serve", tiny_bundle.path, "--task", "first", "--length", "8", "--seconds", "0.2", *rate
        ).returncode
        == DONE
    )


def test_serve_tells_an_overload_and_ends_in_time_with_status_2(tiny_bundle: Bundle):
    """No engine answers a hundred thousand requests a second in one thread of Python."""
    serve = ("bench", "serve", tiny_bundle.path, "--task", "first", "--length", "8", "--rate", "100000")
    found: Any = answer(*serve, "--seconds", "0.5", status=UNDECIDED)
    for service in found:
        assert (service["overloaded"], service["percentiles"], service["ratio"]) == (True, {}, None)
        assert service["seconds"] <= 0.55
        assert service["requests"] + service["waiting"] <= service["arrived"]
    done = lorafuse(*serve, "--seconds", "0.5")
    assert done.returncode == UNDECIDED
    assert "OVERLOADED: 100000 requests a second come and base answers " in done.stdout
    assert "choose a lower --rate or more --workers" in done.stdout


def test_serve_leaves_out_percentiles_that_few_requests_do_not_carry(tiny_bundle: Bundle):
    serve = ("bench", "serve", tiny_bundle.path, "--task", "first", "--length", "8", "--rate", "10", "--seconds", "0.8")
    done = lorafuse(*serve)
    assert done.returncode == DONE
    assert "A percentile with too few requests beyond it is not told; more --seconds carry more of them." in done.stdout
    assert all(service["percentiles"] == {} for service in answer(*serve))


@pytest.fixture
def reports(tmp_path: Path) -> Callable[[float], tuple[Path, Path]]:
    """Two reports, of which the second one's arms all take so many times as long."""

    def write(factor: float) -> tuple[Path, Path]:
        slowed = {name: ratio * factor for name, ratio in RATIOS.items()}
        for name, ratios, seed in (("one.json", RATIOS, 0), ("two.json", slowed, 1)):
            write_report(tmp_path / name, report(point(ratios, sets=24, seed=seed)))
        return tmp_path / "one.json", tmp_path / "two.json"

    return write


@pytest.mark.parametrize(("factor", "status"), [(1.0, DONE), (1.3, NO)])
def test_compare_tells_times_from_costs(reports: Callable[[float], tuple[Path, Path]], factor: float, status: int):
    found: Any = answer("bench", "compare", *reports(factor), status=status)
    for one in found:
        assert one["time"]["median"] == pytest.approx(factor, rel=0.01)
        assert one["cost"] is None or one["cost"]["median"] == pytest.approx(1, rel=0.01)
    assert "cost beside its base" in lorafuse("bench", "compare", *reports(factor)).stdout


def test_compare_refuses_what_is_no_report(tmp_path: Path):
    (tmp_path / "one.json").write_text("{}")
    assert "not a latency report" in refusal("bench", "compare", tmp_path / "one.json", tmp_path / "two.json")


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "can't be read (No such file or directory); give a report that 'lorafuse bench --out' wrote"),
        (b"", "not a latency report ("),
        (b"\xff\xfe\n\n", "not a latency report ("),
        (
            b'{"schema": 99, "all": "else"}',
            "schema 99; this lorafuse reads 1 and 2; measure again, or read it with the lorafuse that wrote it",
        ),
    ],
    ids=["missing", "empty", "garbage", "newer"],
)
def test_compare_names_the_one_that_it_cannot_read(
    reports: Callable[[float], tuple[Path, Path]], content: bytes | None, said: str, second: bool
):
    pair = reports(1)
    pair[second].unlink()
    if content is not None:
        pair[second].write_bytes(content)
    assert f"{pair[second]}: {said}" in refusal("bench", "compare", *pair)


def test_compare_refuses_reports_without_a_load_in_common(reports: Callable[[float], tuple[Path, Path]]):
    one, two = reports(1)
    write_report(two, report(point(load=Load(4, 8))))
    assert (
        refusal("bench", "compare", one, two)
        == "the reports have no load and arm in common; measure the same batch and length twice"
    )


def test_compare_is_undecided_where_the_interval_crosses_the_margin(reports: Callable[[float], tuple[Path, Path]]):
    found: Any = answer("bench", "compare", *reports(1.01), status=UNDECIDED)
    assert "inconclusive" in {one["decision"] for one in found} <= {"inconclusive", "equivalent"}
    answer("bench", "compare", *reports(1.01), "--margin", "10%", status=DONE)


def test_serve_refuses_more_requests_than_can_be_kept(tiny_bundle: Bundle):
    serve = ("bench", "serve", tiny_bundle.path, "--task", "first", "--length", "8")
    assert "are more than 10,000,000; choose a lower rate or fewer seconds" in refusal(
        *serve, "--rate", "1000000", "--seconds", "1000000"
    )
    for option, value in (
        ("--rate", "nan"),
        ("--rate", "0"),
        ("--seconds", "nan"),
        ("--workers", "0"),
        ("--workers", "1000000"),
    ):
        assert f"Invalid value for '{option}'" in refusal(*serve, option, value)


def test_options_may_come_before_the_bundle(tiny_bundle: Bundle):
    done = lorafuse("bench", "--task", "first", "--length", "8", "--seconds", "0", "--gate", "900%", tiny_bundle.path)
    assert (done.returncode, done.stderr) == (DONE, "")

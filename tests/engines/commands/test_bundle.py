"""``lorafuse bundle ls``, ``remove`` and ``check``, and the functions behind them."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.bundle.check import check_bundle
from exporter.bundle.edits import remove_task
from exporter.bundle.listing import base_size, listing
from exporter.bundle.manifest import open_bundle
from exporter.bundle.records import MODEL, all_files
from exporter.task import Request, export_task
from lora.errors import BundleError

LORAFUSE = Path(sys.executable).with_name("lorafuse")


def lorafuse(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([LORAFUSE, "bundle", *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.fixture
def two_tasks(tiny_copy: Path, tiny_base: Path, write_adapter) -> Path:
    export_task(Request(tiny_base, write_adapter(seed=1), "second"), tiny_copy)
    return tiny_copy


def problems(bundle: Path) -> dict[str, str]:
    return {finding.path: finding.problem for finding in check_bundle(bundle)}


def test_a_sound_bundle_has_no_findings(two_tasks: Path):
    assert problems(two_tasks) == {}


def test_every_single_file_is_missed_when_it_is_gone(two_tasks: Path, tmp_path: Path):
    for file in all_files(open_bundle(two_tasks).manifest):
        copy = Path(shutil.copytree(two_tasks, tmp_path / "copy"))
        (copy / file.path).unlink()
        assert list(problems(copy)) == [file.path]
        shutil.rmtree(copy)


@pytest.mark.parametrize("seed", range(40))
def test_any_flipped_bit_is_found(two_tasks: Path, seed: int):
    chance = random.Random(seed)
    path = two_tasks / chance.choice(sorted(file.path for file in all_files(open_bundle(two_tasks).manifest)))
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    assert list(problems(two_tasks)) == [path.relative_to(two_tasks).as_posix()]


def test_truncated_extra_and_linked_files_are_found(two_tasks: Path):
    weights = next(two_tasks.glob("second-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    (two_tasks / "engines").mkdir()
    (two_tasks / "engines/stray.plan").write_bytes(b"x")
    (two_tasks / "link").symlink_to("/etc")
    found = problems(two_tasks)
    assert set(found) == {weights.name, "engines/stray.plan", "link"}
    assert "but the manifest says" in found[weights.name]
    assert "named by no manifest" in found["engines/stray.plan"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "newer than this program"),
        ({"surprise": 1}, "unknown field"),
        ({"tasks": 1}, "not a bundle's manifest"),
    ],
)
def test_a_manifest_that_can_not_be_followed_is_the_finding(two_tasks: Path, change: dict, message: str):
    manifest = two_tasks / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    (found,) = problems(two_tasks).items()
    assert (found[0], message in found[1]) == ("manifest.json", True), found


def test_a_path_out_of_the_bundle_is_found_and_not_followed(two_tasks: Path):
    manifest = two_tasks / "manifest.json"
    manifest.write_text(manifest.read_text().replace("base/config.json", "../../etc/passwd"))
    assert "refusing to follow it" in problems(two_tasks)["manifest.json"]


def test_a_name_that_is_no_text_or_two_lines_is_told_in_one_line_of_text(two_tasks: Path):
    for name in (b"a\nb", b"\xff", b"\x1b[31m"):
        (two_tasks / os.fsdecode(name)).touch()
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([LORAFUSE, "bundle", "check", two_tasks], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (1, "")
    assert [line.partition(": ")[0] for line in done.stdout.splitlines()] == [
        f"{two_tasks}/{name}" for name in (r"\x1b[31m", r"a\nb", r"\udcff")
    ]


def test_a_folder_without_a_bundle_raises(tmp_path: Path):
    with pytest.raises(BundleError, match="not a bundle"):
        check_bundle(tmp_path)


def test_remove_takes_the_task_its_files_and_nothing_else(two_tasks: Path):
    before = {file.path for file in all_files(open_bundle(two_tasks).manifest)}
    remove_task(two_tasks, "second")
    after = {file.path for file in all_files(open_bundle(two_tasks).manifest)}
    assert {path.partition("-")[0] for path in before - after} == {"second", "adapters/second"}
    assert problems(two_tasks) == {}


def test_remove_of_the_last_task_keeps_the_base_and_a_later_export_traces_again(
    tiny_copy: Path, tiny_base: Path, write_adapter
):
    assert remove_task(tiny_copy, "first").manifest.graphs == {}
    again = export_task(Request(tiny_base, write_adapter(), "first"), tiny_copy)
    assert (again.traced, again.base_bytes, problems(tiny_copy)) == (True, 0, {})


def test_remove_of_an_unknown_task_lists_those_there_are(two_tasks: Path):
    with pytest.raises(BundleError, match="no task 'third' in this bundle; it holds: first, second"):
        remove_task(two_tasks, "third")


def test_listing_counts_what_each_task_adds(two_tasks: Path):
    manifest = open_bundle(two_tasks).manifest
    first, second = listing(manifest)
    assert (first.task, first.labels, second.labels) == ("first", ("no", "yes"), ("LABEL_0", "LABEL_1"))
    assert first.graph == second.graph == manifest.tasks["first"].parts[MODEL].graph
    assert base_size(manifest) + first.size + second.size == sum(file.size for file in all_files(manifest))


def test_the_commands_print_and_say_by_their_status(two_tasks: Path):
    assert "second" in lorafuse("ls", two_tasks).stdout
    assert [task["task"] for task in json.loads(lorafuse("ls", two_tasks, "--json").stdout)["tasks"]] == [
        "first",
        "second",
    ]
    assert (lorafuse("check", two_tasks).returncode, json.loads(lorafuse("check", two_tasks, "--json").stdout)) == (
        0,
        [],
    )
    assert lorafuse("remove", two_tasks, "--task", "second").stdout == f"removed second; {two_tasks} holds: first\n"
    (two_tasks / "stray").touch()
    assert lorafuse("check", two_tasks).returncode == 1
    refused = lorafuse("remove", two_tasks, "--task", "second")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (3, "", 1)


@pytest.mark.parametrize("command", ["ls", "add", "remove", "pack", "check", "upgrade"])
def test_help_shows_an_example(command: str):
    assert f"Example: lorafuse bundle {command} bundle" in lorafuse(command, "--help").stdout

"""Changing a bundle: all or nothing. Manifests here are small and made by hand; whole exports are in test_task.py."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import MODEL, SCHEMA, Base, Graph, Head, Manifest, Part, Port, Task, all_files
from exporter.bundle.staging import commit, current_bundle, describe, named_by_content, staging
from lora.errors import AdapterError, BundleError


def staged_task(stage: Path, name: str, content: str) -> Task:
    """A task of three files that say ``content``, written to ``stage``."""
    (stage / "adapters" / f"{name}-{content}").mkdir(parents=True)
    paths = [
        f"{name}-{content}.onnx",
        f"{name}-{content}.safetensors",
        f"adapters/{name}-{content}/adapter_config.json",
    ]
    for path in paths:
        (stage / path).write_text(f"{path} {content}" * 10)
    model, weights, adapter = (describe(stage, path) for path in paths)
    part = Part(graph="g", model=model, weights=weights)
    return Task(parts={MODEL: part}, store="dense", adapter=(adapter,), adapter_sha256="0", labels=())


def with_task(current: Manifest | None, name: str, task: Task) -> Manifest:
    base = Base(sha256="0", precision="float32", longest=1, vocabulary=1, weights=(), files=())
    graphs = {"g": Graph(MODEL, Head("SEQ_CLS", 1), (), (Port("logits", "float32", ("batch", 1)),), {})}
    tasks = {**(current.tasks if current else {}), name: task}
    return Manifest(schema=SCHEMA, base=base, graphs=graphs, tasks=tasks, versions={})


def put(bundle: Path, name: str, content: str, meanwhile: Callable[[Path], object] = lambda stage: None) -> Bundle:
    """Stage and commit a task; ``meanwhile`` happens between the two."""
    with staging(bundle) as stage:
        task = staged_task(stage, name, content)
        meanwhile(stage)
        return commit(bundle, stage, lambda current: with_task(current, name, task))


def fail(error: BaseException) -> None:
    raise error


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with the task ``first``, of content ``old``."""
    return put(tmp_path / "bundle", "first", "old").path


def intact(path: Path) -> bool:
    opened = open_bundle(path)
    return all(opened.checked(file) for file in all_files(opened.manifest))


def left_beside(bundle: Path) -> list[str]:
    return [path.name for path in bundle.parent.iterdir() if path != bundle]


@pytest.mark.parametrize("prepare", [lambda path: None, Path.mkdir], ids=["absent", "empty folder"])
def test_a_bundle_is_created_where_there_is_none(tmp_path: Path, prepare: Callable[[Path], object]):
    prepare(tmp_path / "bundle")
    made = put(tmp_path / "bundle", "first", "old")
    assert open_bundle(made.path) == made
    assert intact(made.path)
    assert left_beside(made.path) == []


def test_folders_above_a_new_bundle_are_made(tmp_path: Path):
    assert intact(put(tmp_path / "a" / "b" / "bundle", "first", "old").path)


def test_others_can_read_a_new_bundle(bundle: Path):
    assert stat.S_IMODE(bundle.stat().st_mode) == 0o755


def test_a_second_task_is_added_beside_the_first(bundle: Path):
    assert set(put(bundle, "second", "new").manifest.tasks) == {"first", "second"}
    assert intact(bundle)
    assert left_beside(bundle) == []


def test_replacing_a_task_removes_its_former_files_and_the_folders_they_leave_empty(bundle: Path):
    put(bundle, "first", "new")
    assert intact(bundle)
    assert [path for path in bundle.rglob("*") if "old" in path.name] == []


def test_replacing_a_task_leaves_files_that_are_not_the_bundles(bundle: Path):
    foreign = [bundle / "notes.txt", bundle / "adapters" / "first-old" / "README.md"]
    for path in foreign:
        path.write_text("mine")
    put(bundle, "first", "new")
    assert [path.read_text() for path in foreign] == ["mine", "mine"]


def test_what_can_not_be_removed_does_not_make_a_done_change_look_failed(bundle: Path):
    former = open_bundle(bundle).task("first").parts[MODEL].model.path
    (bundle / former).unlink()
    (bundle / former).mkdir()  # as if it could not be unlinked
    assert put(bundle, "first", "new") == open_bundle(bundle)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), PermissionError(errno.EACCES, "Permission denied")]
)
def test_an_operating_system_error_becomes_one_line_that_names_the_bundle(bundle: Path, error: OSError):
    with pytest.raises(BundleError) as caught:
        put(bundle, "second", "new", lambda stage: fail(error))
    assert str(caught.value) == f"{bundle}: can't be written ({error.strerror}); the bundle is as it was before"


@pytest.mark.parametrize("error", [AdapterError("no"), KeyboardInterrupt(), AssertionError("a bug")])
def test_any_other_error_passes_unchanged_and_leaves_nothing_staged(bundle: Path, error: BaseException):
    with pytest.raises(type(error)) as caught:
        put(bundle, "second", "new", lambda stage: fail(error))
    assert caught.value is error
    assert left_beside(bundle) == []


def test_a_place_that_can_not_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="can't be written"), staging(tmp_path / "file" / "bundle"):
        pass


def test_a_folder_of_something_else_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(BundleError, match="not a bundle"):
        current_bundle(tmp_path)


def test_a_folder_of_something_else_that_appears_meanwhile_is_refused_and_kept(tmp_path: Path):
    thesis = tmp_path / "bundle" / "thesis.tex"
    with pytest.raises(BundleError, match="not a bundle"):
        put(thesis.parent, "first", "new", lambda stage: (thesis.parent.mkdir(), thesis.write_text("mine")))
    assert list(thesis.parent.iterdir()) == [thesis]


def test_an_update_that_refuses_leaves_the_bundle_as_it_was(bundle: Path, snapshot: Callable[[Path], dict[str, str]]):
    before = snapshot(bundle)
    with staging(bundle) as stage:
        staged_task(stage, "second", "new")
        with pytest.raises(BundleError, match="no"):
            commit(bundle, stage, lambda current: fail(BundleError("no")))
    assert snapshot(bundle) == before


def test_a_manifest_that_can_not_be_written_leaves_no_file_behind(
    bundle: Path, snapshot: Callable[[Path], dict[str, str]]
):
    before = snapshot(bundle)
    with pytest.raises(BundleError, match="can't be written"):
        put(bundle, "second", "new", lambda stage: (stage / "manifest.json").mkdir())  # as if the disk were full by now
    assert snapshot(bundle) == before


def test_commits_at_the_same_time_lose_no_task(tmp_path: Path):
    names = [f"task{number}" for number in range(8)]
    threads = [threading.Thread(target=put, args=(tmp_path / "bundle", name, "new")) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(open_bundle(tmp_path / "bundle").manifest.tasks) == set(names)
    assert intact(tmp_path / "bundle")


def test_an_update_sees_what_was_committed_after_staging_began(bundle: Path):
    put(bundle, "third", "new", lambda stage: put(bundle, "second", "new"))
    assert set(open_bundle(bundle).manifest.tasks) == {"first", "second", "third"}


def test_a_file_is_named_by_its_content(tmp_path: Path):
    records = []
    for content in ("one", "other", "one"):
        (tmp_path / "task.onnx").write_text(content)
        records.append(named_by_content(tmp_path / "task.onnx", "movies"))
    assert records[0] == records[2] != records[1]
    assert records[0] == describe(tmp_path, records[0].path)
    assert records[0].path == f"movies-{records[0].sha256[:8]}.onnx"


PUT = """
import importlib.util, sys

spec = importlib.util.spec_from_file_location("staging_tests", sys.argv[2])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
sees_writes, stride = True, 1

def prepare(bundle):
    bundle.parent.mkdir(parents=True)
    if sys.argv[3] == "replaces":
        tests.put(bundle, "first", "old")

def change(bundle):
    tests.put(bundle, "first", "new")
"""


@pytest.mark.parametrize(("change", "before"), [("creates", "absent"), ("replaces", "old")])
def test_killed_at_any_step_the_bundle_is_the_old_or_the_new_one(
    killed_at_every_step: Callable[..., list[Path]], change: str, before: str
):
    seen = [state(bundle) for bundle in killed_at_every_step(PUT, __file__, change)]
    assert len(seen) > 20
    assert seen == sorted(seen, key=[before, "new"].index)
    assert set(seen) == {before, "new"}


def state(bundle: Path) -> str:
    """Which content the bundle's one task has, after every file was checked."""
    if not bundle.exists():
        return "absent"
    assert intact(bundle)
    return "new" if "new" in open_bundle(bundle).task("first").parts[MODEL].model.path else "old"


def test_a_bundle_can_be_changed_again_after_a_kill(bundle: Path):
    stale = bundle.parent / ".bundle.staging-killed"
    stale.mkdir()
    (bundle / "second-new.onnx").write_text("moved in, but its manifest never came")
    put(bundle, "second", "new")
    assert intact(bundle)
    assert set(open_bundle(bundle).manifest.tasks) == {"first", "second"}


def test_files_are_flushed_before_the_manifest_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: steps.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
    )
    bundle = put(tmp_path / "bundle", "first", "old").path
    steps.clear()
    put(bundle, "first", "new")
    content = {"first-new.onnx", "first-new.safetensors", "adapter_config.json"}
    assert content <= set(steps[: steps.index("manifest.json")])
    assert steps[-2:] == ["bundle", bundle.parent.name]


def test_a_task_shared_file_stays_until_its_last_task_is_replaced(bundle: Path):
    shared = open_bundle(bundle).task("first")
    with staging(bundle) as stage:
        commit(bundle, stage, lambda current: with_task(current, "twin", shared))
    put(bundle, "first", "new")
    assert intact(bundle)
    assert msgspec.structs.asdict(open_bundle(bundle).task("twin")) == msgspec.structs.asdict(shared)

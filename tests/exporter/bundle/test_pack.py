"""One tar file that is the bundle."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from exporter.bundle.check import check_bundle
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.pack import pack_bundle
from exporter.bundle.records import MODEL, all_files
from exporter.task import Request, add_task, export_task
from lora.errors import BundleError

COMMAND = Path(sys.executable).with_name("lorafuse")


@pytest.fixture
def two_tasks(tiny_copy: Path, tiny_base: Path, write_adapter) -> Path:
    export_task(Request(tiny_base, write_adapter(seed=1), "second"), tiny_copy)
    return tiny_copy


def unpacked(tar: Path, into: Path) -> Path:
    into.mkdir(exist_ok=True)
    subprocess.run(["tar", "xf", tar, "-C", into], check=True)
    return into / tar.stem


def test_unpacked_it_is_the_bundle(two_tasks: Path, snapshot, token_ids, tmp_path: Path):
    size = pack_bundle(two_tasks, tmp_path / "shipped.tar")
    again = unpacked(tmp_path / "shipped.tar", tmp_path / "elsewhere")
    assert size == (tmp_path / "shipped.tar").stat().st_size
    assert check_bundle(again) == []
    assert snapshot(again) == snapshot(two_tasks)
    model = open_bundle(again).task("second").parts[MODEL].model.path
    here, there = (
        onnxruntime.InferenceSession(folder / model).run(None, token_ids())[0] for folder in (two_tasks, again)
    )
    np.testing.assert_array_equal(here, there)


def test_some_tasks_come_with_the_base_and_without_the_others(two_tasks: Path, tmp_path: Path):
    pack_bundle(two_tasks, tmp_path / "one.tar", ["second"])
    again = unpacked(tmp_path / "one.tar", tmp_path / "elsewhere")
    assert check_bundle(again) == []
    manifest = open_bundle(again).manifest
    assert list(manifest.tasks) == ["second"]
    assert set(manifest.graphs) == {manifest.tasks["second"].parts[MODEL].graph}
    assert not list(again.glob("first-*"))


def test_the_same_bundle_gives_the_same_bytes(two_tasks: Path, tmp_path: Path):
    (tmp_path / "a").mkdir()
    pack_bundle(two_tasks, tmp_path / "a" / "x.tar")
    copied = Path(shutil.copytree(two_tasks, tmp_path / "elsewhere", copy_function=shutil.copyfile))  # with other times
    (copied / "manifest.json").chmod(0o600)
    pack_bundle(copied, tmp_path / "x.tar")
    assert (tmp_path / "a" / "x.tar").read_bytes() == (tmp_path / "x.tar").read_bytes()


def test_what_tasks_share_is_packed_once_and_with_each_of_them(tiny_base: Path, tmp_path: Path):
    """Two tasks that are the base itself have one graph."""
    for name in ("a", "b"):
        made = export_task(Request(tiny_base, None, name), tmp_path / "bundle").bundle
    pack_bundle(made.path, tmp_path / "x.tar")
    members = subprocess.run(
        ["tar", "tf", tmp_path / "x.tar"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert members.count(f"x/{made.task('a').parts[MODEL].model.path}") == 1
    assert len(members) == len(set(members))
    pack_bundle(made.path, tmp_path / "y.tar", ["b"])
    assert check_bundle(unpacked(tmp_path / "y.tar", tmp_path / "elsewhere")) == []


def test_a_task_stored_as_factors_can_be_packed_alone(tiny_copy: Path, write_adapter, tmp_path: Path):
    add_task(tiny_copy, write_adapter(seed=1), "second", store="factors")
    pack_bundle(tiny_copy, tmp_path / "x.tar", ["second"])
    again = unpacked(tmp_path / "x.tar", tmp_path / "elsewhere")
    assert check_bundle(again) == []
    assert open_bundle(again).task("second") == open_bundle(tiny_copy).task("second")


def test_every_file_is_announced(two_tasks: Path, tmp_path: Path):
    steps: list[str] = []
    pack_bundle(two_tasks, tmp_path / "x.tar", progress=steps.append)
    assert steps == sorted({file.path for file in all_files(open_bundle(two_tasks).manifest)})


def test_the_manifest_comes_last(two_tasks: Path, tmp_path: Path):
    pack_bundle(two_tasks, tmp_path / "x.tar")
    names = subprocess.run(["tar", "tf", tmp_path / "x.tar"], capture_output=True, text=True, check=True).stdout.split()
    assert names[-1] == "x/manifest.json"
    assert all(name.startswith("x/") for name in names)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [damage, lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink],
    ids=["flipped", "shorter", "missing"],
)
def test_a_damaged_file_is_not_packed(two_tasks: Path, tmp_path: Path, change):
    change(two_tasks / open_bundle(two_tasks).manifest.base.weights[0].path)
    with pytest.raises(BundleError, match=r"base-[0-9a-f]{8}\.safetensors: [^\n]*export the task again\Z"):
        pack_bundle(two_tasks, tmp_path / "x.tar")
    assert [path.name for path in tmp_path.iterdir() if "x.tar" in path.name] == []


def test_a_file_that_can_not_be_read_is_named_and_not_the_tar_file(
    two_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def unreadable(path: Path, *arguments: object, **options: object) -> object:
        if path.name == "config.json":
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    opened = Path.open
    monkeypatch.setattr(Path, "open", unreadable)
    with pytest.raises(BundleError, match=r"base/config\.json: can't be read \(Permission denied\)"):
        pack_bundle(two_tasks, tmp_path / "x.tar")


def test_a_name_that_is_taken_or_in_the_bundle_or_no_tar_and_an_unknown_task_are_refused(
    two_tasks: Path, tmp_path: Path
):
    (tmp_path / "taken.tar").write_text("mine")
    (tmp_path / "link.tar").symlink_to("nowhere")
    for name in ("taken.tar", "link.tar"):
        with pytest.raises(BundleError, match=rf"{name}: exists already"):
            pack_bundle(two_tasks, tmp_path / name)
    for name in ("shipped", "v1.2", ".tar"):
        with pytest.raises(BundleError, match=rf"{name}: expected a name that ends in \.tar"):
            pack_bundle(two_tasks, tmp_path / name)
    with pytest.raises(BundleError, match="lies in the bundle"):
        pack_bundle(two_tasks, two_tasks / "x.tar")
    (tmp_path / "way-in").symlink_to(two_tasks / "adapters")
    with pytest.raises(BundleError, match="lies in the bundle"):
        pack_bundle(two_tasks, tmp_path / "way-in" / "x.tar")
    with pytest.raises(BundleError, match="no task 'third'"):
        pack_bundle(two_tasks, tmp_path / "x.tar", ["third"])
    assert check_bundle(two_tasks) == []
    assert (tmp_path / "taken.tar").read_text() == "mine"
    assert not (tmp_path / "x.tar").exists()


def test_a_full_disk_leaves_nothing(tiny_bundle: Bundle, tmp_path: Path):
    """A file may not be larger than a megabyte in the child."""
    limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))  # noqa: E731
    done = subprocess.run(
        [COMMAND, "bundle", "pack", tiny_bundle.path, tmp_path / "x.tar"],
        capture_output=True,
        text=True,
        preexec_fn=limited,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert "can't be written" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_killed_at_any_step_there_is_the_whole_file_or_none(tiny_copy: Path, killed_at_every_step):
    program = f"""
from exporter.bundle.pack import pack_bundle
from shutil import copytree
def prepare(bundle):
    bundle.parent.mkdir(parents=True)
def change(bundle):
    pack_bundle(Path({str(tiny_copy)!r}), bundle.with_name("x.tar"))
stride, sees_writes = 1, False
"""
    tars = [bundle.with_name("x.tar") for bundle in killed_at_every_step(program)]
    whole = [tar for tar in tars if tar.exists()]
    assert 0 < len(whole) < len(tars)
    assert all(check_bundle(unpacked(tar, tar.parent / "out")) == [] for tar in whole)


def test_packing_needs_neither_torch_nor_onnx(tiny_bundle: Bundle, tmp_path: Path):
    program = (
        "import sys; from pathlib import Path; from exporter.bundle.pack import pack_bundle; pack_bundle(*map(Path,"
        " sys.argv[1:])); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tiny_bundle.path, tmp_path / "x.tar"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {"torch", "transformers", "onnx", "onnxruntime", "typer"}.isdisjoint(done.stdout.split())


def test_the_command_says_what_it_packed(two_tasks: Path, tmp_path: Path):
    done = subprocess.run(
        [COMMAND, "bundle", "pack", two_tasks, tmp_path / "x.tar", "--task", "first", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"packed": str(tmp_path / "x.tar"), "bytes": (tmp_path / "x.tar").stat().st_size}
    again = subprocess.run([COMMAND, "bundle", "pack", two_tasks, tmp_path / "x.tar"], capture_output=True, text=True)
    assert (again.returncode, again.stdout, len(again.stderr.splitlines())) == (3, "", 1)

"""A bundle may be a mount point, a volume of a container's; and what killed changes have left is removed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.bundle.check import check_bundle, repair
from exporter.bundle.edits import remove_task
from exporter.bundle.manifest import open_bundle
from exporter.bundle.staging import staging
from exporter.task import add_task
from scripts.support.hand_made_bundle import hand_made_bundle

ROOT = Path(__file__).parents[2]


def mount(*arguments: str | Path) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")


@pytest.fixture(params=["another file system", "the same one, bound"])
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty folder that is a mount point."""
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    place = tmp_path / "volume"
    place.mkdir()
    if request.param == "another file system":
        mount("-t", "tmpfs", "tmpfs", place)
    else:
        (tmp_path / "elsewhere").mkdir()
        mount("--bind", tmp_path / "elsewhere", place)
    yield place
    subprocess.run(["umount", place], check=True)


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_bundle_that_is_a_mount_point_is_changed(mounted: Path, made: Path):
    shutil.copytree(made, mounted, dirs_exist_ok=True)
    add_task(mounted, made.parent / f"{made.name}-adapter-right", "further")
    remove_task(mounted, "left")
    assert sorted(open_bundle(mounted).manifest.tasks) == ["both", "further", "merged", "right"]
    assert check_bundle(mounted) == []
    assert hidden(mounted) == hidden(mounted.parent) == []


def test_a_bundle_is_made_in_an_empty_mount_point(mounted: Path):
    hand_made_bundle(mounted)
    assert check_bundle(mounted) == []
    assert hidden(mounted) == hidden(mounted.parent) == []


def test_what_a_change_stages_is_no_finding_and_no_left_over(mounted: Path, made: Path):
    shutil.copytree(made, mounted, dirs_exist_ok=True)
    with staging(mounted) as stage:
        assert stage.parent == mounted
        (stage / "file").write_bytes(b"being written")
        assert (check_bundle(mounted), repair(mounted)) == ([], ())
        remove_task(mounted, "left")
        assert stage.exists()
    assert hidden(mounted) == []


KILLED = """
import sys, time
from pathlib import Path
from exporter.bundle.staging import staging
with staging(Path(sys.argv[1])) as stage:
    (stage / "file").write_bytes(bytes(1000))
    print(stage, flush=True)
    time.sleep(60)
"""


def killed_while_it_stages(bundle: Path) -> Path:
    running = subprocess.Popen(
        [sys.executable, "-c", KILLED, bundle],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert running.stdout is not None
    stage = Path(running.stdout.readline().strip())
    assert repair(bundle) == ()  # it lives
    running.kill()
    running.wait()
    running.stdout.close()
    assert stage.is_dir()
    return stage


def test_the_next_change_removes_what_a_killed_one_has_left(bundle: Path):
    stage = killed_while_it_stages(bundle)
    remove_task(bundle, "left")
    assert not stage.exists()


def test_bundle_check_finds_and_repairs_it(bundle: Path):
    stage = killed_while_it_stages(bundle)
    (finding,) = check_bundle(bundle)
    assert finding.problem == f"{stage}: left by a change that was killed; 'bundle check --repair' removes it"
    assert repair(bundle) == (stage,)
    assert check_bundle(bundle) == []


def test_a_folder_of_another_name_and_a_link_stay(bundle: Path, tmp_path: Path):
    (tmp_path / "kept").mkdir()
    (bundle.parent / f".{bundle.name}.staging-link").symlink_to(tmp_path / "kept")
    (bundle.parent / ".other.staging-x").mkdir()
    assert repair(bundle) == ()
    assert (tmp_path / "kept").is_dir()
    assert (bundle.parent / ".other.staging-x").is_dir()

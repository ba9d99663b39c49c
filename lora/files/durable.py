"""Writing that leaves nothing half-written: into a folder beside the target, flushed, then renamed.

Where the target is a mount point, a rename into it from beside it fails: the folder lies inside it then. A process that
is killed leaves its folder. Each is locked as long as its process lives, so that who comes next can tell, and removes
what nobody holds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INSIDE = ".staging-"  # what a staging folder inside its target is called; beside it, the target's name comes before
# What the system says where nothing can be made beside the target: another device, no permission, a read-only system.
NOT_BESIDE = frozenset({errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS})


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A hidden folder from which files can be renamed into ``target``; gone at the end, whatever happened.

    What processes that were killed have left is removed first. An OSError (a full disk, no permission) passes through.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        remove_left_over(target)
        stage = _made(target)
        held = _lock(stage)
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        os.close(held)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """The block has ``target`` to itself among those who ask for it in this way.

    Its folder is locked, for the target may not be there yet; and so is the target, for a volume that is mounted in two
    places has two folders around it.
    """
    descriptors = [os.open(target.parent, os.O_RDONLY)]
    try:
        fcntl.flock(descriptors[0], fcntl.LOCK_EX)
        if target.is_dir():
            descriptors.append(os.open(target, os.O_RDONLY))
            fcntl.flock(descriptors[1], fcntl.LOCK_EX)
        yield
    finally:
        for descriptor in reversed(descriptors):
            os.close(descriptor)


def left_over(target: Path) -> list[Path]:
    """Staging folders, beside ``target`` and inside it, that no living process holds."""
    beside = target.parent.glob(f"{_prefix(target)}*")
    inside = target.glob(f"{INSIDE}*") if target.is_dir() else ()
    return sorted(folder for folder in (*beside, *inside) if _is_free(folder))


def remove_left_over(target: Path) -> list[Path]:
    """Remove those folders; which they were. Only within ``locked``: another may be about to lock what it has made."""
    found = left_over(target)
    for folder in found:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def flush(path: Path) -> None:
    """Have the content of a file, or the entries of a folder, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _made(target: Path) -> Path:
    try:
        stage = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    except OSError as error:
        if error.errno not in NOT_BESIDE or not target.is_dir():
            raise
        return Path(tempfile.mkdtemp(prefix=INSIDE, dir=target))
    if target.is_dir() and not _can_rename(stage, target):
        stage.rmdir()
        return Path(tempfile.mkdtemp(prefix=INSIDE, dir=target))
    return stage


def _can_rename(stage: Path, target: Path) -> bool:
    """Asked of the system: a folder that is mounted twice is on one device, and yet no rename leads from one to the
    other.
    """
    probe, there = stage / "probe", target / f"{INSIDE}{stage.name.rpartition('-')[2]}"
    probe.mkdir()
    try:
        probe.rename(there)
    except OSError as error:
        probe.rmdir()
        return error.errno != errno.EXDEV
    there.rmdir()
    return True


def _prefix(target: Path) -> str:
    return f".{target.name}{INSIDE}"


def _lock(folder: Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _is_free(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False  # gone meanwhile, a link, or no folder: none of ours
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True

"""An opened bundle: its folder, its manifest, and files that are compared with what the manifest says."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from exporter.bundle.manifest_file import MANIFEST, read_manifest
from exporter.bundle.records import File, Manifest, Task
from lora.errors import BundleError
from lora.files.tensorfile import file_sha256

CLOCK_STEP = (
    2 * 10**9
)  # ns: a file that changes twice within a step of its file system's clock may show one time for both


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its checked manifest.

    ``_seen`` holds the state (inode, size, time of change) of each file whose hash was compared: who goes from task to
    task does not hash a base again that nobody touched. The time is the kernel's, which no program sets.
    """

    path: Path
    manifest: Manifest
    _seen: dict[File, tuple[int, int, int]] = field(default_factory=dict, repr=False, compare=False)

    def task(self, name: str) -> Task:
        """The task of that name. Raises BundleError listing the tasks there are."""
        if name not in self.manifest.tasks:
            known = ", ".join(sorted(self.manifest.tasks)) or "none"
            raise BundleError(f"{self.path}: no task '{name}' in this bundle; it holds: {known}")
        return self.manifest.tasks[name]

    def present(self, file: File) -> Path:
        """The file's path, after its size was compared. Raises BundleError when it is missing or of another size."""
        path = self.path / file.path
        with reading(path):
            if path.is_symlink() or not path.is_file():
                raise BundleError(f"{path}: missing from the bundle; export the task again")
            if path.stat().st_size != file.size:
                raise BundleError(
                    f"{path}: {path.stat().st_size} bytes, but the manifest says {file.size}; export the task again"
                )
        return path

    def checked(self, file: File) -> Path:
        """The file's path, after its size and SHA-256 were compared. Raises BundleError when they differ."""
        path = self.present(file)
        with reading(path):
            found = path.stat()
            state = found.st_ino, found.st_size, found.st_ctime_ns
            if self._seen.get(file) != state:
                settled = time.time_ns() - found.st_ctime_ns > CLOCK_STEP
                check_sha256(path, file, file_sha256(path))
                if settled:
                    self._seen[file] = state
        return path


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises BundleError where the block can't read ``path``, a file of a bundle."""
    try:
        yield
    except OSError as error:
        raise BundleError(f"{path}: can't be read ({error.strerror}); export the task again") from error


def check_sha256(path: Path, file: File, found: str) -> None:
    """Raises BundleError unless the SHA-256 that was found is the file's."""
    if found != file.sha256:
        raise BundleError(f"{path}: content does not match the manifest's SHA-256; export the task again")


def open_bundle(path: Path) -> Bundle:
    """Open the bundle in ``path``. Raises BundleError when it is not one, is damaged, or is of a newer schema."""
    manifest = path / MANIFEST
    with reading(path):
        found = manifest.is_file()
    if not found:
        raise BundleError(f"{path}: not a bundle (no {MANIFEST}); create one with 'lorafuse export'")
    return Bundle(path, read_manifest(manifest))

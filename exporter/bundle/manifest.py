"""An opened bundle: its folder, its manifest, and files that are compared with what the manifest says."""

from __future__ import annotations

import errno
import hashlib
import mmap
import re
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from exporter.bundle.manifest_file import MANIFEST, manifest_bytes, parse_manifest
from exporter.bundle.records import File, Manifest, Task
from lora.errors import BundleError
from lora.files.mapped import MappedFile, State, mapped, opened
from lora.files.tensorfile import TensorFile

CLOCK_STEP = (
    2 * 10**9
)  # ns: a file that changes twice within a step of its file system's clock may show one time for both

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# What the system says of a file that is not there as a file: no entry, a folder on the way that is none, a link, a
# folder or a socket in its place.
ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO})


@dataclass(frozen=True)
class _Seen:
    """A file whose hash was compared: its state then, and the mapping, for as long as anybody reads from it."""

    state: State
    content: weakref.ref[mmap.mmap] | None

    def mapping(self, path: Path, state: State) -> MappedFile | None:
        content = self.content() if self.content is not None else None
        return MappedFile(path, content, state) if content is not None else None


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its checked manifest.

    A file is opened once, without following a link, and mapped; its hash is that of the mapping, from which its bytes
    are served. ``digest`` is that of the manifest's bytes, and so of all that it names. ``_seen`` holds the state of
    each file whose hash was compared: who goes from task to task does not hash a base again that nobody touched, and
    sessions share one mapping of it.
    """

    path: Path
    manifest: Manifest
    digest: str = field(default="", compare=False)
    _seen: dict[File, _Seen] = field(default_factory=dict, repr=False, compare=False)

    def task(self, name: str) -> Task:
        """The task of that name. Raises BundleError listing the tasks there are."""
        if name not in self.manifest.tasks:
            known = ", ".join(sorted(self.manifest.tasks)) or "none"
            raise BundleError(f"{self.path}: no task '{name}' in this bundle; it holds: {known}")
        return self.manifest.tasks[name]

    def present(self, file: File) -> Path:
        """The file's path, after its size was compared. Raises BundleError when it is missing or of another size."""
        with self._opened(file):
            return self.path / file.path

    def described(self, file: File) -> TensorFile:
        """The tensors of a file by their names and shapes, for who reads no values: its size alone was compared."""
        with self._opened(file) as (descriptor, state):
            return TensorFile(mapped(self.path / file.path, descriptor, state))

    def checked(self, file: File) -> Path:
        """The file's path, after its size and SHA-256 were compared. Raises BundleError when they differ.

        Whoever opens the path afterwards may find another file there: ``content`` and ``tensors`` give what was
        compared.
        """
        return self.mapped(file).path

    def content(self, file: File) -> bytes:
        """The file's bytes, the very ones that were compared. Raises BundleError as ``mapped`` does."""
        return bytes(self.mapped(file).content)

    def tensors(self, file: File) -> TensorFile:
        """The tensors of a weights file, views of the bytes that were compared. Raises BundleError as ``mapped`` does,
        CheckpointError when it is no safetensors file.
        """
        return TensorFile(self.mapped(file))

    def mapped(self, file: File) -> MappedFile:
        """The file, mapped, after its size and SHA-256 were compared.

        Raises BundleError when it is missing, a link, of another size or of other content.
        """
        path = self.path / file.path
        with self._opened(file) as (descriptor, state):
            seen = self._seen.get(file)
            known = seen is not None and seen.state == state
            if seen is not None and known and (held := seen.mapping(path, state)):
                return held
            found = mapped(path, descriptor, state)
        settled = time.time_ns() - found.changed > CLOCK_STEP
        if not known:
            check_sha256(path, file, found.sha256)
        if settled:
            content = found.content
            self._seen[file] = _Seen(state, weakref.ref(content) if isinstance(content, mmap.mmap) else None)
        return found

    @contextmanager
    def _opened(self, file: File) -> Iterator[tuple[int, State]]:
        path = self.path / file.path
        with reading(path), opened(self.path, file.path) as (descriptor, state):
            if state[2] != file.size:
                raise BundleError(f"{path}: {state[2]} bytes, but the manifest says {file.size}; export the task again")
            yield descriptor, state


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises BundleError where the block can't read ``path``, a file of a bundle."""
    try:
        yield
    except OSError as error:
        if error.errno in ABSENT:
            raise BundleError(f"{path}: missing from the bundle; export the task again") from error
        raise BundleError(f"{path}: can't be read ({error.strerror}); export the task again") from error


def check_sha256(path: Path, file: File, found: str) -> None:
    """Raises BundleError unless the SHA-256 that was found is the file's."""
    if found != file.sha256:
        raise BundleError(f"{path}: content does not match the manifest's SHA-256; export the task again")


def digest_of(manifest: bytes) -> str:
    """What a bundle is pinned by, "sha256:" and the hash in hex, as registries write digests."""
    return f"sha256:{hashlib.sha256(manifest).hexdigest()}"


def open_bundle(path: Path, digest: str | None = None) -> Bundle:
    """Open the bundle in ``path``, which must have the ``digest`` where one is given.

    Raises BundleError when it is not one, is damaged, is of a newer schema, or has another digest.
    """
    content = _pinned_bytes(path, digest)
    return Bundle(path, parse_manifest(path / MANIFEST, content), digest_of(content))


def check_pinned(path: Path, digest: str | None) -> None:
    """Raises BundleError unless the bundle in ``path``, of whatever schema, has the digest; None is any."""
    if digest is not None:
        _pinned_bytes(path, digest)


def _pinned_bytes(path: Path, digest: str | None) -> bytes:
    if digest is not None and not DIGEST.fullmatch(digest):
        raise BundleError(
            f"{path}: {digest!r} is no digest; expected sha256: and 64 hexadecimal digits, as 'lorafuse bundle ls'"
            " prints"
        )
    content = manifest_bytes(path)
    found = digest_of(content)
    if digest not in (None, found):
        raise BundleError(f"{path}: the bundle is {found}, but {digest} was asked for; fetch that one, or ask for this")
    return content

"""A file mapped whole. It is opened once and without following a link, so that what is hashed is what is read later:
who renames another file into its place changes the folder, and not the mapping.

Truncating a mapped file ends the process that reads it (SIGBUS): the system has no other answer to a page that is gone.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # non-blocking: a pipe would wait for its writer

Content = bytes | mmap.mmap
State = tuple[int, int, int, int]


@dataclass(frozen=True)
class MappedFile:
    """A file's path for messages, its bytes, and its state when it was opened: device, inode, size, time of change in
    ns (the kernel's, which no program sets).
    """

    path: Path
    content: Content
    state: State

    @property
    def sha256(self) -> str:
        """Of the bytes as they are mapped, in hex."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def changed(self) -> int:
        """When the file was changed last, in ns."""
        return self.state[3]


@contextmanager
def opened(root: Path, relative: str) -> Iterator[tuple[int, State]]:
    """A descriptor of the regular file ``relative`` below ``root``, and its state. ``root`` itself may be a link.

    Raises OSError where the file is missing or no file, or anything on the way to it is a link.
    """
    descriptor = _descend(root, PurePosixPath(relative).parts)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise FileNotFoundError(2, "not a file", str(root / relative))
        yield descriptor, (found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns)
    finally:
        os.close(descriptor)


def mapped(path: Path, descriptor: int, state: State) -> MappedFile:
    """The open file, mapped read-only; the mapping lives on when the descriptor is closed."""
    size = state[2]
    if size == 0:  # an empty range can't be mapped
        return MappedFile(path, b"", state)
    return MappedFile(path, mmap.mmap(descriptor, size, access=mmap.ACCESS_READ), state)


def _descend(root: Path, parts: tuple[str, ...]) -> int:
    *folders, name = parts
    place = os.open(root, FOLDER)
    try:
        for folder in folders:
            inner = os.open(folder, FOLDER | os.O_NOFOLLOW, dir_fd=place)
            os.close(place)
            place = inner
        return os.open(name, FILE, dir_fd=place)
    finally:
        os.close(place)

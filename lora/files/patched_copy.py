"""A copy of a safetensors file in which some tensors get new values: the rest never passes through this process.

The untouched byte ranges are copied inside the kernel, in a thread, while the caller computes the new values; the first
eight bytes, without which the file can't be read, are written last, after everything else is on the disk.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lora.files.tensorfile import Array, TensorFile

HEAD = 8  # bytes: the size of the header
PIECE = 1 << 24  # bytes: what one system call copies


class PatchedCopy:
    """The copy while it is being made: ``write`` puts a tensor's new values where its old ones were."""

    def __init__(self, source: TensorFile, descriptor: int, pending: set[str]) -> None:
        self._source = source
        self._descriptor = descriptor
        self._pending = pending

    def write(self, name: str, values: Array) -> None:
        """``values`` must have the dtype and shape of the tensor that they replace."""
        span = self._source.spans[name]
        assert (values.dtype, values.shape) == (span.dtype, span.shape), f"{name}: not of the base's dtype and shape"
        self._pending.remove(name)
        _write_all(self._descriptor, np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, span.offset)

    def keep_the_rest(self) -> None:
        """Write the old values of the tensors that were left free and got no new ones."""
        for name in sorted(self._pending):
            self.write(name, self._source[name])


@contextmanager
def patched_copy(source: TensorFile, target: Path, changing: set[str]) -> Iterator[PatchedCopy]:
    """Copy ``source`` to ``target``, leaving free the ``changing`` tensors for the caller to write.

    An OSError (a full disk), of the copying thread too, passes through; the file then can't be read as safetensors.
    """
    free = {name for name in changing if name in source}
    with source.path.open("rb") as original, target.open("wb") as copy:
        os.truncate(copy.fileno(), source.path.stat().st_size)
        thread = _Copying(original.fileno(), copy.fileno(), list(_ranges_between(source, free)))
        patched = PatchedCopy(source, copy.fileno(), free)
        thread.start()
        try:
            yield patched
            patched.keep_the_rest()
        finally:
            thread.join()
        if thread.error is not None:
            raise thread.error
        os.fsync(copy.fileno())
        _write_all(copy.fileno(), memoryview(original.read(HEAD)), 0)


class _Copying(threading.Thread):
    """Copies byte ranges and flushes them; ``error`` is what went wrong."""

    def __init__(self, source: int, target: int, ranges: list[tuple[int, int]]) -> None:
        super().__init__(daemon=True)
        self._source, self._target, self._ranges = source, target, ranges
        self.error: OSError | None = None

    def run(self) -> None:
        """Runs in the thread."""
        try:
            for start, end in self._ranges:
                _copy_range(self._source, self._target, start, end)
            os.fsync(self._target)
        except OSError as error:
            self.error = error


def _ranges_between(source: TensorFile, free: set[str]) -> Iterator[tuple[int, int]]:
    """The byte ranges (start, end) after the head that belong to no free tensor."""
    start = HEAD
    for span in sorted((source.spans[name] for name in free), key=lambda span: span.offset):
        if span.offset > start:
            yield start, span.offset
        start = span.offset + span.length
    size = source.path.stat().st_size
    if size > start:
        yield start, size


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    for position in range(start, end, PIECE):
        length = min(PIECE, end - position)
        _copy_piece(source, target, position, length)
        # Starts writing the piece to the disk now, while the next is copied: the flush at the end then has little to
        # wait for.
        os.posix_fadvise(target, position, length, os.POSIX_FADV_DONTNEED)


def _copy_piece(source: int, target: int, position: int, length: int) -> None:
    done = 0
    try:
        while done < length:
            done += os.copy_file_range(source, target, length - done, position + done, position + done)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise
        # The two files lie on file systems between which the kernel can't copy.
        _write_all(target, memoryview(os.pread(source, length, position)), position)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written

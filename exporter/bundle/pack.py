"""Packing a bundle, or some of its tasks, into one tar file that ``tar xf`` turns into a bundle again.

Plain tar: weights don't compress, and everything can read it. The manifest comes last, so that an unpacking that was
cut short leaves a folder that is no bundle. The same bundle gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

from exporter.bundle.edits import only_tasks
from exporter.bundle.manifest import Bundle, check_sha256, open_bundle, reading
from exporter.bundle.manifest_file import MANIFEST
from exporter.bundle.records import File, all_files, encode
from exporter.bundle.staging import staging
from lora.errors import BundleError
from lora.files.durable import flush
from lora.progress import Progress, unheard

SUFFIX = ".tar"
MODE = 0o644


def pack_bundle(path: Path, out: Path, tasks: Collection[str] = (), progress: Progress = unheard) -> int:
    """Write the tasks (none named: all) of the bundle in ``path``, with the base, to the tar file ``out``; its size in
    bytes.

    The members lie in a folder named like ``out`` without its suffix. Every file's SHA-256 is compared on the way.
    Raises BundleError when ``out`` exists, lies in the bundle or is no name of a tar file, a task is unknown, a file is
    damaged, or the disk is full.
    """
    bundle = open_bundle(path)
    _check_place(bundle, out)
    manifest = only_tasks(bundle, tasks or bundle.manifest.tasks.keys())
    with staging(out) as stage:
        staged = stage / out.name
        with tarfile.open(staged, "w", format=tarfile.PAX_FORMAT) as tar:
            for file in sorted(set(all_files(manifest)), key=lambda file: file.path):
                progress(file.path)
                _add_file(tar, bundle, file, f"{out.stem}/{file.path}")
            content = encode(manifest)
            tar.addfile(_member(f"{out.stem}/{MANIFEST}", len(content)), io.BytesIO(content))
        flush(staged)
        staged.rename(out)
        flush(out.parent)
    return out.stat().st_size


def _check_place(bundle: Bundle, out: Path) -> None:
    if out.suffix != SUFFIX:
        raise BundleError(
            f"{out}: expected a name that ends in {SUFFIX}; without it, the name is that of the folder that 'tar xf'"
            " makes"
        )
    if os.path.lexists(out):
        raise BundleError(f"{out}: exists already; choose another name, or remove it")
    if out.resolve().is_relative_to(bundle.path.resolve()):
        raise BundleError(f"{out}: lies in the bundle that is to be packed; choose a place outside it")


def _add_file(tar: tarfile.TarFile, bundle: Bundle, file: File, name: str) -> None:
    path = bundle.present(file)
    with reading(path):
        content = path.open("rb")
    with content:
        hashed = _Hashed(path, content)
        tar.addfile(_member(name, file.size), hashed)
    check_sha256(path, file, hashed.sha256)


def _member(name: str, size: int) -> tarfile.TarInfo:
    """A member without owner and time, which are no part of the bundle."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, MODE
    return member


class _Hashed(io.RawIOBase):
    """A file of the bundle that is hashed while it is read.

    What can't be read is a BundleError: OSErrors are the tar file's.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        with reading(self._path):
            content = self._file.read(size)
        self._digest.update(content)
        return content

    @property
    def sha256(self) -> str:
        """Of what was read so far, in hex."""
        return self._digest.hexdigest()

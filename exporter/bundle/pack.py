"""Packing a bundle, or some of its tasks, into one tar file that ``tar xf`` turns into a bundle again.

Plain tar: weights don't compress, and everything can read it. The manifest comes last, so that an unpacking that was
cut short leaves a folder that is no bundle. The same bundle gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import BinaryIO

import msgspec

from exporter.bundle.manifest import MANIFEST, Bundle, File, Manifest, all_files, encode, open_bundle
from exporter.bundle.staging import staging
from lora.durable import flush
from lora.errors import BundleError

MODE = 0o644


def pack_bundle(path: Path, out: Path, tasks: Collection[str] = (), progress: Callable[[str], None] = lambda step: None) -> int:
    """Write the tasks (none named: all) of the bundle in ``path``, with the base, to the tar file ``out``; its size in bytes.

    The members lie in a folder named like ``out`` without its suffix. Every file's SHA-256 is compared on the way.
    Raises BundleError when ``out`` exists or lies in the bundle, a task is unknown, a file is damaged, or the disk is full.
    """
    bundle = open_bundle(path)
    if out.exists():
        raise BundleError(f"{out}: exists already; choose another name, or remove it")
    if out.resolve().is_relative_to(path.resolve()):
        raise BundleError(f"{out}: lies in the bundle that is to be packed; choose a place outside it")
    manifest = _with_tasks(bundle, tasks or sorted(bundle.manifest.tasks))
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


def _with_tasks(bundle: Bundle, names: Collection[str]) -> Manifest:
    tasks = {name: bundle.task(name) for name in sorted(names)}
    used = {task.graph for task in tasks.values()}
    graphs = {digest: graph for digest, graph in bundle.manifest.graphs.items() if digest in used}
    return msgspec.structs.replace(bundle.manifest, tasks=tasks, graphs=graphs)


def _add_file(tar: tarfile.TarFile, bundle: Bundle, file: File, name: str) -> None:
    with bundle.present(file).open("rb") as content:
        hashed = _Hashed(content)
        tar.addfile(_member(name, file.size), hashed)
    if hashed.sha256 != file.sha256:
        raise BundleError(f"{bundle.path / file.path}: content does not match the manifest's SHA-256; export the task again")


def _member(name: str, size: int) -> tarfile.TarInfo:
    """A member without owner and time, which are no part of the bundle."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, MODE
    return member


class _Hashed(io.RawIOBase):
    """A file that is hashed while it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        content = self._file.read(size)
        self._digest.update(content)
        return content

    @property
    def sha256(self) -> str:
        """Of what was read so far, in hex."""
        return self._digest.hexdigest()

"""Changing a bundle so that an interrupted or failed change leaves the former one usable.

New files are written to a staging folder beside the bundle (inside it where it is a mount point), flushed, and moved in
under names that no current file has; replacing ``manifest.json`` is the one step that makes the change visible. What
the new manifest no longer names is removed afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from exporter.bundle.manifest import Bundle, digest_of, open_bundle
from exporter.bundle.manifest_file import MANIFEST, manifest_bytes
from exporter.bundle.records import File, Manifest, all_files, encode
from lora.errors import BundleError
from lora.files.durable import INSIDE, flush, locked, staging_folder
from lora.files.tensorfile import file_sha256

LOST = "lost+found"  # what a new file system holds


@contextmanager
def staging(bundle: Path) -> Iterator[Path]:
    """A staging folder on the bundle's file system; gone at the end, whatever happened.

    Raises BundleError, in one line, when the disk is full or not writable.
    """
    try:
        with staging_folder(bundle) as stage:
            yield stage
    except OSError as error:
        raise BundleError(
            f"{bundle}: can't be written ({error.strerror or error}); the bundle is as it was before"
        ) from error


def named_by_content(path: Path, stem: str) -> File:
    """Rename a staged file to ``<stem>-<hash><suffix>``, in its folder, and describe it from the staging root."""
    sha256 = file_sha256(path)
    target = path.with_name(f"{stem}-{sha256[:8]}{path.suffix}")
    path.rename(target)
    return File(path=target.name, size=target.stat().st_size, sha256=sha256)


def describe(root: Path, relative: str) -> File:
    """The manifest's record of a file below ``root``."""
    path = root / relative
    return File(path=relative, size=path.stat().st_size, sha256=file_sha256(path))


def commit(bundle: Path, stage: Path, update: Callable[[Manifest | None], Manifest]) -> Bundle:
    """Move the staged files into the bundle and make ``update(current manifest)`` the manifest.

    The lock makes concurrent commits follow one another, and ``update`` sees what the one before has written.
    """
    with locked(bundle):
        current = current_bundle(bundle)
        manifest = update(current.manifest if current else None)
        for path in stage.rglob("*"):
            if path.is_file():
                flush(path)
        content = encode(manifest)
        _write_flushed(
            stage / MANIFEST, content
        )  # before anything moves: should the disk be full by now, nothing has changed
        if current is None and not stage.is_relative_to(bundle):
            stage.chmod(0o755)
            stage.rename(bundle)
        else:
            _move_in(stage, bundle)
            (stage / MANIFEST).replace(bundle / MANIFEST)
            if current is not None:
                _remove_unnamed(bundle, current.manifest, manifest)
        flush(bundle)
        flush(bundle.parent)
    return Bundle(bundle, manifest, digest_of(content))


def amend(bundle: Path, stage: Path, update: Callable[[Bundle], Manifest]) -> Bundle:
    """As ``commit``, of a bundle that is to be there already.

    Raises BundleError when it has gone meanwhile, and creates none.
    """

    def amended(current: Manifest | None) -> Manifest:
        if current is None:
            raise BundleError(f"{bundle}: the bundle has gone meanwhile; create it again with 'lorafuse export'")
        return update(Bundle(bundle, current))

    return commit(bundle, stage, amended)


def replace_manifest(bundle: Path, update: Callable[[bytes], Manifest]) -> Bundle:
    """Replace the manifest alone, in one step, by what ``update`` makes of its bytes. Nothing else is touched."""
    with staging(bundle) as stage, locked(bundle):
        manifest = update(manifest_bytes(bundle))
        content = encode(manifest)
        _write_flushed(stage / MANIFEST, content)
        (stage / MANIFEST).replace(bundle / MANIFEST)
        flush(bundle)
    return Bundle(bundle, manifest, digest_of(content))


def current_bundle(bundle: Path) -> Bundle | None:
    """The bundle there is, or None where one can be created: no such folder, or an empty one.

    What is being staged in it does not count, nor does a file system's own folder in a mount point.
    """
    if not bundle.exists() or (bundle.is_dir() and all(_is_nothing(path) for path in bundle.iterdir())):
        return None
    return open_bundle(bundle)


def _is_nothing(path: Path) -> bool:
    return path.name.startswith(INSIDE) or path.name == LOST


def _move_in(stage: Path, bundle: Path) -> None:
    for path in sorted(stage.rglob("*")):
        if path.is_file() and path != stage / MANIFEST:
            target = bundle / path.relative_to(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
            flush(target.parent)


def _remove_unnamed(bundle: Path, former: Manifest, manifest: Manifest) -> None:
    """Remove what the former manifest named and this one does not; a file that is not ours stays."""
    kept = {file.path for file in all_files(manifest)}
    for path in sorted({file.path for file in all_files(former)} - kept):
        with suppress(
            OSError
        ):  # the change is done by now; a file that can't be removed, or a folder with others in it, stays
            (bundle / path).unlink(missing_ok=True)
            for folder in (bundle / path).relative_to(bundle).parents[:-1]:
                (bundle / folder).rmdir()


def _write_flushed(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    flush(path)

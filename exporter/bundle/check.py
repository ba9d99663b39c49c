"""Checking a bundle as it lies on the disk: every byte that the manifest names, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.manifest_file import MANIFEST
from exporter.bundle.records import all_files
from lora.errors import BundleError
from lora.progress import Progress, unheard
from lora.wording import printable


@dataclass(frozen=True)
class Finding:
    """Something that is not as the manifest says; ``path`` is relative to the bundle."""

    path: str
    problem: str


def check_bundle(path: Path, progress: Progress = unheard) -> list[Finding]:
    """Everything that is wrong with the bundle in ``path``: files missing, resized or changed, and files nobody names.

    A manifest that can't be read, or leads out of the bundle, is the only finding then. Raises BundleError when there
    is no bundle in ``path`` at all.
    """
    if not (path / MANIFEST).is_file():
        raise BundleError(f"{path}: not a bundle (no {MANIFEST}); create one with 'lorafuse export'")
    try:
        bundle = open_bundle(path)
    except BundleError as error:
        return [Finding(MANIFEST, str(error))]
    return [*_damaged(bundle, progress), *_extra(bundle)]


def _damaged(bundle: Bundle, progress: Progress) -> Iterator[Finding]:
    for file in sorted(set(all_files(bundle.manifest)), key=lambda file: file.path):
        progress(file.path)
        try:
            bundle.checked(file)
        except BundleError as error:
            yield Finding(file.path, str(error))


def _extra(bundle: Bundle) -> Iterator[Finding]:
    """Files that the manifest does not name: another's, or what an interrupted export left.

    Links count, and are not followed.
    """
    named = {file.path for file in all_files(bundle.manifest)} | {MANIFEST}
    for folder, folders, files in os.walk(bundle.path):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for name in sorted([*files, *links]):
            relative = Path(folder, name).relative_to(bundle.path).as_posix()
            if relative not in named:
                shown = printable(relative)
                yield Finding(shown, f"{bundle.path / shown}: named by no manifest; remove it if it is not yours")

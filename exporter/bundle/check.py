"""Checking a bundle as it lies on the disk: every byte that the manifest names, what the files say of each other, and
nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.manifest_file import MANIFEST
from exporter.bundle.records import all_files
from exporter.bundle.task_part import TaskPart, task_parts
from lora.errors import BundleError, LorafuseError
from lora.files.durable import INSIDE, left_over, locked, remove_left_over
from lora.formats.factors import PICKLES
from lora.progress import Progress, unheard
from lora.wording import printable


@dataclass(frozen=True)
class Finding:
    """Something that is not as the manifest says; ``path`` is relative to the bundle."""

    path: str
    problem: str


def check_bundle(path: Path, progress: Progress = unheard) -> list[Finding]:
    """Everything that is wrong with the bundle in ``path``: files missing, resized or changed, tasks whose files do not
    belong together, and files nobody names.

    A manifest that can't be read, or leads out of the bundle, is the only finding then. Raises BundleError when there
    is no bundle in ``path`` at all.
    """
    if not os.path.lexists(path / MANIFEST):
        raise BundleError(f"{path}: not a bundle (no {MANIFEST}); create one with 'lorafuse export'")
    try:
        bundle = open_bundle(path)
    except BundleError as error:
        return [Finding(MANIFEST, str(error))]
    damaged = list(_damaged(bundle, progress))
    return [*damaged, *_inconsistent(bundle, {finding.path for finding in damaged}, progress), *_extra(bundle)]


def repair(path: Path) -> tuple[Path, ...]:
    """Remove the staging folders that killed changes of the bundle in ``path`` have left; which they were."""
    with locked(path):
        return tuple(remove_left_over(path))


def _damaged(bundle: Bundle, progress: Progress) -> Iterator[Finding]:
    for file in sorted(set(all_files(bundle.manifest)), key=lambda file: file.path):
        progress(file.path)
        try:
            bundle.checked(file)
        except BundleError as error:
            yield Finding(file.path, str(error))


def _inconsistent(bundle: Bundle, damaged: Set[str], progress: Progress) -> Iterator[Finding]:
    """Tasks whose graph, weight map, weights and adapter do not say the same; those of sound files only."""
    told = set()
    for name in sorted(bundle.manifest.tasks):
        for part in task_parts(bundle, name):
            files = (*bundle.manifest.base.weights, *part.part.own_weights, part.part.model)
            if damaged & {file.path for file in (*files, *part.task.adapter)}:
                continue
            progress(f"{name} ({part.role})")
            problem = _problem(part)
            if problem is not None and problem not in told:
                told.add(problem)
                yield Finding(part.part.model.path, problem)


def _problem(part: TaskPart) -> str | None:
    """Why the part could not be loaded. A pickled adapter, which takes torch to read, is not opened."""
    try:
        part.weights_of(part.model_graph)
        if not any(file.path.endswith(PICKLES) for file in part.task.adapter):
            _ = part.merged_at_load
    except LorafuseError as error:
        return str(error)
    return None


def _extra(bundle: Bundle) -> Iterator[Finding]:
    """Files that the manifest does not name: another's, or what an interrupted export left.

    Links count, and are not followed. What a change is staging now is its own.
    """
    for stage in left_over(bundle.path):
        shown = printable(os.path.relpath(stage, bundle.path))
        yield Finding(shown, f"{stage}: left by a change that was killed; 'bundle check --repair' removes it")
    named = {file.path for file in all_files(bundle.manifest)} | {MANIFEST}
    for folder, folders, files in os.walk(bundle.path):
        folders[:] = [name for name in folders if Path(folder) != bundle.path or not name.startswith(INSIDE)]
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for name in sorted([*files, *links]):
            relative = Path(folder, name).relative_to(bundle.path).as_posix()
            if relative not in named:
                shown = printable(relative)
                yield Finding(shown, f"{bundle.path / shown}: named by no manifest; remove it if it is not yours")

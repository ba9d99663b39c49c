"""A bundle that is opened beside a writer who renames other files into it every two milliseconds."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import engines
from engines.serving.runtime import Mode
from exporter.task import add_task
from lora.errors import LorafuseError
from lora.files.tensorfile import Array
from scripts.support.hand_made_bundle import inputs
from scripts.support.resigned import part_of
from scripts.support.served_by_cpp import ServedByCpp, arrays, words

TASK = "left"
CLOSE = 1e-4
REFUSED, WRONG = "refused", "wrong"


@dataclass(frozen=True)
class Race:
    """A bundle whose file ``target`` is one of two; the answers that are right, by name."""

    bundle: Path
    target: Path
    faces: tuple[Path, Path]
    right: Mapping[str, Array]

    def verdict(self, found: Array) -> str:
        """The name of the right answer that was given, or "wrong"."""
        names = (name for name, wanted in self.right.items() if np.abs(found - wanted).max() < CLOSE)
        return next(names, WRONG)


def race_of_weights(made: Path, folder: Path) -> Race:
    """A task's weights file, or another of its size: whoever opens the bundle answers as it was made, or refuses."""
    bundle = Path(shutil.copytree(made, folder / "bundle"))
    target = bundle / part_of(bundle, TASK)["weights"]["path"]
    content = target.read_bytes()
    one, other = folder / "one", folder / "other"
    one.write_bytes(content)
    other.write_bytes(content[:-256] + bytes(256))
    return Race(bundle, target, (one, other), {"old": _answer(bundle)})


def race_of_manifests(made: Path, folder: Path) -> Race:
    """The manifest before and after the task was replaced, all files being there: every answer is the old or the new
    one's.
    """
    bundle = Path(shutil.copytree(made, folder / "bundle"))
    target = bundle / "manifest.json"
    add_task(bundle, made.parent / f"{made.name}-adapter-right", TASK)
    shutil.copytree(made, bundle, dirs_exist_ok=True, ignore=shutil.ignore_patterns(target.name))
    return Race(bundle, target, (made / target.name, _kept(target)), {"old": _answer(made), "new": _answer(bundle)})


RACES = {"weights": race_of_weights, "manifests": race_of_manifests}


@contextmanager
def writer(race: Race) -> Iterator[None]:
    """A process that renames, for as long as the block lasts."""
    command: list[str | Path] = [sys.executable, "-m", "scripts.support.renaming", race.target, *race.faces]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.readline()  # it has begun
        try:
            yield
        finally:
            running.kill()


def opens_in_python(race: Race, mode: Mode, count: int) -> dict[str, int]:
    """How often each verdict came of as many opens."""
    found = dict.fromkeys((*race.right, REFUSED, WRONG), 0)
    for _ in range(count):
        try:
            with engines.open(race.bundle, mode, threads=1) as runtime:
                found[race.verdict(runtime.run(TASK, inputs())["logits"])] += 1
        except LorafuseError:
            found[REFUSED] += 1
    return found


def opens_in_cpp(race: Race, mode: Mode, count: int, served: ServedByCpp) -> dict[str, int]:
    """The same of the C++ runtime."""
    found = dict.fromkeys((*race.right, REFUSED, WRONG), 0)
    said = served.ask("race", count, race.bundle, mode, TASK, *words(inputs()))
    for line in said.split("\t"):
        times, _, answer = line.partition(" ")
        is_answer = answer.startswith("logits:")
        found[race.verdict(arrays(answer)["logits"]) if is_answer else REFUSED] += int(times)
    return found


def _kept(file: Path) -> Path:
    """A copy of the file outside its folder."""
    return Path(shutil.copy(file, file.parents[1] / "kept"))


def _answer(bundle: Path) -> Array:
    with engines.load(bundle, TASK, threads=1) as session:
        return session.run(inputs())["logits"]

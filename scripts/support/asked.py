"""A bundle's tasks, asked of both runtimes: what each answers, or says where it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import engines
from engines.serving.runtime import Mode
from lora.errors import LorafuseError
from lora.files.tensorfile import Array
from scripts.support.hand_made_bundle import inputs
from scripts.support.served_by_cpp import RefusedError, ServedByCpp

Answer = dict[str, Array] | str  # the outputs, or the refusal


def asked_in_python(
    bundle: Path, tasks: Iterable[str], mode: Mode, given: Mapping[str, Array] | None = None
) -> dict[str, Answer]:
    """What the Python runtime says of the tasks, asked in this order."""
    try:
        runtime = engines.open(bundle, mode, threads=1)
    except LorafuseError as error:
        return dict.fromkeys(tasks, str(error))
    with runtime:
        return {task: _answer(runtime.run, task, given) for task in tasks}


def asked_in_cpp(
    served: ServedByCpp, bundle: Path, tasks: Iterable[str], mode: Mode, given: Mapping[str, Array] | None = None
) -> dict[str, Answer]:
    """The same of the C++ runtime."""
    try:
        served.open(bundle, mode)
    except RefusedError as error:
        return dict.fromkeys(tasks, str(error))
    return {task: _answer(served.run, task, given) for task in tasks}


def _answer(
    run: Callable[[str, Mapping[str, Array]], dict[str, Array]], task: str, given: Mapping[str, Array] | None
) -> Answer:
    try:
        return run(task, given or inputs())
    except (LorafuseError, RefusedError) as error:
        return str(error)

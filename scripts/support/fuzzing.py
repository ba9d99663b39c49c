"""A mutated bundle, asked for in both languages: they decide alike, and what no manifest names has no say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import engines
from engines.serving.runtime import Mode
from lora.errors import LorafuseError
from lora.files.tensorfile import Array
from scripts.support.hand_made_bundle import TASKS, inputs
from scripts.support.mutations import mutated, without_strays
from scripts.support.served_by_cpp import RefusedError, ServedByCpp

Outcome = Array | str  # the first output, or what the runtime says of the task
FACTORS = "stored as factors"  # which the C++ runtime does not merge


def disagreements(made: Path, seeds: Iterable[int], served: ServedByCpp) -> Iterator[str]:
    """What is wrong of each seed's mutation, in one line; nothing where all is well.

    The C++ runtime is asked on the bundle with the stray files, the Python one on that or on a copy without, in turn.
    """
    for seed in seeds:
        with TemporaryDirectory() as folder:
            bundle = mutated(made, Path(folder), seed)
            mode: Mode = "resident" if seed % 2 else "dedicated"
            in_cpp = asked_in_cpp(bundle, mode, served)
            alone = without_strays(bundle, Path(folder)) if seed % 4 < 2 else bundle
            in_python = asked_in_python(alone, mode)
        for task in TASKS:
            one, other = in_python[task], in_cpp[task]
            if not (isinstance(other, str) and FACTORS in other) and not alike(one, other):
                yield f"seed {seed}, {mode}, task {task}: Python {_shown(one)}; C++ {_shown(other)}"


def asked_in_python(bundle: Path, mode: Mode) -> dict[str, Outcome]:
    try:
        runtime = engines.open(bundle, mode, threads=1)
    except LorafuseError as error:
        return dict.fromkeys(TASKS, str(error))
    found: dict[str, Outcome] = {}
    with runtime:
        for task in TASKS:
            try:
                found[task] = _first(runtime.run(task, inputs()))
            except LorafuseError as error:
                found[task] = str(error)
    return found


def asked_in_cpp(bundle: Path, mode: Mode, served: ServedByCpp) -> dict[str, Outcome]:
    try:
        served.open(bundle, mode)
    except RefusedError as error:
        return dict.fromkeys(TASKS, str(error))
    found: dict[str, Outcome] = {}
    for task in TASKS:
        try:
            found[task] = _first(served.run(task, inputs()))
        except RefusedError as error:
            found[task] = str(error)
    return found


def alike(one: Outcome, other: Outcome) -> bool:
    """Whether both are refusals, or the same answer."""
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and isinstance(other, str)
    same: bool = one.shape == other.shape and np.allclose(one, other, rtol=1e-3, atol=1e-4, equal_nan=True)
    return same


def _first(outputs: dict[str, Array]) -> Array:
    return outputs[min(outputs)]


def _shown(outcome: Outcome) -> str:
    return f"refuses ({outcome})" if isinstance(outcome, str) else f"answers {outcome.tolist()}"

"""A mutated bundle, asked for in both languages: they decide alike, and what no manifest names has no say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from engines.serving.runtime import Mode
from lora.files.tensorfile import Array
from scripts.support.asked import Answer, asked_in_cpp, asked_in_python
from scripts.support.hand_made_bundle import TASKS
from scripts.support.mutations import mutated, without_strays
from scripts.support.served_by_cpp import ServedByCpp

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
            in_cpp = asked_in_cpp(served, bundle, TASKS, mode)
            alone = without_strays(bundle, Path(folder)) if seed % 4 < 2 else bundle
            in_python = asked_in_python(alone, TASKS, mode)
        for task in TASKS:
            one, other = _first(in_python[task]), _first(in_cpp[task])
            if not (isinstance(other, str) and FACTORS in other) and not alike(one, other):
                yield f"seed {seed}, {mode}, task {task}: Python {_shown(one)}; C++ {_shown(other)}"


def alike(one: Outcome, other: Outcome) -> bool:
    """Whether both are refusals, or the same answer."""
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and isinstance(other, str)
    same: bool = one.shape == other.shape and np.allclose(one, other, rtol=1e-3, atol=1e-4, equal_nan=True)
    return same


def _first(answer: Answer) -> Outcome:
    return answer if isinstance(answer, str) else answer[min(answer)]


def _shown(outcome: Outcome) -> str:
    return f"refuses ({outcome})" if isinstance(outcome, str) else f"answers {outcome.tolist()}"

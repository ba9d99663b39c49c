"""The instructions of one run, counted by valgrind's callgrind: a witness without noise, of work and not of time.

Each arm is opened and run in a process of its own, on valgrind's model of a processor. It has AVX2 and not AVX-512, so
that kernels are those of such a machine; the counts of two arms are compared, never one of them with a time.
"""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from engines.latency.arm_engines import OpenModel
from engines.latency.harness import Arm
from lora.errors import EngineError
from lora.files.tensorfile import Array
from lora.progress import Progress, unheard

CHILD = "engines.latency.counted"
# The child makes one run within this function of the C library, which nothing else in it calls; by both its names.
# (qsort and bsearch won't do: compilers turn them into jumps or inline them, so that callgrind sees no call.)
AROUND = ("qsort_r", "__qsort_r")
SUMMARY = "summary:"  # https://valgrind.org/docs/manual/cl-format.html


def check_countable(on_thread: bool) -> None:
    """Raises EngineError where instructions can't be counted: no valgrind, or engines that run elsewhere."""
    if not on_thread:
        raise EngineError(
            "--count-instructions: counts those of the calling thread; choose --backend onnxruntime with --threads 1 (a"
            " TensorRT engine's counterpart, its layers and tactics, is shown by 'lorafuse verify --engine')"
        )
    if shutil.which("valgrind") is None:
        raise EngineError("--count-instructions: valgrind is not installed; install it, or leave the option out")


def count_instructions(
    arms: Sequence[Arm], inputs: Mapping[str, Array], progress: Progress = unheard
) -> dict[str, int]:
    """Of each arm, the instructions of one run after a warm-up; takes minutes an arm.

    The arms are opened from models. Raises EngineError where valgrind or a run under it fails.
    """
    counts: dict[str, int] = {}
    with TemporaryDirectory(prefix="lorafuse-counted-") as folder:
        for number, arm in enumerate(arms):
            progress(f"counting the instructions of '{arm.name}', {number + 1} of {len(arms)}")
            counts[arm.name] = _count(arm, inputs, Path(folder) / str(number))
    return counts


def _count(arm: Arm, inputs: Mapping[str, Array], folder: Path) -> int:
    assert isinstance(arm.open, OpenModel), "check_countable lets no other backend through"
    folder.mkdir()
    job, counted = folder / "job", folder / "counted"
    job.write_bytes(pickle.dumps((arm.open.model, dict(inputs) | dict(arm.open.fed))))
    command = [
        "valgrind",
        "--tool=callgrind",
        *(f"--toggle-collect={name}" for name in AROUND),
        f"--callgrind-out-file={counted}",
    ]
    done = subprocess.run(  # noqa: S603  # our own module, on a file that was just written
        [*command, sys.executable, "-m", CHILD, str(job)], capture_output=True, text=True, check=False
    )
    found = _summary(counted)
    if done.returncode or not found:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise EngineError(f"arm '{arm.name}': valgrind could not count its instructions (it said: {said})")
    return found


def _summary(path: Path) -> int:
    """The instructions that a file of callgrind's sums up; 0 where there are none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(SUMMARY)), 0)

"""Eight threads ask one process for a hundred tasks of MiniLM at random, and every answer is compared with its oracle.

    python -m scripts.checks.soak [--minutes 10] [--threads 8] [--budget 150]

Three tasks are the demo's, stored dense; 97 are stored as factors and merged when they are loaded. The budget of
megabytes makes tasks come and go all the time. Half of the time is spent in each mode. An oracle is what the task
answered when it was loaded alone, by ``engines.load``: a dedicated session must give the same bits; a resident one,
which computes with weights that are not prepacked, must stay within 2e-5 of it, and always give the same bits itself.
The memory that the process has after a third of the time must not have grown at the end. Exit status 1 otherwise.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import engines
from engines.feeds.inputs import random_inputs, sizes
from engines.serving.runtime import Mode, Runtime
from exporter.bundle.manifest import Bundle
from exporter.bundle.task_part import task_part
from lora.files.tensorfile import Array
from scripts.support.minilm_bundle import demo_bundle, with_further

CLOSE = 2e-5
GROWTH = 1.05  # of the anonymous memory, between a third of the time and its end
LENGTHS = (4, 16)


@dataclass
class Tally:
    """What the threads have seen."""

    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    first: dict[tuple[str, int], Array] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, task: str, length: int, found: Array, oracle: Array, mode: Mode) -> None:
        with self.lock:
            self.answers += 1
            before = self.first.setdefault((task, length), found)
            bound = 0 if mode == "dedicated" else CLOSE
            if (found != before).any() or np.abs(found - oracle).max() > bound:
                self.wrong.append(
                    f"{task}, {length} tokens: {np.abs(found - oracle).max():.1e} from its oracle,"
                    f" {np.abs(found - before).max():.1e} from before"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument(
        "--budget",
        type=int,
        default=150,
        help="megabytes of tasks; in dedicated mode, where each holds the base too, three times as many",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = with_further(demo_bundle(Path(folder) / "bundle"), 97)
        inputs = {
            length: random_inputs(task_part(bundle, "movies").graph, 30522, sizes(1, length), seed=length)
            for length in LENGTHS
        }
        oracles = {
            (task, length): values for task in bundle.manifest.tasks for length, values in alone(bundle, task, inputs)
        }
        good = True
        budgets: dict[Mode, int] = {"resident": arguments.budget, "dedicated": 3 * arguments.budget}
        for mode, budget in budgets.items():
            with engines.open(bundle.path, mode, threads=1, memory=budget * 10**6) as runtime:
                good &= soak(runtime, mode, inputs, oracles, arguments.threads, arguments.minutes * 30)
    sys.exit(0 if good else 1)


def alone(bundle: Bundle, task: str, inputs: dict[int, dict[str, Array]]) -> Iterator[tuple[int, Array]]:
    with engines.load(bundle.path, task, threads=1) as session:
        for length, values in inputs.items():
            yield length, session.run(values)["logits"]


def soak(
    runtime: Runtime,
    mode: Mode,
    inputs: dict[int, dict[str, Array]],
    oracles: dict[tuple[str, int], Array],
    count: int,
    seconds: float,
) -> bool:
    tally, ends = Tally(), time.monotonic() + seconds
    asking = [
        threading.Thread(target=ask, args=(runtime, mode, inputs, oracles, seed, ends, tally)) for seed in range(count)
    ]
    for thread in asking:
        thread.start()
    time.sleep(seconds / 3)
    early = anonymous()
    for thread in asking:
        thread.join()
    late = anonymous()
    grew, seen = late > early * GROWTH, len({task for task, _ in tally.first})
    print(
        f"{mode}: {tally.answers} answers of {seen} tasks from {count} threads in {seconds / 60:.1f} min,"
        f" {len(tally.wrong)} wrong"
    )
    print(
        f"  {len(runtime.loaded)} tasks held; anonymous memory {early / 1e6:.0f} MB after a third, {late / 1e6:.0f} MB"
        f" at the end{', GROWN' if grew else ''}"
    )
    for line in tally.wrong[:10]:
        print(f"  {line}")
    return not grew and not tally.wrong


def ask(
    runtime: Runtime,
    mode: Mode,
    inputs: dict[int, dict[str, Array]],
    oracles: dict[tuple[str, int], Array],
    seed: int,
    ends: float,
    tally: Tally,
) -> None:
    chance = random.Random(seed)
    while time.monotonic() < ends:
        task, length = chance.choice(list(oracles))
        try:
            found = runtime.run(task, inputs[length])["logits"]
        except Exception as error:
            with tally.lock:
                tally.wrong.append(f"{task}: {error}")
            continue
        tally.note(task, length, found, oracles[task, length], mode)


def anonymous() -> float:
    """This process's memory that no file backs, in bytes."""
    found = next(
        line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")
    )
    return int(found) * 1024


if __name__ == "__main__":
    main()

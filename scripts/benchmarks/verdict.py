"""Is the harness right? Its verdicts on synthetic machines whose truth is known.

    python -m scripts.benchmarks.verdict [--runs 10000] [--sets 48] [--processes N] [--markdown]

Each run is a machine that times base, base again and merged in sets of sessions: autocorrelated moods that all arms
share, heavy-tailed noise and spikes of each run, and a bias of each session, also heavy-tailed, with jumps. The
harness's own looks, intervals and controls judge it. The verdict must be wrong in at most 5 % of runs where merged is
slower by exactly the margin, in none where it is by three margins, and be there, within the sets, in at least 80 %
where it is as fast.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from engines.commands.terminal import print_table
from engines.latency.equivalence import paired_ratio
from engines.latency.harness import SETS
from engines.latency.report import Verdict
from engines.latency.sequential import until_decided
from engines.latency.verdict import AGAIN, MERGED, judge
from lora.files.tensorfile import Array

MARGIN = 0.01
ROUNDS = 20
RATIOS = {
    "as fast": 1.0,
    "slower by the margin": 1 + MARGIN,
    "faster by the margin": 1 / (1 + MARGIN),
    "slower by 3 margins": 1 + 3 * MARGIN,
}


@dataclass(frozen=True)
class Machine:
    """How it disturbs times, as standard deviations of their logarithms: ``session`` of one to the next, ``run`` of one
    to the next.

    ``mood`` moves all arms of neighbouring rounds together, ``spikes`` and ``jumps`` are the share of runs that take
    long and of sessions that are 4 % off.
    """

    name: str
    session: float
    run: float
    mood: float = 0.02
    spikes: float = 0.03
    jumps: float = 0.02


MACHINES = (
    Machine("quiet", session=0.003, run=0.01),
    Machine("shared", session=0.006, run=0.02, jumps=0.05),
    Machine("rough", session=0.015, run=0.05, jumps=0.1),
)


@dataclass(frozen=True)
class Found:
    """A verdict, and after how many sets."""

    verdict: Verdict
    sets: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000, help="Runs of each machine and truth. Default: 10000.")
    parser.add_argument(
        "--sets", type=int, default=SETS, help="Sets of sessions that the budget has time for. Default: the harness's."
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="Default: one a core.")
    parser.add_argument("--markdown", action="store_true", help="Print the table as Markdown.")
    arguments = parser.parse_args()
    rows, right = [], True
    with ProcessPoolExecutor(arguments.processes) as pool:
        for machine in MACHINES:
            for truth, ratio in RATIOS.items():
                found = list(
                    pool.map(partial(one_run, machine, ratio, arguments.sets), range(arguments.runs), chunksize=100)
                )
                shares = shares_of(found)
                right = right and is_right(machine, truth, shares)
                sets = float(np.mean([one.sets for one in found]))
                rows.append(
                    (
                        machine.name,
                        truth,
                        *(f"{shares[verdict]:.2%}" for verdict in ("equivalent", "slower", "undecided")),
                        f"{sets:.1f}",
                    )
                )
    columns = ("machine", "merged is", "equivalent", "slower", "undecided", "sets")
    title = f"{arguments.runs} runs each, margin {MARGIN:.0%}, at most {arguments.sets} sets of {ROUNDS} rounds"
    if arguments.markdown:
        print("\n".join("| " + " | ".join(row) + " |" for row in (columns, ("---",) * len(columns), *rows)))
    else:
        print_table(title, columns, rows)
    print("the harness is right" if right else "THE HARNESS IS WRONG")
    return 0 if right else 1


def shares_of(found: Sequence[Found]) -> dict[str, float]:
    """How often each verdict was given."""
    counts = Counter(one.verdict for one in found)
    return {verdict: counts[verdict] / len(found) for verdict in ("equivalent", "slower", "undecided")}


def is_right(machine: Machine, truth: str, shares: dict[str, float]) -> bool:
    """What was promised of every machine; of a rough one not that it decides."""
    match truth:
        case "as fast":
            return shares["slower"] <= 0.05 and (machine.name == "rough" or shares["equivalent"] >= 0.80)
        case "slower by 3 margins":
            return shares["equivalent"] == 0
    return shares["equivalent"] <= 0.05 and shares["slower"] <= 0.05


def one_run(machine: Machine, ratio: float, most_sets: int, seed: int) -> Found:
    """One run of the harness on a machine where merged takes ``ratio`` as long as the base."""
    random = np.random.default_rng((seed, round(ratio * 1e4)))

    def judged(sets: Sequence[Array], error: float) -> Found:
        base, again, merged = np.moveaxis(np.stack(sets), 2, 0)
        decisions = {
            AGAIN: paired_ratio(again, base, error).decide(MARGIN),
            MERGED: paired_ratio(merged, base, error).decide(MARGIN),
        }
        return Found(judge(decisions, MARGIN)[0], len(sets))

    return until_decided(lambda number: simulated(machine, ratio, random), judged, lambda sets: sets >= most_sets)


def simulated(machine: Machine, ratio: float, random: np.random.Generator) -> Array:
    """The times of one set of sessions, shape (rounds, 3): base, base again, merged."""
    unit = 3**0.5  # the standard deviation of Student's t with 3 degrees of freedom
    mood = np.zeros(ROUNDS)
    steps = random.standard_normal(ROUNDS) * machine.mood
    for round_ in range(1, ROUNDS):
        mood[round_] = 0.8 * mood[round_ - 1] + 0.6 * steps[round_]
    session = random.standard_t(3, 3) / unit * machine.session + (random.random(3) < machine.jumps) * random.choice(
        [-0.04, 0.04], 3
    )
    run = random.standard_t(3, (ROUNDS, 3)) / unit * machine.run + (
        random.random((ROUNDS, 3)) < machine.spikes
    ) * random.exponential(0.3, (ROUNDS, 3))
    times: Array = 1e6 * np.exp(mood[:, None] + session + run) * [1, 1, ratio]
    return times


if __name__ == "__main__":
    raise SystemExit(main())

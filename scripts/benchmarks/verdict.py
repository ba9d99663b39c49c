"""Is the harness right? Its verdicts on synthetic machines whose truth is known, by either clock.

    python -m scripts.benchmarks.verdict [--runs 10000] [--clock wall] [--processes N] [--markdown]

Each run is a machine that times base, base again and merged in sets of sessions: heavy-tailed noise and spikes of each
run, of which CPU time sees a part, and a bias of each session, also heavy-tailed, with jumps. (Moods that all arms of a
round share cancel in its ratios, and are left out.) Opening the sessions of a set takes as long as 20 rounds, and the
budget is that of 48 sets of 20 rounds. The harness's own rounds, looks, intervals, clocks and controls judge it. The
verdict must be wrong in at most 5 % of runs where merged is slower by exactly the margin, in none where it is by three
margins, and be there, within the budget, in at least 80 % where it is as fast.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import get_args

import numpy as np

from engines.commands.terminal import print_table
from engines.latency.clocks import Clock, ClockChoice, deciding
from engines.latency.equivalence import Ratio, signed_rank
from engines.latency.report import Verdict
from engines.latency.rounds import Costs, Summary, best_rounds, summary
from engines.latency.sequential import until_decided
from engines.latency.verdict import AGAIN, MERGED, judge, kept
from lora.files.tensorfile import Array

MARGIN = 0.01
ARMS = tuple(enumerate((AGAIN, MERGED)))
UNIT = 3**-0.5  # one over the standard deviation of Student's t with 3 degrees of freedom
COSTS = Costs(opening=20.0, round=1.0)
BUDGET = 48 * (COSTS.opening + 20 * COSTS.round)
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

    ``cpu`` is the share of the runs' deviation that CPU time sees. ``spikes`` and ``jumps`` are the share of runs that
    take long and of sessions that are 4 % off.
    """

    name: str
    session: float
    run: float
    cpu: float
    spikes: float = 0.03
    jumps: float = 0.02


MACHINES = (
    Machine("quiet", session=0.003, run=0.01, cpu=0.9),
    Machine("shared", session=0.006, run=0.02, cpu=0.7, jumps=0.05),
    Machine("busy", session=0.002, run=0.08, cpu=0.6, spikes=0.1),
    Machine("rough", session=0.015, run=0.05, cpu=0.8, jumps=0.1),
)
DECIDES = ("quiet", "shared")  # by either clock


@dataclass(frozen=True)
class Found:
    """A verdict, the clock that it was reached by, and after how many sets and what share of the budget."""

    verdict: Verdict
    clock: Clock
    sets: int
    share: float

    @property
    def is_decided(self) -> bool:
        return self.verdict != "undecided"


Set = Mapping[Clock, Summary]  # what each clock tells of a set: base again and merged beside the base


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000, help="Runs of each machine and truth. Default: 10000.")
    parser.add_argument("--clock", choices=get_args(ClockChoice), default="wall", help="Default: wall.")
    names = [machine.name for machine in MACHINES]
    parser.add_argument("--machine", action="append", choices=names, help="Repeatable. Default: all.")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="Default: one a core.")
    parser.add_argument("--markdown", action="store_true", help="Print the table as Markdown.")
    arguments = parser.parse_args()
    columns = ("machine", "merged is", "equivalent", "slower", "undecided", "by CPU time", "sets", "of the budget")
    if arguments.markdown:  # a line as soon as it is there: all of them take long
        print(markdown(columns), markdown(("---",) * len(columns)), sep="\n", flush=True)
    rows, right = [], True
    with ProcessPoolExecutor(arguments.processes) as pool:
        for machine in (one for one in MACHINES if one.name in (arguments.machine or names)):
            for truth, ratio in RATIOS.items():
                one = partial(one_run, machine, ratio, arguments.clock)
                found = list(pool.map(one, range(arguments.runs), chunksize=100))
                right = right and is_right(machine, truth, shares_of(found))
                rows.append(row(machine, truth, found))
                if arguments.markdown:
                    print(markdown(rows[-1]), flush=True)
    title = f"{arguments.runs} runs each, margin {MARGIN:.0%}, --clock {arguments.clock}"
    if not arguments.markdown:
        print_table(title, columns, rows)
    print("the harness is right" if right else "THE HARNESS IS WRONG")
    return 0 if right else 1


def markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def row(machine: Machine, truth: str, found: Sequence[Found]) -> tuple[str, ...]:
    shares = shares_of(found)
    return (
        machine.name,
        truth,
        *(f"{shares[verdict]:.2%}" for verdict in ("equivalent", "slower", "undecided")),
        f"{np.mean([one.clock == 'cpu' for one in found]):.0%}",
        f"{np.mean([one.sets for one in found]):.1f}",
        f"{np.mean([one.share for one in found]):.0%}",
    )


def shares_of(found: Sequence[Found]) -> dict[str, float]:
    """How often each verdict was given."""
    counts = Counter(one.verdict for one in found)
    return {verdict: counts[verdict] / len(found) for verdict in ("equivalent", "slower", "undecided")}


def is_right(machine: Machine, truth: str, shares: dict[str, float]) -> bool:
    """What was promised of every machine; of some also that it decides."""
    match truth:
        case "as fast":
            return shares["slower"] <= 0.05 and (machine.name not in DECIDES or shares["equivalent"] >= 0.80)
        case "slower by 3 margins":
            return shares["equivalent"] == 0
    return shares["equivalent"] <= 0.05 and shares["slower"] <= 0.05


def one_run(machine: Machine, ratio: float, choice: ClockChoice, seed: int) -> Found:
    """One run of the harness on a machine where merged takes ``ratio`` as long as the base."""
    random = np.random.default_rng((seed, round(ratio * 1e4)))
    clock: Clock = "cpu" if choice == "cpu" else "wall"
    logs = simulated(machine, ratio, get_args(Clock) if choice == "auto" else (clock,), random)
    off = sessions(machine, random)
    ratios: dict[Clock, dict[str, Ratio]] = {of: {} for of in logs}
    sets: list[Set] = []
    rounds, spent = 0, 0.0

    def take(number: int) -> Set:
        nonlocal rounds, spent
        more = best_rounds([one[clock] for one in sets], COSTS, BUDGET)
        sets.append({of: summary(times[rounds : rounds + more] + off[number]) for of, times in logs.items()})
        rounds, spent = rounds + more, spent + COSTS.opening + more * COSTS.round
        return sets[-1]

    def judged(sets: Sequence[Set], error: float, share: float) -> Found:
        nonlocal clock
        now: dict[Clock, dict[str, Ratio]] = {
            of: {arm: signed_rank(np.array([one[of].medians[index] for one in sets]), error) for index, arm in ARMS}
            for of in ratios
        }
        clock = deciding(choice, now, MARGIN, share)
        for of, arms in now.items():
            ratios[of] = {arm: kept(arm, ratios[of].get(arm), found, MARGIN) for arm, found in arms.items()}
        decisions = {arm: found.decide(MARGIN) for arm, found in ratios[clock].items()}
        return Found(judge(decisions, MARGIN, clock)[0], clock, len(sets), min(1.0, spent / BUDGET))

    return until_decided(take, judged, lambda sets: spent / BUDGET)


def simulated(
    machine: Machine, ratio: float, clocks: Sequence[Clock], random: np.random.Generator
) -> dict[Clock, Array]:
    """By each clock, the log-ratios to the base of base again and merged in all rounds that a budget has time for."""
    shape = (int(BUDGET / COSTS.round), 3)
    spikes = (random.random(shape) < machine.spikes) * random.exponential(0.3, shape)
    cpu = random.standard_t(3, shape) * UNIT * machine.run * machine.cpu + spikes * machine.cpu**2
    wall = cpu + spikes * (1 - machine.cpu**2)
    if "wall" in clocks:
        wall += random.standard_t(3, shape) * UNIT * machine.run * (1 - machine.cpu**2) ** 0.5
    logs: dict[Clock, Array] = {"wall": wall, "cpu": cpu}
    return {clock: logs[clock][:, 1:] - logs[clock][:, :1] + [0.0, np.log(ratio)] for clock in clocks}


def sessions(machine: Machine, random: np.random.Generator) -> Array:
    """What the sessions of each set are off by, beside the base's: of base again and merged."""
    shape = (int(BUDGET / COSTS.opening), 3)
    jumps = (random.random(shape) < machine.jumps) * random.choice([-0.04, 0.04], shape)
    off = random.standard_t(3, shape) * UNIT * machine.session + jumps
    beside: Array = off[:, 1:] - off[:, :1]
    return beside


if __name__ == "__main__":
    raise SystemExit(main())

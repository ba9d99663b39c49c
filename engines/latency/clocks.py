"""The two clocks: what passes on the wall, and what the calling thread spends on a processor.

Beside other work the wall clock also counts the time in which the thread waits for a processor, which is noise and
falls on all arms alike. The thread's own CPU time leaves it out, and so decides where the wall clock cannot. It holds
only where the engine runs on the thread that calls it, and it says nothing of waiting: so it is a second clock, named
wherever it speaks, and not a better one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Literal

from engines.latency.equivalence import Ratio
from lora.errors import EngineError

Clock = Literal["wall", "cpu"]
ClockChoice = Literal["wall", "cpu", "auto"]

NAMES: dict[Clock, str] = {"wall": "the wall clock", "cpu": "CPU time"}
FINE = 1e-6  # s: a clock that ticks more slowly can't time a run of a small model
# Of the margin, what half of an interval may be, for a ratio of one to be decided nearly always.
WILL_DO = 0.4
CLEARLY_LESS = 0.8  # of the other clock's interval


def check_clock(choice: ClockChoice, on_thread: bool) -> None:
    """Raises EngineError where CPU time is asked for and is not that of the engine, or is not there."""
    if choice != "cpu":
        return
    if not on_thread:
        raise EngineError(
            "--clock cpu: the engine does not run on the calling thread alone, whose CPU time this is; choose"
            " --backend onnxruntime with --threads 1, or --clock wall"
        )
    if not has_cpu_time():
        raise EngineError("--clock cpu: this system's clock of a thread's CPU time is too coarse; choose --clock wall")


def has_cpu_time() -> bool:
    """Whether this system tells a thread's CPU time finely enough."""
    return hasattr(time, "thread_time_ns") and time.get_clock_info("thread_time").resolution <= FINE


def deciding(choice: ClockChoice, ratios: Mapping[Clock, Mapping[str, Ratio]], margin: float, share: float) -> Clock:
    """The clock that the verdict is reached by, from each one's intervals (of one error) after a share of the budget.

    ``auto`` stays with the wall clock where that will decide by the end, and where CPU time is hardly steadier. Only
    the intervals' widths are looked at, never where they lie: choosing between two answers would be wrong more often.
    """
    if choice != "auto":
        return choice
    if "cpu" not in ratios:
        return "wall"
    wall, cpu = (max(half_width(ratio) for ratio in ratios[clock].values()) for clock in ("wall", "cpu"))
    will_do = wall * math.sqrt(share) <= WILL_DO * math.log1p(margin)
    return "wall" if will_do or cpu >= CLEARLY_LESS * wall else "cpu"


def half_width(ratio: Ratio) -> float:
    """Half of an interval, on the logarithm's scale."""
    return math.log(ratio.high / ratio.low) / 2

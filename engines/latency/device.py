"""What a run takes on the device, by its own clock: the host's time has the waiting and all the copies in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Protocol, cast

from engines.latency.harness import WARMUP, Arm
from engines.latency.report import DeviceTimes
from lora.files.tensorfile import Array

RUNS = 50


class Staged(Protocol):
    """A session that tells its stages apart."""

    def stages(self, inputs: Mapping[str, Array]) -> tuple[float, float, float]:
        """Of one run, in ms: the copies to the device, the engine, the copies back."""
        ...


def device_times(arms: Sequence[Arm], inputs: Mapping[str, Array]) -> tuple[DeviceTimes, ...]:
    """Of each arm, medians of ``RUNS`` runs by CUDA's events, after a warm-up, and without CUDA graphs.

    The arms' sessions are Staged.
    """
    return tuple(_times(arm, inputs) for arm in arms)


def _times(arm: Arm, inputs: Mapping[str, Array]) -> DeviceTimes:
    with arm.open() as session:
        staged = cast("Staged", session)
        runs = [staged.stages(inputs) for _ in range(WARMUP + RUNS)][WARMUP:]
    there, engine, back = (median(times) for times in zip(*runs, strict=True))
    return DeviceTimes(arm.name, there, engine, back)

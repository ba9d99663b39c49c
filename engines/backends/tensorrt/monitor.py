"""The builder's progress: phases within phases, each with a number of steps, as one share of the whole.

API: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/ProgressMonitor.html
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora.progress import Progress


@dataclass
class Phase:
    """A phase that runs: the one it lies in, its steps, and how many are done."""

    parent: str | None
    steps: int
    done: int = 0


class Phases:
    """The phases that run now. A nested phase counts as the share of its parent's current step."""

    def __init__(self) -> None:
        self._running: dict[str, Phase] = {}

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        self._running[name] = Phase(parent, steps)

    def step(self, name: str, done: int) -> None:
        """Steps are counted from 0: the one called ``done`` is."""
        self._running[name].done = done + 1

    def outermost(self, name: str) -> bool:
        """Whether the phase lies in no other that runs."""
        return self._running[name].parent not in self._running

    def finish(self, name: str) -> None:
        """A phase ends, which may be before its last step."""
        self._running.pop(name, None)

    def share(self, name: str) -> tuple[str, float]:
        """The outermost phase around ``name``, and the share of it that is done."""
        phase, inner = self._running[name], 0.0
        while True:
            inner = min(1.0, (phase.done + inner) / max(1, phase.steps))
            if phase.parent is None or phase.parent not in self._running:
                return name, inner
            name, phase = phase.parent, self._running[phase.parent]


def monitor_of(trt: Any, progress: Progress) -> Any:
    """A progress monitor for ``trt``.

    ``interrupted`` says that the build was stopped by Ctrl-C, which may not leave a callback.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # as in log_of
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._phases = Phases()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._phases.step(phase_name, step)
            self._told(*self._phases.share(phase_name))
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            if self._phases.outermost(phase_name):
                self._told(phase_name, 1.0)
            self._phases.finish(phase_name)

        def _told(self, name: str, share: float) -> None:
            try:
                progress(name, share)
            except KeyboardInterrupt:
                self.interrupted = True

    return Monitor()

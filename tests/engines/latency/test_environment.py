"""The machine as a report describes it: this one, and GPUs as a stand-in for NVIDIA's library tells of them."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from types import SimpleNamespace

import onnxruntime
import pytest

from engines.latency.environment import machine, state


class NVMLError(Exception):
    pass


class Nvml:
    """A driver with two cards, which this machine lacks; a call named in ``failing`` raises. Calls are written down."""

    def __init__(self, *failing: str) -> None:
        self.failing = failing
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> object:
        answers = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda index: SimpleNamespace(index=index),
            "nvmlDeviceGetName": lambda device: f"Card {'AB'[device.index]}",
            "nvmlDeviceGetClockInfo": lambda device, kind: {0: 1410, 2: 1593}[kind] + device.index,
            "nvmlDeviceGetTemperature": lambda device, sensor: {0: 40}[sensor] + device.index,
            "nvmlDeviceGetPowerUsage": lambda device: 61_700 + 1000 * device.index,
        }

        def call(*arguments: int) -> object:
            self.calls.append(name)
            if name in self.failing:
                raise NVMLError(name)
            return answers[name](*arguments)

        return call


def with_driver(monkeypatch: pytest.MonkeyPatch, *failing: str) -> Nvml:
    nvml = Nvml(*failing)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def gpus(found: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in found.items() if name.startswith("GPU")}


def test_this_machine_is_described():
    found = machine(threads=3)
    assert (found["onnxruntime"], found["lorafuse"]) == (onnxruntime.__version__, version("lorafuse"))
    assert found["python"] == sys.version.split()[0]
    assert found["cores"] == f"{os.cpu_count()}, of which {len(os.sched_getaffinity(0))} may be used"
    assert found["threads"].startswith("3,")
    assert all(isinstance(value, str) and value for value in found.values())


def test_cores_that_this_process_may_use_are_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5})
    assert machine(1)["cores"].endswith(", of which 1 may be used")


def test_state_of_this_machine_holds_its_load(monkeypatch: pytest.MonkeyPatch):
    assert float(state()["load average"]) >= 0
    monkeypatch.setattr(os, "getloadavg", lambda: (1.2345, 0, 0))
    assert state()["load average"] == "1.23"


def test_a_system_that_tells_less_is_described_with_less(monkeypatch: pytest.MonkeyPatch):
    """macOS has no sched_getaffinity, Windows no getloadavg either, and neither has /proc."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "getloadavg")
    monkeypatch.setattr("engines.latency.environment._lines", lambda path: [])
    assert machine(1)["cores"] == f"{os.cpu_count()}, of which {os.cpu_count()} may be used"
    assert gpus(state()) == state()


def test_without_nvidias_package_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed
    assert gpus(machine(1)) == gpus(state()) == {}


def test_gpus_are_shown_by_name_and_state(monkeypatch: pytest.MonkeyPatch):
    nvml = with_driver(monkeypatch)
    assert gpus(machine(1)) == {"GPU 0": "Card A", "GPU 1": "Card B"}
    assert gpus(state()) == {
        "GPU 0": "graphics clock 1410 MHz, memory clock 1593 MHz, temperature 40 °C, power 62 W",
        "GPU 1": "graphics clock 1411 MHz, memory clock 1594 MHz, temperature 41 °C, power 63 W",
    }
    assert nvml.calls.count("nvmlInit") == nvml.calls.count("nvmlShutdown") == 2


def test_a_driver_that_does_not_answer_is_no_gpu(monkeypatch: pytest.MonkeyPatch):
    nvml = with_driver(monkeypatch, "nvmlInit")
    assert gpus(machine(1)) == gpus(state()) == {}
    assert set(nvml.calls) == {"nvmlInit"}


def test_a_reading_that_a_card_does_not_have_is_unknown_and_ends_no_run(monkeypatch: pytest.MonkeyPatch):
    nvml = with_driver(monkeypatch, "nvmlDeviceGetPowerUsage", "nvmlDeviceGetName")
    assert gpus(machine(1)) == {"GPU 0": "unknown", "GPU 1": "unknown"}
    assert gpus(state())["GPU 0"] == "graphics clock 1410 MHz, memory clock 1593 MHz, temperature 40 °C, power unknown"
    assert nvml.calls[-1] == "nvmlShutdown"


@pytest.mark.parametrize(
    "failing",
    ["nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetClockInfo", "nvmlDeviceGetTemperature"],
)
def test_the_library_is_shut_down_whatever_raises(monkeypatch: pytest.MonkeyPatch, failing: str):
    nvml = with_driver(monkeypatch, failing)
    state()
    assert failing in nvml.calls
    assert nvml.calls[-1] == "nvmlShutdown"

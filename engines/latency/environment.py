"""The machine that times were taken on: what it is, and its state before and after."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Without the package or without a driver there is nothing to say of a GPU: https://docs.nvidia.com/deploy/nvml-api/
CLOCKS = {"graphics": 0, "memory": 2}  # NVML_CLOCK_GRAPHICS, NVML_CLOCK_MEM
TEMPERATURE_OF_GPU = 0  # NVML_TEMPERATURE_GPU


def machine(threads: int) -> dict[str, str]:
    """What stays: processor, cores (and those that this process may use), system, versions, how the engines' threads
    work.
    """
    described = {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cores": f"{os.cpu_count()}, of which {_usable()} may be used",
        "threads": f"{threads}, which do not spin",
        "system": platform.platform(),
        "python": platform.python_version(),
        "onnxruntime": next(_installed("onnxruntime", "onnxruntime-gpu"), "none"),
        "lorafuse": version("lorafuse"),
    }
    return described | {f"GPU {index}": gpu["name"] for index, gpu in enumerate(_gpus())}


def state() -> dict[str, str]:
    """What changes: load average over a minute, the cores' clocks, and of each GPU clocks, temperature and power."""
    found = {"load average": f"{os.getloadavg()[0]:.2f}"} if hasattr(os, "getloadavg") else {}
    clocks = [float(line.split(":")[1]) for line in _lines("/proc/cpuinfo") if line.startswith("cpu MHz")]
    if clocks:
        found["cores' clocks"] = f"{min(clocks):.0f} to {max(clocks):.0f} MHz"
    return found | {f"GPU {index}": gpu["state"] for index, gpu in enumerate(_gpus())}


def _gpus() -> list[dict[str, str]]:
    """Name and state of every GPU that NVML sees."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, or one that is too old: there is no GPU to speak of
        return []
    try:
        return [_gpu(pynvml, index) for index in range(_asked(pynvml.nvmlDeviceGetCount) or 0)]
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> dict[str, str]:
    device = _asked(nvml.nvmlDeviceGetHandleByIndex, index)
    clocks = {
        f"{name} clock": (_asked(nvml.nvmlDeviceGetClockInfo, device, code), "MHz") for name, code in CLOCKS.items()
    }
    temperature, power = (
        _asked(nvml.nvmlDeviceGetTemperature, device, TEMPERATURE_OF_GPU),
        _asked(nvml.nvmlDeviceGetPowerUsage, device),
    )
    readings = {
        **clocks,
        "temperature": (temperature, "°C"),
        "power": (None if power is None else round(power / 1000), "W"),
    }
    state = ", ".join(
        f"{name} {'unknown' if value is None else f'{value} {unit}'}" for name, (value, unit) in readings.items()
    )
    return {"name": str(_asked(nvml.nvmlDeviceGetName, device) or "unknown"), "state": state}


def _asked(query: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or None: a card may not measure its power, or be lost, and a run is not to end for that."""
    try:
        return query(*arguments)
    except Exception:  # NVMLError, which is not to be imported without the package
        return None


def _usable() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # Linux alone tells


def _processor() -> str:
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:  # another system than Linux
        return []


def _installed(*names: str) -> Iterator[str]:
    for name in names:
        with suppress(PackageNotFoundError):
            yield version(name)

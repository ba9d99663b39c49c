"""TensorRT 10, TensorRT 11 and TensorRT-RTX: one backend for all.

The API's module is passed as a value, so that one process may hold several.

    log       what the library says, kept for the exception
    network   ONNX model → network, profiles and builder's configuration → plan
    monitor   the builder's progress
    cuda      the device: is there one, its memory, streams and graphs
    session   plan → engine that runs
    refit     other weights into a loaded engine
    layers    what a built engine consists of

Most of the API's failures do not raise: they return None, False or -1 and write a log line. Here every such answer
becomes an EngineError that carries the lines. Features are asked for by name, never by version: RTX counts from 1.
API: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/index.html
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Literal

from engines.backends import BuildOptions, Model, Plan, Session
from engines.backends.tensorrt.network import build_plan, builds_for_this_device
from engines.backends.tensorrt.target import runs_on
from lora.errors import EngineError
from lora.progress import Progress

Flavour = Literal["tensorrt", "tensorrt-rtx"]


def api(flavour: Flavour) -> Any:
    """The flavour's module. Raises EngineError when its package is not installed."""
    try:
        module = importlib.import_module(flavour.replace("-", "_"))
        if module.__file__ is None:
            raise ImportError(f"{', '.join(module.__path__)} is a folder of that name")
        return module
    except ImportError as error:
        raise EngineError(f"backend '{flavour}' is not installed ({error}); install lorafuse[{flavour}]") from error


class TensorRT:
    """Builds plans; a plan runs where there is a device for it."""

    def __init__(self, trt: Any) -> None:
        self._trt = trt

    @property
    def has_plans(self) -> bool:
        """An engine is a plan."""
        return True

    def version(self) -> str:
        """The flavour's version; RTX counts from 1."""
        return str(self._trt.__version__)

    def timing_cache_key(self) -> str | None:
        """Flavour, version and device, which timings hold for; None for RTX, which takes none. Raises NoDeviceError."""
        if not builds_for_this_device(self._trt):
            return None
        from engines.backends.tensorrt.cuda import device

        return f"{self._trt.__name__} {self.version()}, {device()}"

    def build(self, model: Model, options: BuildOptions, progress: Progress) -> Plan:
        """Build the plan, with weights to be exchanged where ``options.mode`` says so."""
        if model.values:
            raise EngineError(
                f"{model.folder}: a builder takes weights from the model's files alone; write the {len(model.values)}"
                " other values there first"
            )
        return build_plan(self._trt, model, options, progress)

    def runs(self, target: str) -> str | None:
        """Why a plan for ``target`` does not run on this device; None where it does. Raises NoDeviceError."""
        from engines.backends.tensorrt.cuda import device

        found = device()
        return (
            None
            if runs_on(target, (found.major, found.minor))
            else f"it was built for {target}, and this is an {found}"
        )

    def load(self, model: Model, plan: Path | None) -> Session:
        """Load the plan, and refit it where ``model`` has values for its weights. A device is asked for first."""
        from engines.backends.tensorrt.session import open_session

        assert plan is not None
        return open_session(self._trt, plan, model.values)

"""TensorRT and TensorRT-RTX: one module for both, with the API's module passed as a value so that a process may hold both.

Most of the API's failures do not raise: they return None, False or -1 and write a log line. Here every such answer
becomes an EngineError that carries the lines. Precision is the ONNX model's own: networks are strongly typed.
API: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/index.html
"""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path
from typing import Any, Literal

from engines.backends import AxisRange, BuildOptions, Model, NoDeviceError, Plan, Progress, Session
from lora.collector import uncollected
from lora.errors import EngineError

Flavour = Literal["tensorrt", "tensorrt-rtx"]
PORTABLE = "portable"


def api(flavour: Flavour) -> Any:
    """The flavour's module. Raises EngineError when its package is not installed."""
    try:
        return importlib.import_module(flavour.replace("-", "_"))
    except ImportError as error:
        raise EngineError(f"backend '{flavour}' is not installed ({error}); install lorafuse[{flavour}]") from error


class TensorRT:
    """Builds plans; a plan runs where there is a device for it."""

    def __init__(self, trt: Any) -> None:
        self._trt = trt

    def version(self) -> str:
        """The flavour's version; RTX counts from 1."""
        return str(self._trt.__version__)

    def build(self, model: Model, options: BuildOptions, progress: Progress) -> Plan:
        """Build the plan with one optimization profile over the model's dynamic axes."""
        if model.values:
            raise EngineError(f"{model.folder}: the task is stored as factors, but an engine holds dense weights; export the task with --store dense")
        # TensorRT logs while it holds a lock. Were the collector to run in that moment, it might destroy a former build's objects, which wait for the lock.
        with uncollected():
            return self._build(model, options, progress)

    def load(self, model: Model, plan: Path | None) -> Session:
        """Ask for a device first, so that a machine without one gets its own answer."""
        require_cuda_device()
        raise EngineError(f"{plan}: running TensorRT engines from here is not supported yet; the plan can be run with TensorRT's own tools")

    def _build(self, model: Model, options: BuildOptions, progress: Progress) -> Plan:
        log = _log(self._trt)
        builder = self._trt.Builder(log)
        flags = 1 << int(self._trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(flags)
        progress("parsing the model")
        self._parse(network, model, log)
        config = builder.create_builder_config()
        target = self._set_target(config, options.compute_capability)
        self._add_profile(builder, network, config, options, log)
        progress("building the engine")
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise log.error("the builder returned no engine")
        return Plan(bytes(plan), target)

    def _parse(self, network: Any, model: Model, log: Any) -> None:
        parser = self._trt.OnnxParser(network, log)
        # The path only says where external data lie. A parse of garbage can "succeed" with an empty network.
        parsed = parser.parse(model.graph, str(model.folder / "model.onnx"))
        problems = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        if not parsed or problems or network.num_outputs == 0:
            raise log.error("the parser refused the model", *problems)

    def _set_target(self, config: Any, capability: str | None) -> str:
        """Choose what the engine is built for; full TensorRT builds for the device it runs on and has no such choice."""
        if not hasattr(config, "num_compute_capabilities"):
            if capability is not None:
                raise EngineError("this TensorRT builds for the GPU it runs on; --compute-capability is for tensorrt-rtx")
            return "this device"
        if capability is None:
            return PORTABLE
        known = {_dotted(name): value for name, value in self._trt.ComputeCapability.__members__.items() if name.startswith("SM")}
        if capability not in known:
            raise EngineError(
                f"compute capability '{capability}' is not one that {self._trt.__name__} {self.version()} builds for; expected one of {', '.join(known)}"
            )
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(known[capability], 0):
            raise EngineError(f"{self._trt.__name__} {self.version()} refused compute capability '{capability}'")
        return capability

    def _add_profile(self, builder: Any, network: Any, config: Any, options: BuildOptions, log: Any) -> None:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            names = [tensor.get_dimension_name(axis) if size == -1 else None for axis, size in enumerate(tensor.shape)]
            sizes = [_range(options, name) if name else AxisRange(size, size, size) for name, size in zip(names, tensor.shape, strict=True)]
            profile.set_shape(tensor.name, *(tuple(getattr(size, field) for size in sizes) for field in ("smallest", "typical", "largest")))
        # An impossible range is taken without complaint; the profile is then false, or adding it gives -1.
        if not profile or config.add_optimization_profile(profile) < 0:
            raise log.error(f"the optimization profile is not valid (axes: {dict(options.axes)})")


def require_cuda_device() -> None:
    """Raises NoDeviceError unless CUDA finds a device; to be asked before a Runtime is made, which may crash without one."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NoDeviceError("no NVIDIA driver on this machine (libcuda.so.1 is missing)") from error
    count = ctypes.c_int(0)
    status = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if status != 0 or count.value == 0:
        raise NoDeviceError(f"no CUDA device on this machine (CUDA error {status}, {count.value} devices)")


def _range(options: BuildOptions, axis: str) -> AxisRange:
    if axis not in options.axes:
        raise EngineError(f"dynamic axis '{axis}' has no range; give one for each of the model's dynamic axes")
    return options.axes[axis]


def _dotted(member: str) -> str:
    """From "SM89" to "8.9", from "SM120" to "12.0"."""
    digits = member.removeprefix("SM")
    return f"{digits[:-1]}.{digits[-1]}"


def _log(trt: Any) -> Any:
    """A logger that keeps what the library says, for the exception."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the base class is chosen at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                self.lines.append(message)

        def error(self, what: str, *more: str) -> EngineError:
            said = "; ".join(line.strip().replace("\n", " ") for line in (*more, *self.lines)) or "it gave no reason"
            return EngineError(f"{trt.__name__} {trt.__version__}: {what}: {said}")

    return Log()

"""From an ONNX model to a plan.

Precision is the ONNX model's own: networks are strongly typed. The same model and options give the same bytes on RTX;
full TensorRT times its tactics, and chooses the same ones again where it is given the timing cache of the former build.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engines.backends import Axes, AxisRange, BuildOptions, Model, Plan
from engines.backends.tensorrt.log import log_of
from engines.backends.tensorrt.monitor import monitor_of
from engines.backends.tensorrt.target import AMPERE_PLUS, PORTABLE, dotted
from lora.collector import uncollected
from lora.errors import EngineError
from lora.progress import Progress

if TYPE_CHECKING:
    import tensorrt


def build_plan(trt: Any, model: Model, options: BuildOptions, progress: Progress) -> Plan:
    """Build ``model``.

    Raises EngineError with the library's words, NoDeviceError where the flavour builds on its device only.
    """
    if (
        builds_for_this_device(trt) or options.mode != "rebuild"
    ):  # RTX compiles kernels for such a plan on the device, and without one fails beside its log
        from engines.backends.tensorrt.cuda import require_device

        require_device()
    # TensorRT logs while it holds a lock. Were the collector to run in that moment, it might destroy a former build's
    # objects, which wait for the lock.
    with uncollected():
        return _build(trt, model, options, progress)


def builds_for_this_device(trt: Any) -> bool:
    """Whether plans are for the device at hand (full TensorRT), or for any that is named (RTX)."""
    return not hasattr(trt.IBuilderConfig, "num_compute_capabilities")


def _build(trt: Any, model: Model, options: BuildOptions, progress: Progress) -> Plan:
    log, monitor = log_of(trt), monitor_of(trt, progress)
    log.begin()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    progress("parsing the model")
    parse(trt, network, model, log)
    config = builder.create_builder_config()
    config.progress_monitor = monitor
    config.profiling_verbosity = (
        trt.ProfilingVerbosity.DETAILED
    )  # what an inspector can tell; costs no time at run time
    target = _set_target(trt, config, options)
    _set_limits(trt, config, options)
    _set_mode(trt, network, config, options)
    for axes in options.profiles:
        _add_profile(builder, network, config, axes, log)
    cache = _timing_cache(trt, config, options.timing_cache, progress)
    progress("building the engine")
    content = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if content is None:
        raise log.error("the builder returned no engine")
    return Plan(bytes(content), target, timing_cache=bytes(cache.serialize()) if cache else None)


def parse(trt: Any, network: tensorrt.INetworkDefinition, model: Model, log: Any) -> None:
    """Fill ``network`` with the model. Its path only says where external data lie."""
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse(model.graph, str(model.folder / "model.onnx"))
    problems = [parser.get_error(index).desc() for index in range(parser.num_errors)]
    if not parsed or problems or network.num_outputs == 0:  # a parse of garbage can "succeed" with an empty network
        raise log.error("the parser refused the model", *problems)


def _set_target(trt: Any, config: tensorrt.IBuilderConfig, options: BuildOptions) -> str:
    """Choose the target: full TensorRT's is the device at hand or its kin, RTX's the capabilities named, or any."""
    if builds_for_this_device(trt):
        return _set_compatibility(trt, config, options)
    if options.compatible:
        raise EngineError(
            f"{trt.__name__} has no hardware compatibility level; without --compute-capability its plans run on any GPU"
            " from Ampere on"
        )
    known = {dotted(name): value for name, value in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    for capability in options.compute_capabilities:
        if capability not in known:
            raise EngineError(
                f"compute capability '{capability}' is not one that {trt.__name__} {trt.__version__} builds for;"
                f" expected one of {', '.join(known)}"
            )
    if options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
    for index, capability in enumerate(options.compute_capabilities):
        if not config.set_compute_capability(known[capability], index):
            raise EngineError(f"{trt.__name__} {trt.__version__} refused compute capability '{capability}'")
    return ", ".join(options.compute_capabilities) or PORTABLE


def _set_compatibility(trt: Any, config: tensorrt.IBuilderConfig, options: BuildOptions) -> str:
    if options.compute_capabilities:
        raise EngineError("this TensorRT builds for the GPU it runs on; --compute-capability is for tensorrt-rtx")
    if options.compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        return AMPERE_PLUS
    from engines.backends.tensorrt.cuda import device

    return device().capability


def _set_limits(trt: Any, config: tensorrt.IBuilderConfig, options: BuildOptions) -> None:
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level


def _set_mode(
    trt: Any, network: tensorrt.INetworkDefinition, config: tensorrt.IBuilderConfig, options: BuildOptions
) -> None:
    """Let weights be exchanged: those named where the flavour can choose, else all.

    A stripped plan leaves all of them out.
    """
    flags = trt.BuilderFlag.__members__
    match options.mode:
        case "rebuild":
            return
        case "stripped":
            config.set_flag(flags["STRIP_PLAN"])
            config.set_flag(flags["REFIT"])
        case "refit" if "REFIT_INDIVIDUAL" in flags:
            config.set_flag(flags["REFIT_INDIVIDUAL"])
            for name in options.refittable:
                if not network.mark_weights_refittable(name):
                    raise EngineError(
                        f"{trt.__name__} {trt.__version__} can't make weight '{name}' refittable; choose --mode rebuild"
                    )
        case "refit":
            config.set_flag(flags["REFIT"])


def _add_profile(
    builder: tensorrt.Builder,
    network: tensorrt.INetworkDefinition,
    config: tensorrt.IBuilderConfig,
    axes: Axes,
    log: Any,
) -> None:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        names = [tensor.get_dimension_name(axis) if size == -1 else None for axis, size in enumerate(tensor.shape)]
        sizes = [
            _range(axes, name) if name else AxisRange(size, size, size)
            for name, size in zip(names, tensor.shape, strict=True)
        ]
        smallest, typical, largest = (
            tuple(getattr(size, field) for size in sizes) for field in ("smallest", "typical", "largest")
        )
        profile.set_shape(tensor.name, smallest, typical, largest)
    # An impossible range is taken without complaint; the profile is then false, or adding it gives -1.
    if not profile or config.add_optimization_profile(profile) < 0:
        shown = ", ".join(f"{name} {size.smallest}..{size.typical}..{size.largest}" for name, size in axes.items())
        raise log.error(f"the optimization profile is not valid ({shown})")


def _range(axes: Axes, axis: str) -> AxisRange:
    if axis not in axes:
        raise EngineError(f"dynamic axis '{axis}' has no range; give one for each of the model's dynamic axes")
    return axes[axis]


def _timing_cache(
    trt: Any, config: tensorrt.IBuilderConfig, content: bytes | None, progress: Progress
) -> tensorrt.ITimingCache | None:
    """Start from the timings of former builds. RTX times nothing: its cache operations do nothing, and none is made."""
    if not builds_for_this_device(trt):
        return None
    cache = config.create_timing_cache(content or b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        progress("the bundle's timing cache was refused; timing anew")
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache

"""TensorRT-RTX: real plans of the real movies task, built without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from engines.backends import AxisRange, Backend, BuildOptions, Model, NoDeviceError, Plan, backend
from engines.serving.load import task_model
from exporter.bundle.manifest import Bundle
from exporter.bundle.records import MODEL
from exporter.bundle.task_part import task_part
from exporter.proof.reference import base_values, merged_values
from exporter.variants.graphs import unadapted_graph
from lora.errors import EngineError
from lora.files.tensorfile import Array
from lora.progress import unheard

pytest.importorskip("tensorrt_rtx")

AXES = {"batch": AxisRange(1, 1, 8), "sequence": AxisRange(1, 128, 256)}
SHAPES = {"--trt-min-shapes": "1,1", "--trt-opt-shapes": "1,128", "--trt-max-shapes": "8,256"}
TINY = BuildOptions(("8.9",), ({"batch": AxisRange(1, 1, 8), "sequence": AxisRange(1, 16, 64)},))
CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
ADAPTED = [
    f"bert.encoder.layer.{layer}.attention.self.{target}.weight" for layer in range(6) for target in ("query", "value")
]


@pytest.fixture(scope="session")
def rtx() -> Backend:
    return backend("tensorrt-rtx")


@pytest.fixture(scope="session")
def tiny_model(tiny_bundle: Bundle) -> Model:
    return task_model(task_part(tiny_bundle, "first"))


@pytest.fixture(scope="session")
def movies(real_bundle: Bundle) -> Model:
    return task_model(task_part(real_bundle, "movies"))


@pytest.fixture(scope="session")
def build(rtx: Backend) -> Callable[..., Plan]:
    return lambda model, capability="8.9", axes=AXES: rtx.build(
        model, BuildOptions((capability,) if capability is not None else (), (axes,)), unheard
    )


@pytest.fixture(scope="session")
def movies_plan(movies: Model, build: Callable[..., Plan]) -> Plan:
    return build(movies)


@pytest.fixture(scope="session")
def base_plan(real_bundle: Bundle, build: Callable[..., Plan]) -> Plan:
    """The same graph on the base's weights."""
    return build(Model(unadapted_graph(task_part(real_bundle, "movies")).SerializeToString(), real_bundle.path))


@pytest.mark.parametrize(("capability", "target"), [("12.0", "12.0"), (None, "portable")])
def test_builds_the_real_task_in_float32(
    movies: Model, build: Callable[..., Plan], capability: str | None, target: str
):
    plan = build(movies, capability)
    assert plan.target == target
    assert len(plan.content) > 90_000_000  # 22.7 million weights of four bytes


def test_second_build_gives_the_same_bytes(movies: Model, build: Callable[..., Plan], movies_plan: Plan):
    assert build(movies).content == movies_plan.content
    assert movies_plan.target == "8.9"


@pytest.mark.parametrize("name", ADAPTED)
def test_plan_holds_the_merged_weights_and_none_of_the_bases(
    real_bundle: Bundle, movies_plan: Plan, base_plan: Plan, name: str
):
    part = task_part(real_bundle, "movies")
    merged, base = merged_values(part)[name], base_values(part)[name]
    assert found(merged, movies_plan) == 1
    assert found(base, movies_plan) == 0
    assert (found(merged, base_plan), found(base, base_plan)) == (
        0,
        1,
    )  # the search would find the base's, were they there


def found(matrix: Array, plan: Plan) -> float:
    """The share of a few of the matrix's rows that the plan holds, in whichever axis order it holds more of them.

    This leans on how RTX packs weights, and has no place outside of tests: fp32 weights stand verbatim in the plan, but
    Q, K and V are packed beside each other, so that a matrix is found row by row and not as one piece.
    """
    rows = range(5, len(matrix), 128)
    return max(
        np.mean([np.ascontiguousarray(order[row]).tobytes() in plan.content for row in rows])
        for order in (matrix, matrix.T)
    )


def test_steps_are_reported_in_order(rtx: Backend, tiny_bundle: Bundle):
    steps: list[tuple[str, float | None]] = []

    def heard(step: str, share: float | None = None) -> None:
        steps.append((step, share))

    rtx.build(
        task_model(task_part(tiny_bundle, "first")),
        BuildOptions(("8.9",), (AXES | {"sequence": AxisRange(1, 16, 64)},)),
        heard,
    )
    assert steps[:2] == [("parsing the model", None), ("building the engine", None)]
    shares = [share for _, share in steps[2:]]
    assert len(shares) > 3
    assert all(0 < share <= 1 for share in shares)
    assert shares[-1] == 1


@pytest.mark.parametrize("capability", ["9.0", "8.9.0", "SM89", "89", ""])
def test_unknown_compute_capability_is_refused_with_the_known_ones(
    movies: Model, build: Callable[..., Plan], capability: str
):
    with pytest.raises(EngineError) as error:
        build(movies, capability)
    assert f"compute capability '{capability}' is not one" in str(error.value)
    assert str(error.value).endswith(", ".join(CAPABILITIES))


def test_what_the_builder_says_reaches_the_error(movies: Model, build: Callable[..., Plan]):
    with pytest.raises(
        EngineError, match=r"FP32 GEMM is not supported"
    ) as error:  # of Turing, the one target without them
        build(movies, "7.5")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sequence", [AxisRange(200, 128, 256), AxisRange(1, 300, 256), AxisRange(64, 64, 1)])
def test_impossible_axis_range_is_refused(movies: Model, build: Callable[..., Plan], sequence: AxisRange):
    with pytest.raises(
        EngineError, match=r"optimization profile is not valid \(.*sequence \d+\.\.\d+\.\.\d+\).*MIN<=OPT<=MAX"
    ):
        build(movies, axes={**AXES, "sequence": sequence})


@pytest.mark.parametrize("axis", AXES)
def test_axis_without_a_range_is_refused_by_name(movies: Model, build: Callable[..., Plan], axis: str):
    with pytest.raises(EngineError, match=f"dynamic axis '{axis}' has no range"):
        build(movies, axes={name: sizes for name, sizes in AXES.items() if name != axis})


@pytest.mark.parametrize("graph", [b"", b"xxxx", b"\0" * 100])
def test_garbage_that_the_parser_takes_for_an_empty_network_is_refused(
    tiny_bundle: Bundle, build: Callable[..., Plan], graph: bytes
):
    with pytest.raises(EngineError, match="the parser refused the model"):
        build(Model(graph, tiny_bundle.path))


def test_folder_without_the_weights_is_refused(movies: Model, build: Callable[..., Plan], tmp_path: Path):
    with pytest.raises(EngineError, match=r"the parser refused the model: .*safetensors"):
        build(Model(movies.graph, tmp_path))


@pytest.mark.usefixtures("no_device")
def test_load_asks_for_a_device_before_it_touches_the_plan(rtx: Backend, movies: Model, tmp_path: Path):
    with pytest.raises(NoDeviceError, match="on this machine"):
        rtx.load(movies, tmp_path / "no such plan")


def small(*nodes: onnx.NodeProto, inputs: tuple[str | int, ...] = ("batch", 4)) -> Model:
    """A model of ``nodes`` from x to y."""
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", inputs), ("y", None))
    ]
    graph = helper.make_graph(nodes, "small", values[:1], values[1:])
    return Model(
        helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("acme", 1)]
        ).SerializeToString(),
        Path(),
    )


def test_an_operator_that_tensorrt_lacks_is_named(build: Callable[..., Plan]):
    model = small(helper.make_node("Frobnicate", ["x"], ["y"], domain="acme", name="odd_one"))
    with pytest.raises(
        EngineError, match=r"tensorrt_rtx [\d.]+: the parser refused the model: .*Frobnicate"
    ) as refused:
        build(model)
    assert "\n" not in str(refused.value)


def test_several_capabilities_are_built_into_one_plan(rtx: Backend, tiny_model: Model):
    one, two = (
        rtx.build(tiny_model, replace(TINY, compute_capabilities=capabilities), unheard)
        for capabilities in (("8.9",), ("8.6", "8.9"))
    )
    assert (one.target, two.target) == ("8.9", "8.6, 8.9")


def test_a_decoders_two_profiles_make_one_plan(rtx: Backend, tiny_model: Model):
    narrow = {"batch": AxisRange(1, 1, 1), "sequence": AxisRange(1, 1, 1)}
    assert (
        rtx.build(tiny_model, replace(TINY, profiles=(*TINY.profiles, narrow)), unheard).content
        != rtx.build(tiny_model, TINY, unheard).content
    )


@pytest.mark.usefixtures("no_device")
@pytest.mark.parametrize("mode", ["refit", "stripped"])
def test_weights_that_can_be_exchanged_need_a_device(rtx: Backend, tiny_model: Model, mode: str):
    with pytest.raises(NoDeviceError, match=r"no NVIDIA driver .*CUDA error 35"):
        rtx.build(tiny_model, replace(TINY, mode=mode, refittable=("classifier.weight",)), unheard)


def test_full_tensorrts_compatibility_level_is_refused_by_rtx(rtx: Backend, tiny_model: Model):
    with pytest.raises(
        EngineError,
        match=(
            "has no hardware compatibility level; without --compute-capability its plans run on any GPU from Ampere on"
        ),
    ):
        rtx.build(tiny_model, replace(TINY, compatible=True), unheard)


def test_rtx_takes_no_timing_cache(rtx: Backend, tiny_model: Model):
    assert rtx.timing_cache_key() is None
    assert rtx.build(tiny_model, TINY, unheard).timing_cache is None


def test_limits_are_taken(rtx: Backend, tiny_model: Model):
    assert rtx.build(tiny_model, replace(TINY, workspace=10**8, optimization_level=1), unheard).content is not None


def test_an_interrupt_ends_the_build(rtx: Backend, tiny_model: Model):
    def interrupted(step: str, share: float | None = None) -> None:
        if share is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rtx.build(tiny_model, TINY, interrupted)


def test_polygraphy_builds_a_plan_of_the_same_size_from_the_same_model(
    real_bundle: Bundle, movies_plan: Plan, tmp_path: Path
):
    """An independent road through the same library, with the profile and the target that ours has."""
    model = real_bundle.path / real_bundle.task("movies").parts[MODEL].model.path
    shapes = {
        flag: [f"{name}:[{size}]" for name in ("input_ids", "attention_mask", "token_type_ids")]
        for flag, size in SHAPES.items()
    }
    flags = [
        "--convert-to",
        "trt",
        "--strongly-typed",
        "--compute-capabilities",
        "8.9",
        *(word for flag in shapes for word in (flag, *shapes[flag])),
    ]
    command = [Path(sys.executable).with_name("polygraphy"), "convert", model, "-o", tmp_path / "plan", *flags]
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "plan").stat().st_size == pytest.approx(len(movies_plan.content), rel=1e-3)


def test_weights_beside_the_models_files_are_refused(rtx: Backend, tiny_model: Model):
    """They would be left out in silence."""
    with pytest.raises(
        EngineError, match="takes weights from the model's files alone; write the 1 other values there first"
    ):
        rtx.build(replace(tiny_model, values={"classifier.bias": np.zeros(2, np.float32)}), TINY, unheard)

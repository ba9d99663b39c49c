"""What a backend is: every one of them does this with the same task. A new backend is right when it passes here."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from float32_sums import engines_bound
from reference_backend import Reference

from engines.backends import (
    BACKENDS,
    AxisRange,
    Backend,
    BackendName,
    BuildOptions,
    Model,
    NoDeviceError,
    Session,
    backend,
)
from engines.backends.providers import PLUGIN
from engines.serving.load import load_part, task_model
from exporter.bundle.manifest import Bundle
from exporter.bundle.task_part import task_part
from lora.errors import EngineError
from lora.files.tensorfile import Array
from lora.progress import unheard

REFERENCE = "reference"  # a backend that these tests add
OPTIONS = BuildOptions(profiles=({"batch": AxisRange(1, 1, 8), "sequence": AxisRange(1, 16, 64)},))
GARBAGE = b"garbage " * 50
# What each library says of such bytes; it must reach the user.
SAID = {name: "Failed to parse" if name.startswith("tensorrt") else "protobuf parsing failed" for name in BACKENDS}
SAID[REFERENCE] = "Error parsing message"


@pytest.fixture(params=(*BACKENDS, REFERENCE))
def name(request: pytest.FixtureRequest) -> str:
    """Every backend that is installed; those that the development environment brings must be."""
    if request.param not in ("onnxruntime", "tensorrt-rtx", REFERENCE):
        skip_unless_installed(request.param)
    return request.param


def skip_unless_installed(name: BackendName) -> None:
    if name == "onnxruntime-rtx" and find_spec(PLUGIN) is None:
        pytest.skip(f"{PLUGIN} is not installed")
    try:
        backend(name)
    except EngineError as error:
        pytest.skip(str(error))


@pytest.fixture
def chosen(name: str) -> Backend:
    return Reference() if name == REFERENCE else backend(name)


@pytest.fixture
def tiny_model(tiny_bundle: Bundle) -> Model:
    return task_model(task_part(tiny_bundle, "first"))


@pytest.fixture
def session(name: str, chosen: Backend, tiny_model: Model, tmp_path: Path) -> Session:
    """A loaded engine; only a backend that computes on a device may decline, and only where there is none."""
    plan = chosen.build(tiny_model, OPTIONS, unheard)
    path = tmp_path / "task.plan"
    if plan.content is not None:
        path.write_bytes(plan.content)
    try:
        return chosen.load(tiny_model, path if plan.content is not None else None)
    except NoDeviceError as error:
        if name in ("onnxruntime", REFERENCE) or Path("/dev/nvidiactl").exists() or len(str(error).splitlines()) != 1:
            raise
        pytest.skip(f"{name} builds here and says of running: {error}")


def one_line(error: pytest.ExceptionInfo[EngineError]) -> str:
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


def test_reports_the_version_of_its_library(chosen: Backend):
    assert re.match(r"\d+\.\d+", chosen.version())


def test_builds_a_plan_or_runs_the_model_itself(chosen: Backend, tiny_model: Model):
    steps: list[str] = []
    plan = chosen.build(tiny_model, OPTIONS, lambda step, share=None: steps.append(step))
    assert plan.content is None or len(plan.content) > 1000
    assert plan.target
    assert steps


def test_session_runs_with_inputs_and_outputs_by_name(session: Session, tokens: dict[str, Array]):
    with session as opened:
        outputs = opened.run(tokens)
    assert {name: (values.dtype, values.shape) for name, values in outputs.items()} == {
        "logits": (np.dtype(np.float32), (2, 2))
    }
    assert np.isfinite(outputs["logits"]).all()


def test_batch_gives_what_its_rows_give_one_by_one(session: Session, tokens: dict[str, Array]):
    with session as opened:
        together = opened.run(tokens)["logits"]
        apart = [
            opened.run({name: values[row : row + 1] for name, values in tokens.items()})["logits"][0]
            for row in range(2)
        ]
    np.testing.assert_allclose(together, apart, atol=1e-5)


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param({"input_ids": None}, id="missing"),
        pytest.param({"position_ids": np.zeros((2, 5), np.int64)}, id="unknown"),
        pytest.param({"input_ids": np.zeros((2, 5), np.float32)}, id="dtype"),
        pytest.param({"input_ids": np.zeros(5, np.int64)}, id="rank"),
    ],
)
def test_session_refuses_inputs_that_the_model_does_not_take(
    session: Session, tokens: dict[str, Array], broken: dict[str, Array | None]
):
    given = {name: values for name, values in {**tokens, **broken}.items() if values is not None}
    with session as opened, pytest.raises(EngineError) as error:
        opened.run(given)
    assert next(iter(broken)) in one_line(error)


def test_build_refuses_garbage_in_one_line_with_the_librarys_words(name: str, chosen: Backend, tiny_model: Model):
    with pytest.raises(EngineError) as error:
        chosen.build(replace(tiny_model, graph=GARBAGE), OPTIONS, unheard)
    assert re.search(SAID[name], one_line(error))


def test_load_refuses_garbage_in_one_line_with_the_librarys_words(
    name: str, chosen: Backend, tiny_model: Model, tmp_path: Path
):
    (tmp_path / "task.plan").write_bytes(GARBAGE)
    with pytest.raises(EngineError) as error:
        chosen.load(replace(tiny_model, graph=GARBAGE), tmp_path / "task.plan" if chosen.has_plans else None)
    assert re.search("driver|CUDA" if isinstance(error.value, NoDeviceError) else SAID[name], one_line(error))


def test_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(EngineError, match="'openvino' is not known") as error:
        backend("openvino")  # type: ignore[arg-type]
    assert one_line(error).endswith(", ".join(BACKENDS))


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="full TensorRT is installed here")
def test_backend_that_is_not_installed_names_its_extra():
    with pytest.raises(EngineError, match=r"'tensorrt' is not installed .*install lorafuse\[tensorrt\]$"):
        backend("tensorrt")


def test_a_backend_of_ones_own_runs_a_task_through_every_room(tiny_bundle: Bundle, tokens: dict[str, Array]):
    """It is handed in: no room has to learn its name."""
    part = task_part(tiny_bundle, "first")
    with (
        load_part(part, REFERENCE, Reference()) as ours,
        load_part(part, "onnxruntime", backend("onnxruntime", 1)) as its,
    ):
        got, want = ours.run(tokens)["logits"], its.run(tokens)["logits"]
    np.testing.assert_allclose(
        got, want, rtol=0, atol=engines_bound(part.bundle.path / part.part.model.path, 5) * np.abs(want).max()
    )

"""Many tasks in one process: every answer is the task's own, whatever was loaded, given up or damaged meanwhile."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import engines
from engines.backends import NoDeviceError
from engines.latency.arm_engines import OnnxRuntimeOpener
from engines.serving.runtime import Mode, Runtime, _InTurns, open_runtime
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import MODEL
from exporter.bundle.task_part import task_part
from exporter.task import add_task
from lora.errors import BundleError, EngineError
from lora.files.tensorfile import Array

TASKS = ("dense", "factors", "first", "other")
MODES: tuple[Mode, ...] = ("dedicated", "resident")


@pytest.fixture
def bundle(stored_both_ways: Path, write_adapter) -> Path:
    """Four tasks of one graph; ``factors`` is ``dense`` stored otherwise."""
    add_task(stored_both_ways, write_adapter("another", seed=7), "other", store="factors")
    return stored_both_ways


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Mode:
    return request.param


@pytest.fixture
def runtime(bundle: Path, mode: Mode) -> Iterator[Runtime]:
    with open_runtime(bundle, mode, threads=1) as opened:
        yield opened


@pytest.fixture
def alone(bundle: Path, tokens: dict[str, Array]) -> dict[str, Array]:
    """What each task says when it is loaded alone."""
    found = {}
    for task in TASKS:
        with engines.load(bundle, task, threads=1) as session:
            found[task] = session.run(tokens)["logits"]
    return found


def test_every_task_answers_as_it_does_alone(
    runtime: Runtime, mode: Mode, alone: dict[str, Array], tokens: dict[str, Array]
):
    """A resident session computes with weights that are not prepacked, and rounds otherwise."""
    assert runtime.tasks == TASKS
    for task in TASKS:
        np.testing.assert_allclose(
            runtime.run(task, tokens)["logits"], alone[task], rtol=0, atol=0 if mode == "dedicated" else 1e-5
        )
    assert np.abs(alone["dense"] - alone["other"]).max() > 0.01


def test_arrays_come_out_without_a_copy(runtime: Runtime, tokens: dict[str, Array]):
    logits = runtime.run("first", tokens)["logits"]
    assert not logits.flags.owndata
    before = logits.copy()
    runtime.run("other", tokens)
    runtime.close()
    np.testing.assert_array_equal(logits, before)


def test_there_and_back_gives_the_same_bits(runtime: Runtime, tokens: dict[str, Array]):
    first = runtime.run("first", tokens)["logits"]
    assert (runtime.run("other", tokens)["logits"] != first).any()
    np.testing.assert_array_equal(runtime.run("first", tokens)["logits"], first)


def test_the_base_answers_under_a_tasks_head(runtime: Runtime, bundle: Path, mode: Mode, tokens: dict[str, Array]):
    from engines.latency.arms import arms_of
    from engines.latency.verdict import BASE

    arms = arms_of(task_part(open_bundle(bundle), "dense"), OnnxRuntimeOpener(1)).arms
    (base,) = [arm for arm in arms if arm.name == BASE]
    with base.open() as session:
        wanted = session.run(tokens)["logits"]
    found = runtime.run("dense", tokens, adapted=False)["logits"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert np.abs(runtime.run("dense", tokens)["logits"] - wanted).max() > 0.01


def test_nothing_is_loaded_before_it_is_asked_for_and_then_it_stays(runtime: Runtime, tokens: dict[str, Array]):
    assert runtime.loaded == ()
    for task in ("other", "first", "other"):
        runtime.run(task, tokens)
    assert runtime.loaded == ("first", "other")


def test_memory_bounds_what_is_held(bundle: Path, mode: Mode, tokens: dict[str, Array], alone: dict[str, Array]):
    sizes = {task: cost(bundle, mode, task) for task in TASKS}
    with open_runtime(bundle, mode, threads=1, memory=2 * max(sizes.values())) as runtime:
        for task in (*TASKS, *TASKS):
            np.testing.assert_allclose(runtime.run(task, tokens)["logits"], alone[task], atol=1e-5)
            assert len(runtime.loaded) <= 2
            assert runtime.loaded[-1] == task


def cost(bundle: Path, mode: Mode, task: str) -> int:
    runtime = open_runtime(bundle, mode)
    return (runtime._session_cost if mode == "dedicated" else runtime._values_cost)(runtime._key(task, True))


def test_a_task_that_the_memory_can_never_hold_is_refused(bundle: Path, mode: Mode, tokens: dict[str, Array]):
    with (
        open_runtime(bundle, mode, memory=1000) as runtime,
        pytest.raises(EngineError, match="bytes of weights are needed at once, and the memory budget is 1000"),
    ):
        runtime.run("dense", tokens)


def test_an_unknown_task_is_refused_and_the_others_go_on(runtime: Runtime, tokens: dict[str, Array]):
    with pytest.raises(BundleError, match="no task 'nope' in this bundle; it holds: dense, factors, first, other"):
        runtime.run("nope", tokens)
    runtime.run("first", tokens)


def test_inputs_that_do_not_fit_are_refused_and_the_task_goes_on(runtime: Runtime, tokens: dict[str, Array]):
    with pytest.raises(EngineError, match="input 'input_ids' is float32 of rank 2; expected int64 of rank 2"):
        runtime.run("first", {**tokens, "input_ids": tokens["input_ids"].astype(np.float32)})
    with pytest.raises(
        EngineError,
        match=(
            r"inputs \['input_ids'\] given; this engine takes exactly \['attention_mask', 'input_ids',"
            r" 'token_type_ids'\]"
        ),
    ):
        runtime.run("first", {"input_ids": tokens["input_ids"]})
    runtime.run("first", tokens)


@pytest.mark.parametrize(
    "damage",
    [lambda path: path.unlink(), lambda path: path.write_bytes(b"?" * path.stat().st_size)],
    ids=["deleted", "damaged"],
)
def test_a_task_whose_file_is_gone_or_damaged_harms_no_other(
    bundle: Path, runtime: Runtime, damage, tokens: dict[str, Array], alone: dict[str, Array]
):
    runtime.run("first", tokens)
    opened = open_bundle(bundle)
    damage(bundle / opened.task("dense").parts[MODEL].weights.path)
    for _ in range(2):
        with pytest.raises(
            BundleError, match=r"dense-.*(missing from the bundle|does not match the manifest's SHA-256)"
        ):
            runtime.run("dense", tokens)
    np.testing.assert_allclose(runtime.run("first", tokens)["logits"], alone["first"], atol=1e-5)
    np.testing.assert_allclose(runtime.run("other", tokens)["logits"], alone["other"], atol=1e-5)


def test_a_damaged_task_harms_none_that_is_asked_for_first(
    bundle: Path, runtime: Runtime, tokens: dict[str, Array], alone: dict[str, Array]
):
    (bundle / open_bundle(bundle).task("dense").parts[MODEL].weights.path).unlink()
    np.testing.assert_allclose(runtime.run("first", tokens)["logits"], alone["first"], atol=1e-5)
    with pytest.raises(BundleError, match="missing from the bundle"):
        runtime.run("dense", tokens)


def test_a_task_that_comes_back_and_changes_more_asks_for_a_new_session(
    bundle: Path, write_adapter, tokens: dict[str, Array]
):
    """A resident session lets be exchanged what the tasks changed that could be read when it was opened."""
    module = "base_model.model.bert.encoder.layer.0.attention.self.key"
    key = {f"{module}.lora_A.weight": np.ones((4, 32)), f"{module}.lora_B.weight": np.ones((32, 4))}
    add_task(
        bundle, write_adapter("further", tensors=key, config={"target_modules": ["query", "key", "value"]}), "wider"
    )
    file = bundle / open_bundle(bundle).task("wider").parts[MODEL].weights.path
    file.rename(bundle / "aside")
    with open_runtime(bundle, "resident", threads=1) as runtime:
        runtime.run("first", tokens)
        (bundle / "aside").rename(file)
        with pytest.raises(
            EngineError,
            match=(
                r"'wider' could not be read when the runtime opened its graph, and changes '.*key.*'; reload the"
                r" runtime"
            ),
        ):
            runtime.run("wider", tokens)
    with open_runtime(bundle, "resident", threads=1) as runtime:
        runtime.run("wider", tokens)


def test_a_task_in_hand_stays_until_it_is_put_down(
    bundle: Path, mode: Mode, tokens: dict[str, Array], alone: dict[str, Array]
):
    with (
        open_runtime(bundle, mode, threads=1, memory=cost(bundle, mode, "dense")) as runtime,
        ThreadPoolExecutor(1) as other,
    ):
        with runtime.use("dense") as dense:
            waiting = other.submit(runtime.run, "first", tokens)  # there is room for one
            np.testing.assert_allclose(dense.run(tokens)["logits"], alone["dense"], atol=1e-5)
            assert runtime.loaded == ("dense",)
            assert not waiting.done()
        np.testing.assert_allclose(waiting.result(60)["logits"], alone["first"], atol=1e-5)


def test_a_closed_runtime_refuses(bundle: Path, mode: Mode, tokens: dict[str, Array]):
    with open_runtime(bundle, mode) as runtime:
        runtime.run("first", tokens)
    with pytest.raises(EngineError, match="the runtime is closed"):
        runtime.run("first", tokens)


def test_an_unknown_mode_is_refused(bundle: Path):
    with pytest.raises(EngineError, match="mode 'shared' is not known; expected dedicated or resident"):
        open_runtime(bundle, "shared")  # type: ignore[arg-type]


def test_calls_are_awaited_side_by_side(runtime: Runtime, tokens: dict[str, Array], alone: dict[str, Array]):
    async def all_at_once() -> list[dict[str, Array]]:
        return await asyncio.gather(*(runtime.arun(task, tokens) for task in TASKS * 3))

    for task, outputs in zip(TASKS * 3, asyncio.run(all_at_once()), strict=True):
        np.testing.assert_allclose(outputs["logits"], alone[task], atol=1e-5)


def test_a_cancelled_call_leaves_the_runtime_as_it_was(runtime: Runtime, tokens: dict[str, Array]):
    async def cancelled() -> None:
        call = asyncio.create_task(runtime.arun("first", tokens))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(cancelled())
    runtime.run("first", tokens)
    runtime.close()  # would wait for ever for a task that was not given back


def test_threads_that_switch_at_random_get_their_own_tasks_answers(
    bundle: Path, mode: Mode, tokens: dict[str, Array], alone: dict[str, Array]
):
    """With room for two tasks of four, so that they are given up and loaded again all the time."""
    budget = 2 * max(cost(bundle, mode, task) for task in TASKS)
    with open_runtime(bundle, mode, threads=1, memory=budget) as runtime:

        def work(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(20):
                task = chance.choice(TASKS)
                np.testing.assert_allclose(runtime.run(task, tokens)["logits"], alone[task], atol=1e-5, err_msg=task)

        with ThreadPoolExecutor(4) as threads:
            for done in [threads.submit(work, seed) for seed in range(4)]:
                done.result(120)


RTX = "tensorrt-rtx"


@pytest.mark.usefixtures("no_device")
def test_a_plan_is_served_where_there_is_a_device_and_costs_what_it_holds(rtx_bundle: Path, tokens: dict[str, Array]):
    (plan,) = (rtx_bundle / "engines").iterdir()
    with open_runtime(rtx_bundle, backend_name=RTX) as runtime, pytest.raises(NoDeviceError, match="CUDA error 35"):
        runtime.run("first", tokens)
    with (
        open_runtime(rtx_bundle, backend_name=RTX, memory=100) as runtime,
        pytest.raises(EngineError, match=f"{plan.stat().st_size} bytes of weights"),
    ):
        runtime.run("first", tokens)


def test_a_plan_that_there_is_not_is_said_with_the_command(
    rtx_bundle: Path, tiny_bundle: Bundle, tokens: dict[str, Array]
):
    build = f"run 'lorafuse build {tiny_bundle.path} --task first --backend {RTX}'"
    with (
        open_runtime(tiny_bundle.path, backend_name=RTX) as runtime,
        pytest.raises(EngineError, match=f"task 'first' has no {RTX} engine; {build}"),
    ):
        runtime.run("first", tokens)
    with (
        open_runtime(rtx_bundle, backend_name=RTX) as runtime,
        pytest.raises(EngineError, match=r"the base under task 'first' has no .* --unadapted'"),
    ):
        runtime.run("first", tokens, adapted=False)


def test_plans_are_dedicated(rtx_bundle: Path):
    with pytest.raises(EngineError, match="TensorRT's plans are each a task's own; choose mode 'dedicated'"):
        open_runtime(rtx_bundle, "resident", backend_name=RTX)


def test_a_plans_runs_take_turns():
    """TensorRT's sessions are one thread's; what is shared by threads must not be run by two at once."""
    running, most = [], []

    class Slow:
        def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
            running.append(1)
            most.append(len(running))
            time.sleep(0.005)
            running.pop()
            return inputs

    in_turns = _InTurns(Slow())  # type: ignore[arg-type]  # no context manager
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(in_turns.run, [{}] * 12))
    assert most == [1] * 12

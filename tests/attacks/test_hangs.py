"""A thread never waits for itself: what only its own end could bring about is an error at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import engines
from engines.serving.pool import Pool
from lora.errors import EngineError
from lora.files.tensorfile import Array
from scripts.support.hand_made_bundle import inputs
from scripts.support.resigned import part_of
from scripts.support.served_by_cpp import RefusedError, ServedByCpp

ROOT = Path(__file__).parents[2]
MODES = ("dedicated", "resident")


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """A test that hangs is ended."""
    former = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


@pytest.mark.parametrize("mode", MODES)
def test_closing_inside_ones_own_use_is_an_error_and_the_use_goes_on(bundle: Path, mode: str):
    with engines.open(bundle, mode, threads=1) as runtime:
        with runtime.use("left") as task:
            with pytest.raises(EngineError, match="closing would wait for a run of this very thread"):
                runtime.close()
            task.run(inputs())
        runtime.run("right", inputs())


SHUTDOWN = """
import os, signal, sys, threading, time
import engines
from lora.errors import EngineError
from scripts.support.hand_made_bundle import inputs

runtime = engines.open(sys.argv[1], sys.argv[2], threads=1)
said = []

def close(number, frame):
    try:
        runtime.close()
    except EngineError as error:
        said.append(str(error))
        raise SystemExit(0)

signal.signal(signal.SIGTERM, close)
threading.Thread(target=lambda: (time.sleep(1), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start()
try:
    while True:
        with runtime.use("left") as task:
            task.run(inputs())
            time.sleep(0.01)
finally:
    runtime.close()
    print(*said)
"""


@pytest.mark.parametrize("mode", MODES)
def test_a_signals_handler_that_closes_ends_the_process(bundle: Path, mode: str):
    done = subprocess.run(
        [sys.executable, "-c", SHUTDOWN, bundle, mode],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip() or "closing would wait" in done.stdout


def pool(budget: int) -> Pool[str, str]:
    return Pool(lambda key: key, lambda key: 1, lambda value: None, budget)


def test_a_thread_that_holds_too_much_for_what_it_asks_is_told_at_once():
    things = pool(1)
    with things.use("a"), pytest.raises(EngineError, match="1 bytes of weights are needed beside 1 that this thread"):
        things.use("b").__enter__()
    with things.use("b"):
        pass


@pytest.mark.parametrize("mode", MODES)
def test_nested_beyond_the_memory_budget_is_an_error(bundle: Path, mode: str):
    with engines.open(bundle, mode, threads=1) as runtime:
        runtime.preload("left")
        pooled = runtime._pool
        budget = pooled._used()
    with engines.open(bundle, mode, threads=1, memory=budget) as runtime, runtime.use("left") as task:
        with pytest.raises(EngineError, match="the memory budget is"):
            runtime.run("right", inputs())
        task.run(inputs())


def test_threads_that_would_wait_for_each_other_are_told():
    things, both = pool(2), threading.Barrier(2)

    def two(first: str, second: str) -> str | None:
        with things.use(first):
            both.wait(10)
            try:
                with things.use(second):
                    return None
            except EngineError as error:
                return str(error)

    with ThreadPoolExecutor(2) as threads:
        said = [done.result(20) for done in [threads.submit(two, *keys) for keys in (("a", "b"), ("c", "d"))]]
    assert any(word is not None and "end that use first" in word for word in said)
    with things.use("e"), things.use("f"):
        pass


def test_a_thread_that_is_interrupted_while_it_loads_is_not_made_to_wait_for_itself():
    said: list[str] = []
    things: Pool[str, str]

    def load(key: str) -> str:
        for attempt in (lambda: things.use("a").__enter__(), things.close):
            with pytest.raises(EngineError) as error:
                attempt()
            said.append(str(error.value))
        return key

    things = Pool(load, lambda key: 1, lambda value: None, None)
    with things.use("a"):
        pass
    assert "being loaded by this very thread" in said[0]
    assert "closing would wait" in said[1]


def test_closing_from_another_thread_still_waits():
    things = pool(1)
    with ThreadPoolExecutor(1) as other, ExitStack() as stack:
        stack.enter_context(things.use("a"))
        closing = other.submit(things.close)
        time.sleep(0.1)
        assert not closing.done()
        stack.close()
        closing.result(10)


@pytest.mark.parametrize("mode", MODES)
def test_in_cpp_nested_beyond_the_memory_budget_is_an_error(
    cpp: ServedByCpp, bundle: Path, good: dict[str, Array], mode: str
):
    """One thread holds one task and asks for another."""
    cpp.open(bundle, mode, memory=(bundle / part_of(bundle, "left")["weights"]["path"]).stat().st_size)
    cpp.ask("use", "left")
    with pytest.raises(RefusedError, match=r"bytes of weights are needed beside [1-9].*; raise it, or end that use"):
        cpp.run("right", inputs())
    np.testing.assert_allclose(cpp.held(inputs())["logits"], good["left"], atol=1e-4)
    cpp.ask("release")
    cpp.run("right", inputs())


def test_in_cpp_closing_inside_ones_own_use_does_not_wait(cpp: ServedByCpp, bundle: Path, good: dict[str, Array]):
    cpp.open(bundle, "resident")
    cpp.ask("use", "left")
    cpp.ask("close")
    np.testing.assert_allclose(cpp.held(inputs())["logits"], good["left"], atol=1e-4)
    cpp.ask("release")

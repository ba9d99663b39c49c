"""What a pool holds, who waits, and what is given up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.serving.pool import Pool
from lora.errors import EngineError


@dataclass
class Shelf:
    """Where a pool's things come from: what was loaded and given up, in order."""

    loaded: list[str] = field(default_factory=list)
    unloaded: list[str] = field(default_factory=list)
    load: Callable[[str], str] | None = None

    def pool(self, budget: int | None, cost: Callable[[str], int] = lambda key: 1) -> Pool[str, str]:
        return Pool(self.take, cost, self.unloaded.append, budget)

    def take(self, key: str) -> str:
        self.loaded.append(key)
        return self.load(key) if self.load else key


def used(pool: Pool[str, str], *keys: str) -> None:
    for key in keys:
        with pool.use(key) as value:
            assert value == key


def test_a_thing_is_loaded_once_and_kept():
    shelf = Shelf()
    used(shelf.pool(None), "a", "b", "a", "a")
    assert (shelf.loaded, shelf.unloaded) == (["a", "b"], [])


def test_the_one_unused_for_longest_makes_room():
    shelf = Shelf()
    pool = shelf.pool(2)
    used(pool, "a", "b", "a", "c")
    assert (shelf.unloaded, pool.held()) == (["b"], ["a", "c"])
    used(pool, "b")
    assert (shelf.unloaded, pool.held(), shelf.loaded) == (["b", "a"], ["c", "b"], ["a", "b", "c", "b"])


@given(st.lists(st.sampled_from("abcdef"), max_size=60), st.integers(1, 6))
def test_whatever_is_used_the_last_few_are_held(keys: list[str], budget: int):
    shelf = Shelf()
    pool = shelf.pool(budget)
    used(pool, *keys)
    recent = list(dict.fromkeys(reversed(keys)))[:budget]
    assert pool.held() == recent[::-1]
    assert sorted(shelf.loaded) == sorted([*shelf.unloaded, *pool.held()])


@given(st.lists(st.sampled_from("abcdef"), max_size=60))
def test_the_costs_of_what_is_held_stay_within_the_budget(keys: list[str]):
    costs = dict(zip("abcdef", (1, 2, 3, 5, 8, 13), strict=True))
    pool = Shelf().pool(14, costs.__getitem__)
    for key in keys:
        used(pool, key)
        assert sum(costs[held] for held in pool.held()) <= 14


def test_what_is_in_use_stays_and_who_needs_the_room_waits():
    shelf = Shelf()
    pool = shelf.pool(1)
    with ThreadPoolExecutor() as threads, ExitStack() as stack:
        stack.enter_context(pool.use("a"))
        waiting = threads.submit(used, pool, "b")
        time.sleep(0.05)
        assert (waiting.done(), shelf.loaded) == (False, ["a"])
        stack.close()
        waiting.result(5)
    assert (shelf.loaded, shelf.unloaded) == (["a", "b"], ["a"])


def test_many_threads_that_want_one_thing_load_it_once():
    shelf, gate = Shelf(), threading.Barrier(8)
    shelf.load = lambda key: (time.sleep(0.02), key)[1]
    pool = shelf.pool(None)

    def together() -> None:
        gate.wait()
        used(pool, "a")

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(together) for _ in range(8)]:
            done.result(5)
    assert shelf.loaded == ["a"]


def test_two_things_are_loaded_side_by_side():
    shelf, gate = Shelf(), threading.Barrier(2)
    shelf.load = lambda key: (gate.wait(5), key)[1]
    pool = shelf.pool(None)
    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(used, pool, key) for key in "ab"]:
            done.result(5)


def test_a_loading_that_fails_is_everyones_error_and_the_next_use_tries_again():
    shelf = Shelf()
    started = threading.Event()

    def fail(key: str) -> str:
        started.set()
        time.sleep(0.05)
        raise EngineError("broken")

    shelf.load = fail
    pool = shelf.pool(1)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(used, pool, "a")
        started.wait(5)
        second = threads.submit(used, pool, "a")
        for done in (first, second):
            with pytest.raises(EngineError, match="broken"):
                done.result(5)
    shelf.load = None
    used(pool, "a", "b")
    assert pool.held() == ["b"]


def test_what_can_never_fit_is_refused_and_the_rest_stays():
    shelf = Shelf()
    pool = shelf.pool(10, lambda key: 11 if key == "huge" else 5)
    used(pool, "a", "b")
    with pytest.raises(
        EngineError, match="11 bytes of weights are needed at once, and the memory budget is 10; raise it"
    ):
        used(pool, "huge")
    assert (pool.held(), shelf.unloaded) == (["a", "b"], [])


def test_an_error_in_the_block_gives_the_thing_back():
    pool = Shelf().pool(1)
    with pytest.raises(ZeroDivisionError), pool.use("a"):
        _ = 1 / 0
    used(pool, "b")


def test_closing_waits_gives_everything_up_and_refuses_what_comes_later():
    shelf = Shelf()
    pool = shelf.pool(None)
    used(pool, "a")
    with ThreadPoolExecutor() as threads:
        with pool.use("b"):
            closing = threads.submit(pool.close)
            time.sleep(0.05)
            assert not closing.done()
        closing.result(5)
    assert (sorted(shelf.unloaded), pool.held()) == (["a", "b"], [])
    with pytest.raises(EngineError, match="the runtime is closed"):
        used(pool, "a")


def test_who_waits_for_room_when_the_pool_closes_is_told():
    pool = Shelf().pool(1)
    with ThreadPoolExecutor() as threads:
        with pool.use("a"):
            waiting = threads.submit(used, pool, "b")
            time.sleep(0.05)
            closing = threads.submit(pool.close)
            time.sleep(0.05)
        closing.result(5)
        with pytest.raises(EngineError, match="closed"):
            waiting.result(5)

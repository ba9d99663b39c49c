"""Things that are loaded when they are first used, shared by threads, and given up in the order of their last use when
memory is short.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition, Event
from typing import Generic, TypeVar

from lora.errors import EngineError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass
class _Entry(Generic[V]):
    """A thing that is there or is being loaded, by whoever made the entry; ``users`` have it in hand."""

    cost: int
    users: int = 0
    ready: Event = field(default_factory=Event)
    value: V | None = None
    error: BaseException | None = None


class Pool(Generic[K, V]):
    """At most ``budget`` bytes of things by key. What is in use is never given up: who needs the room waits for it."""

    def __init__(
        self, load: Callable[[K], V], cost: Callable[[K], int], unload: Callable[[V], None], budget: int | None
    ) -> None:
        self._load, self._cost, self._unload, self._budget = load, cost, unload, budget
        self._entries: OrderedDict[K, _Entry[V]] = OrderedDict()  # last used last
        self._changed = Condition()
        self._closed = False

    def held(self) -> list[K]:
        """What is loaded, the longest unused first."""
        with self._changed:
            return [key for key, entry in self._entries.items() if entry.value is not None]

    @contextmanager
    def use(self, key: K) -> Iterator[V]:
        """The thing of ``key``, for as long as the block lasts.

        Raises what loading it raises; the next use loads anew.
        """
        entry, first = self._entered(key)
        try:
            if first:
                self._fill(key, entry)
            else:
                entry.ready.wait()
            if entry.error is not None:
                raise entry.error
            assert entry.value is not None
            yield entry.value
        finally:
            with self._changed:
                entry.users -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Wait for what is in use, and give everything up. Using the pool afterwards is an error."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not any(entry.users for entry in self._entries.values()))
            while self._entries:
                self._give_up(next(iter(self._entries)))
            self._changed.notify_all()

    def _entered(self, key: K) -> tuple[_Entry[V], bool]:
        """The key's entry with one user more, and whether this caller is to load it."""
        with self._changed:
            while not self._closed:
                if key in self._entries:
                    entry, first = self._entries[key], False
                elif self._has_room(cost := self._cost(key)):
                    entry, first = self._entries.setdefault(key, _Entry(cost)), True
                else:
                    self._changed.wait()
                    continue
                entry.users += 1
                self._entries.move_to_end(key)
                return entry, first
        raise EngineError("the runtime is closed")

    def _has_room(self, cost: int) -> bool:
        """Whether ``cost`` more bytes fit, after what is not in use was given up as far as needed."""
        if self._budget is None:
            return True
        if cost > self._budget:
            raise EngineError(
                f"{cost} bytes of weights are needed at once, and the memory budget is {self._budget}; raise it"
            )
        while self._used() + cost > self._budget:
            idle = next((key for key, entry in self._entries.items() if entry.users == 0), None)
            if idle is None:
                return False
            self._give_up(idle)
        return True

    def _used(self) -> int:
        return sum(entry.cost for entry in self._entries.values())

    def _give_up(self, key: K) -> None:
        entry = self._entries.pop(key)
        if entry.value is not None:
            self._unload(entry.value)

    def _fill(self, key: K, entry: _Entry[V]) -> None:
        try:
            entry.value = self._load(key)
        except BaseException as error:
            entry.error = error
            with self._changed:
                del self._entries[key]
            raise
        finally:
            entry.ready.set()

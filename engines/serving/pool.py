"""Things that are loaded when they are first used, shared by threads, and given up in the order of their last use when
memory is short.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition, Event, get_ident
from typing import Any, Generic, TypeVar

from lora.errors import EngineError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass
class _Entry(Generic[V]):
    """A thing that is there or is being loaded, by the thread ``loader``; ``users`` are the threads that have it in
    hand, and how often. What is ``leaving`` is given up when the last of them is done.
    """

    cost: int
    loader: int
    users: Counter[int] = field(default_factory=Counter)
    ready: Event = field(default_factory=Event)
    value: V | None = None
    error: BaseException | None = None
    leaving: bool = False


class Pool(Generic[K, V]):
    """At most ``budget`` bytes of things by key. What is in use is never given up: who needs the room waits for it.

    A thread never waits for itself: what only its own end could bring about is an error at once.
    """

    def __init__(
        self, load: Callable[[K], V], cost: Callable[[K], int], unload: Callable[[V], None], budget: int | None
    ) -> None:
        self._load, self._cost, self._unload, self._budget = load, cost, unload, budget
        self._entries: OrderedDict[K, _Entry[V]] = OrderedDict()  # last used last
        self._changed: Any = Condition()  # typed as any for _is_owned, which its own methods rest on
        self._waiting: Counter[int] = Counter()  # threads that wait for room
        self._closed = False

    def held(self) -> list[K]:
        """What is loaded, the longest unused first."""
        with self._changed:
            return [key for key, entry in self._entries.items() if entry.value is not None]

    @contextmanager
    def use(self, key: K) -> Iterator[V]:
        """The thing of ``key``, for as long as the block lasts.

        Raises what loading it raises; the next use loads anew. Raises EngineError when the thread would wait for
        itself.
        """
        me = get_ident()
        entry, first = self._entered(key, me)
        try:
            if first:
                self._fill(key, entry)
            elif not entry.ready.is_set():
                if entry.loader == me:  # a signal handler, say, that interrupted the loading
                    raise EngineError("what is asked for is being loaded by this very thread; ask in another one")
                entry.ready.wait()
            if entry.error is not None:
                raise entry.error
            assert entry.value is not None
            yield entry.value
        finally:
            self._leave(key, entry, me)

    def evict(self, unwanted: Callable[[K], bool]) -> None:
        """Give up what is unwanted: now, or when the last use of it ends."""
        with self._changed:
            for key, entry in list(self._entries.items()):
                if unwanted(key):
                    if entry.users:
                        entry.leaving = True
                    else:
                        self._give_up(key)
            self._changed.notify_all()

    def close(self) -> None:
        """Wait for what other threads use, and give everything up. Using the pool afterwards is an error.

        Raises EngineError at once, and closes nothing, inside a use by this thread: it would wait for itself.
        """
        me = get_ident()
        inside = self._changed._is_owned()  # a signal handler has interrupted this thread in here
        with self._changed:
            if inside or any(me in entry.users for entry in self._entries.values()):
                raise EngineError(
                    "closing would wait for a run of this very thread; close when it has ended (of a signal's handler:"
                    " raise SystemExit there, and close where the runtime was opened)"
                )
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not any(entry.users for entry in self._entries.values()))
            while self._entries:
                self._give_up(next(iter(self._entries)))
            self._changed.notify_all()

    def _entered(self, key: K, me: int) -> tuple[_Entry[V], bool]:
        """The key's entry with one user more, and whether this caller is to load it."""
        with self._changed:
            while not self._closed:
                if key in self._entries:
                    entry, first = self._entries[key], False
                elif self._has_room(cost := self._cost(key)):
                    entry, first = self._entries.setdefault(key, _Entry(cost, me)), True
                else:
                    self._wait_for_room(cost, me)
                    continue
                entry.users[me] += 1
                self._entries.move_to_end(key)
                return entry, first
        raise EngineError("the runtime is closed")

    def _leave(self, key: K, entry: _Entry[V], me: int) -> None:
        with self._changed:
            entry.users[me] -= 1
            entry.users += Counter()  # without those at zero
            if entry.leaving and not entry.users and self._entries.get(key) is entry:
                self._give_up(key)
            self._changed.notify_all()

    def _wait_for_room(self, cost: int, me: int) -> None:
        """Raises EngineError where no other thread can make room: this one has too much, or all wait for each other."""
        mine = sum(entry.cost for entry in self._entries.values() if me in entry.users)
        holders = {user for entry in self._entries.values() for user in entry.users}
        if mine + cost > (self._budget or 0) or holders <= {me, *self._waiting}:
            raise EngineError(
                f"{cost} bytes of weights are needed beside {mine} that this thread has in use, and the memory budget"
                f" is {self._budget}; raise it, or end that use first"
            )
        self._waiting[me] += 1
        try:
            self._changed.wait()
        finally:
            self._waiting[me] -= 1
            self._waiting += Counter()

    def _has_room(self, cost: int) -> bool:
        """Whether ``cost`` more bytes fit, after what is not in use was given up as far as needed."""
        if self._budget is None:
            return True
        if cost > self._budget:
            raise EngineError(
                f"{cost} bytes of weights are needed at once, and the memory budget is {self._budget}; raise it"
            )
        while self._used() + cost > self._budget:
            idle = next((key for key, entry in self._entries.items() if not entry.users), None)
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

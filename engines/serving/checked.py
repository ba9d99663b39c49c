"""Inputs are looked at before an engine is: token ids, masks and lengths that a graph would answer, wrongly or in its
library's words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from engines.backends import Runs, Session
from exporter.bundle.task_part import TaskPart
from lora.errors import EngineError
from lora.files.tensorfile import Array

IDS, MASK, POSITIONS, TYPES = ("input_ids", "decoder_input_ids"), "attention_mask", "position_ids", "token_type_ids"
PAST = "past_sequence"  # the axis of a decoder's cache


@dataclass(frozen=True)
class Limits:
    """What a graph's inputs may be: ids below ``vocabulary``, at most ``longest`` tokens with those of the past (each 0
    where there is no limit). ``past`` is an input with the cache's axis, and which axis it is.
    """

    vocabulary: int
    longest: int
    past: tuple[str, int] | None

    def check(self, inputs: Mapping[str, Array]) -> None:
        """Raises EngineError naming the input and the value. What is missing, or of another dtype or rank, is the
        engine's to refuse.
        """
        for name in IDS:
            ids = inputs.get(name)
            if ids is not None and ids.dtype.kind == "i" and ids.ndim == 2:
                _check_range(name, ids, self.vocabulary)
                self._check_length(name, ids, inputs if name == IDS[0] else {})
        for name, most in ((POSITIONS, self.longest), (TYPES, 0)):
            values = inputs.get(name)
            if values is not None and values.dtype.kind == "i":
                _check_range(name, values, most)

    def _check_length(self, name: str, ids: Array, inputs: Mapping[str, Array]) -> None:
        cache = inputs.get(self.past[0]) if self.past else None
        past = cache.shape[self.past[1]] if self.past and cache is not None and cache.ndim > self.past[1] else 0
        length = past + ids.shape[1]
        if length > self.longest > 0:
            raise EngineError(f"input '{name}' makes {length} tokens a row; expected at most {self.longest}")
        mask = inputs.get(MASK)
        if mask is not None and mask.ndim == 2 and mask.shape != (ids.shape[0], length):
            raise EngineError(
                f"input '{MASK}' is of shape {list(mask.shape)}; expected {[ids.shape[0], length]}, as long as"
                f" '{name}'{' with the past' if past else ''}"
            )


class CheckedSession:
    """A session whose inputs are looked at first."""

    def __init__(self, session: Session, limits: Limits) -> None:
        self._session, self._limits = session, limits

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name. Raises EngineError as ``Limits.check`` and the session do."""
        self._limits.check(inputs)
        return self._session.run(inputs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.__exit__(kind, error, trace)


@dataclass(frozen=True)
class Switched:
    """A session that tasks share, and the weights that make it one of them."""

    session: Runs
    values: Mapping[str, Array]
    limits: Limits

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The task's outputs by name. Raises EngineError as ``Limits.check`` and the session do."""
        self.limits.check(inputs)
        return self.session.run({**inputs, **self.values})


def limits_of(part: TaskPart) -> Limits:
    """What the part's graph may be given."""
    base = part.bundle.manifest.base
    caches = (port for port in part.graph.inputs if PAST in port.shape)
    past = next(((port.name, port.shape.index(PAST)) for port in caches), None)
    return Limits(base.vocabulary, base.longest, past)


def _check_range(name: str, values: Array, end: int) -> None:
    """Raises EngineError unless the values are 0 … ``end`` − 1; an ``end`` of 0 is none."""
    if not values.size:
        return
    lowest, highest = values.min(), values.max()
    if lowest < 0 or highest >= end > 0:
        expected = f"0 to {end - 1}" if end else "0 or more"
        raise EngineError(f"input '{name}' holds {lowest if lowest < 0 else highest}; expected {expected}")

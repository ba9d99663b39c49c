"""A logger that keeps what the library says, for the exception."""

from __future__ import annotations

import functools
from collections import deque
from typing import Any

from lora.errors import EngineError

KEPT = 20  # lines: a process that goes on after errors does not collect them


@functools.cache
def log_of(trt: Any) -> Any:
    """The process's logger for ``trt``.

    Its ``error(what)`` is an EngineError with the errors logged since the last one, in one line.

    One, and never given back: TensorRT keeps the first logger that it is handed for all that comes later, until nothing
    of it lives.
    """

    class Log(trt.ILogger):  # type: ignore[misc]  # the base class is chosen at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._lines: deque[str] = deque(maxlen=KEPT)

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                self._lines.append(message)

        def begin(self) -> None:
            """Forget what was said: something else begins."""
            self._lines.clear()

        def error(self, what: str, *more: str) -> EngineError:
            said = "; ".join(" ".join(line.split()) for line in (*more, *self._lines)) or "it gave no reason"
            self._lines.clear()
            return EngineError(f"{trt.__name__} {trt.__version__}: {what}: {said}")

    return Log()

"""A logger that keeps what the library says, for the exception."""

from __future__ import annotations

from typing import Any

from lora.errors import EngineError


def log_of(trt: Any) -> Any:
    """A logger for ``trt``: ``error(what)`` is an EngineError with the errors that were logged, in one line."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the base class is chosen at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                self.lines.append(message)

        def error(self, what: str, *more: str) -> EngineError:
            said = "; ".join(" ".join(line.split()) for line in (*more, *self.lines)) or "it gave no reason"
            return EngineError(f"{trt.__name__} {trt.__version__}: {what}: {said}")

    return Log()

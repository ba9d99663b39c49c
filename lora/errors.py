"""What went wrong, for people: every expected failure of the three packages is one of these.

    LorafuseError
    ├── AdapterError      an adapter can't be read, or doesn't fit the base
    ├── CheckpointError   a base checkpoint or a weights file can't be read
    ├── BundleError       a bundle is missing, damaged or newer than this program
    ├── ExportError       a model can't be exported
    └── EngineError       an engine can't be built, loaded or run

The message is one line: the file, the field or tensor, what was expected, and what to do. The command line prints it
and exits with status 3; anything else is a bug and keeps its traceback.
"""

from lora.wording import printable


class LorafuseError(Exception):
    """Root of every expected failure. What a message took from a stranger's file can't steer a terminal."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class AdapterError(LorafuseError):
    """An adapter can't be read, or doesn't fit the base."""


class CheckpointError(LorafuseError):
    """A base checkpoint or a weights file can't be read."""


class BundleError(LorafuseError):
    """A bundle is missing, damaged or newer than this program."""


class ExportError(LorafuseError):
    """A model can't be exported."""


class EngineError(LorafuseError):
    """An engine can't be built, loaded or run."""

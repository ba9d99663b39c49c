"""What long work tells whoever waits for it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told of each step of long work, and how much of it is done, from 0 to 1, where that is known."""

    def __call__(self, step: str, share: float | None = None, /) -> None:
        """Begin ``step``, or go on with it."""
        ...


def unheard(step: str, share: float | None = None, /) -> None:
    """A Progress that nobody listens to."""

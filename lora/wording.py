"""Figures and strangers' strings as people read them."""

from __future__ import annotations


def megabytes(size: int) -> str:
    """A size for people: "7.1 MB", "60.8 kB"."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def printable(text: str) -> str:
    """``text`` that came with a file, for a terminal: control characters, and bytes that are no text, are escaped."""
    if text.isprintable():  # nearly every one
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def printable_lines(text: str) -> str:
    """As ``printable``, of a text that may have several lines and tabs, such as what a model has written."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))

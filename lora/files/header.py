"""The header of a safetensors file that is in memory: every rule of the format, on the very bytes that are read later.

Format: https://github.com/huggingface/safetensors#format. The library reads files by their path, and so another one
when a file was swapped since it was hashed; this reader takes the bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from lora.files.mapped import Content

LARGEST = 100_000_000  # bytes of a header, as in the library
DIMENSIONS = 32  # of a tensor, as numpy has had for long
ENTRY = {"dtype", "shape", "data_offsets"}


class HeaderError(ValueError):
    """What is wrong with a header, in a few words."""


def read_header(content: Content, widths: Mapping[str, int]) -> tuple[dict[str, Any], int]:
    """The header, and where the data start, in bytes. ``widths`` are bytes an element by the format's names of dtypes.

    Raises HeaderError where the bytes are not a whole file: a range that overlaps, leaves a gap, or is not of its
    tensor's size.
    """
    if len(content) < 8:
        raise HeaderError("shorter than the size of a header")
    size = int.from_bytes(content[:8], "little")
    if size > min(LARGEST, len(content) - 8):
        raise HeaderError(f"a header of {size} bytes in a file of {len(content)}")
    header = _decoded(content[8 : 8 + size])
    end = 0
    for name, entry in sorted(_tensors(header).items(), key=lambda item: _offsets(*item)):
        end = _checked_end(name, entry, end, widths)
    if 8 + size + end != len(content):
        raise HeaderError(f"{8 + size + end} bytes are described, and the file has {len(content)}")
    return header, 8 + size


def _decoded(content: bytes) -> dict[str, Any]:
    try:
        header = json.loads(content.decode(), object_pairs_hook=_once, parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"the header is not JSON as the format has it: {error}") from error
    if not isinstance(header, dict):
        raise HeaderError("the header is no JSON object")
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A name that stands twice would be another tensor to another reader."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise HeaderError("a name stands twice")
    return found


def _refused(constant: str) -> Any:
    raise HeaderError(f"{constant} is no number in JSON")


def _tensors(header: dict[str, Any]) -> dict[str, Any]:
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError("the metadata are not texts by name")
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    if not isinstance(entry, dict) or set(entry) != ENTRY:
        raise HeaderError(f"tensor '{name}' has not exactly {', '.join(sorted(ENTRY))}")
    found = entry["data_offsets"]
    if not _are_sizes(found) or len(found) != 2:
        raise HeaderError(f"tensor '{name}' has the offsets {found}")
    return found[0], found[1]


def _checked_end(name: str, entry: dict[str, Any], start: int, widths: Mapping[str, int]) -> int:
    begin, end = _offsets(name, entry)
    if not isinstance(entry["dtype"], str) or not _are_sizes(entry["shape"]):
        raise HeaderError(f"tensor '{name}' is {entry['dtype']} of shape {entry['shape']}")
    if begin != start or end < begin:
        raise HeaderError(f"tensor '{name}' lies at {begin} to {end}; expected it to begin at {start}")
    width = widths.get(entry["dtype"])  # an unknown dtype is refused by its name where tensors are described
    if width is not None and width * math.prod(entry["shape"]) != end - begin:
        raise HeaderError(f"tensor '{name}' of shape {entry['shape']} and {entry['dtype']} has {end - begin} bytes")
    return end


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= DIMENSIONS
        and all(type(value) is int and 0 <= value < 1 << 63 for value in values)
    )

"""Protobuf's wire format, as much as a reader of ONNX files needs: a message is fields, each with a number and a type.

Format: https://protobuf.dev/programming-guides/encoding/. Strict: what another parser might read otherwise (a field of
another type, a number that is too long, a field that may come once and comes twice) is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

VARINT, EIGHT, BYTES, FOUR = 0, 1, 2, 5
KINDS: Mapping[str, tuple[int, ...]] = {
    "number": (VARINT,),
    "bytes": (BYTES,),
    "four": (FOUR,),
    "eight": (EIGHT,),
    "numbers": (VARINT, BYTES),
    "fours": (FOUR, BYTES),
    "eights": (EIGHT, BYTES),
}


class WireError(ValueError):
    """What is wrong with a message, in a few words."""


@dataclass(frozen=True)
class Message:
    """What a kind of message may hold: its fields' names by their numbers, and the wire types of each.

    ``once`` are the numbers of fields that may come once.
    """

    name: str
    fields: Mapping[int, str]
    wires: Mapping[int, tuple[int, ...]]
    once: frozenset[int]


def message(name: str, /, **fields: str) -> Message:
    """A kind of message: each field is given as "number kind", with a * behind where it may come several times."""
    names, wires, once = {}, {}, set()
    for field, described in fields.items():
        number, kind = described.rstrip("*").split()
        names[int(number)] = field
        wires[int(number)] = KINDS[kind]
        if not described.endswith("*"):
            once.add(int(number))
    return Message(name, names, wires, frozenset(once))


Value = int | tuple[int, int]  # a number, or where the field's bytes begin and end


def read(content: bytes, start: int, end: int, kind: Message) -> Iterator[tuple[str, Value]]:
    """The fields of the message in ``content[start:end]``, in the file's order.

    Raises WireError where the bytes are not such a message.
    """
    seen: set[int] = set()
    names, wires, once = kind.fields, kind.wires, kind.once
    place = start
    while place < end:
        tag, place = _varint(content, place, end)
        number, wire = tag >> 3, tag & 7
        if number not in names or wire not in wires[number]:
            raise WireError(f"a {kind.name} has the field {number} of wire type {wire}, which is not known")
        if number in once:
            if number in seen:
                raise WireError(f"a {kind.name} has its {names[number]} twice")
            seen.add(number)
        value: Value
        if wire == BYTES:
            size, place = _varint(content, place, end)
            value = (place, place + size)
            place += size
        elif wire == VARINT:
            value, place = _varint(content, place, end)
        else:
            size = 8 if wire == EIGHT else 4
            value = (place, place + size)
            place += size
        if place > end:
            raise WireError(f"the {names[number]} of a {kind.name} ends beyond it")
        yield names[number], value


def numbers(content: bytes, value: Value) -> list[int]:
    """The numbers of a field of the kind "numbers": one, or those that are packed."""
    if isinstance(value, int):
        return [value]
    place, end = value
    found = []
    while place < end:
        number, place = _varint(content, place, end)
        found.append(number)
    return found


def text(content: bytes, value: Value) -> str:
    """The text of a field. Raises WireError where it is not UTF-8."""
    assert not isinstance(value, int)
    try:
        return content[value[0] : value[1]].decode()
    except UnicodeDecodeError as error:
        raise WireError("a text is not UTF-8") from error


def _varint(content: bytes, place: int, end: int) -> tuple[int, int]:
    """A number, seven bits a byte and the lowest first, and where it ends."""
    if place < end and content[place] < 0x80:  # nearly every one
        return content[place], place + 1
    found = shift = 0
    while place < end:
        byte = content[place]
        place += 1
        found |= (byte & 0x7F) << shift
        if byte < 0x80:
            if found >= 1 << 64:
                raise WireError("a number is longer than 64 bits")
            return found, place
        shift += 7
        if shift > 63:
            raise WireError("a number is longer than 64 bits")
    raise WireError("a number ends beyond its message")

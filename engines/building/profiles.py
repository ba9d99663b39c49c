"""Optimization profiles: the sizes of a graph's dynamic axes that an engine is built for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from engines.backends import Axes, AxisRange
from engines.feeds.inputs import CACHED
from exporter.bundle.records import Base, Graph, Port
from lora.errors import EngineError

SHAPE = re.compile(r"\d+(x\d+)*", re.ASCII)
EXPECTED = "expected INPUT=SMALLEST,TYPICAL,LARGEST, such as input_ids=1x16,1x128,8x512"
# What an engine with a fixed range of sizes is built for, where the caller does not say.
BATCH, TOKENS, DECODED = AxisRange(1, 1, 8), AxisRange(1, 128, 512), AxisRange(1, 1, 128)


def default_profiles(graph: Graph, base: Base) -> tuple[Axes, ...]:
    """The default ranges, held within the positions that the base has been trained for.

    A decoder with a cache gets two: one that takes any number of tokens after any others, tuned for a prompt, and one
    for the next token.
    """
    longest = base.longest or TOKENS.largest
    tokens = AxisRange(1, min(TOKENS.typical, longest), min(TOKENS.largest, longest))
    axes = {"batch": BATCH, "sequence": tokens, "decoder_sequence": DECODED}
    if not any(port.name.startswith(CACHED) for port in graph.inputs):
        return (axes,)
    prompt = with_cache({**axes, "past_sequence": replace(tokens, smallest=0, typical=0)})
    return (prompt, with_cache({**axes, "sequence": AxisRange(1, 1, 1), "past_sequence": replace(tokens, smallest=0)}))


def with_cache(axes: Axes) -> Axes:
    """Of a decoder, all the positions that its mask covers: those in the cache and the new ones."""
    past, new = axes["past_sequence"], axes["sequence"]
    total = AxisRange(past.smallest + new.smallest, past.typical + new.typical, past.largest + new.largest)
    return {**axes, "total_sequence": total}


def given_profile(texts: Sequence[str], graph: Graph, default: Axes) -> Axes:
    """The ranges in ``texts``, such as "input_ids=1x16,1x128,8x512", by axis.

    Axes of other inputs keep the range of ``default``.

    Raises EngineError naming the input, the axis, and what was expected.
    """
    ports = {port.name: port for port in graph.inputs}
    given: dict[str, AxisRange] = {}
    for text in texts:
        for axis, sizes in _ranges(text, ports).items():
            if given.setdefault(axis, sizes) != sizes:
                raise EngineError(
                    f"--profile '{text}': axis '{axis}' is given {_shown(sizes)} here and {_shown(given[axis])} by"
                    " another input"
                )
    axes = {**default, **given}
    return with_cache(axes) if "past_sequence" in axes and "total_sequence" not in given else axes


def _ranges(text: str, ports: Mapping[str, Port]) -> dict[str, AxisRange]:
    name, equals, shapes = text.partition("=")
    parts = shapes.split(",")
    if not equals or len(parts) != 3 or not all(SHAPE.fullmatch(part) for part in parts):
        raise EngineError(f"--profile '{text}': {EXPECTED}")
    if name not in ports:
        raise EngineError(f"--profile '{text}': no input '{name}'; the model has {', '.join(sorted(ports))}")
    shape = ports[name].shape
    sizes = [[int(size) for size in part.split("x")] for part in parts]
    if any(len(part) != len(shape) for part in sizes):
        raise EngineError(
            f"--profile '{text}': input '{name}' has rank {len(shape)} ({', '.join(map(str, shape))}); {EXPECTED}"
        )
    found = {}
    for axis, (smallest, typical, largest) in zip(shape, zip(*sizes, strict=True), strict=True):
        if isinstance(axis, int) and not smallest == typical == largest == axis:
            raise EngineError(
                f"--profile '{text}': an axis of input '{name}' is always {axis}; give {axis} in all three shapes"
            )
        if not smallest <= typical <= largest:
            raise EngineError(
                f"--profile '{text}': axis '{axis}' is given {smallest}, {typical}, {largest}; expected smallest ≤"
                " typical ≤ largest"
            )
        if isinstance(axis, str):
            found[axis] = AxisRange(smallest, typical, largest)
    return found


def _shown(sizes: AxisRange) -> str:
    return f"{sizes.smallest}, {sizes.typical}, {sizes.largest}"

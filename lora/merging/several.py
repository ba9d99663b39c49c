"""Several adapters on one base, each with a weight.

The result does not depend on the order in which the adapters are given: they are put in the order of their hashes. What
would depend on it, or has no sum, is refused: DoRA (its norm is of the weight as it is then), and tensors that two
adapters replace with different values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora.adapter import Adapter, Blend, Change, Increment, LowRank, Replacement, Rows, Rule, Scale
from lora.bases.structure import BaseStructure
from lora.errors import AdapterError
from lora.files.tensorfile import Array
from lora.merging.fit import changes_by_parameter


@dataclass(frozen=True)
class Weighted:
    """An adapter and the factor that its update is scaled by; 1 is the adapter as it was trained."""

    adapter: Adapter
    weight: float = 1.0


@dataclass(frozen=True)
class Blending:
    """The rule, the share of each update that pruning keeps (TIES, DARE), and the seed of DARE's choice."""

    rule: Rule = "linear"
    density: float = 0.5
    seed: int = 0


def combined(
    base: Mapping[str, Array],
    adapters: Sequence[Weighted],
    blending: Blending,
    structure: Callable[[Adapter], BaseStructure | None] = lambda adapter: None,
) -> dict[str, list[Change]]:
    """{tensor: its changes} of all adapters together; ``structure`` is what is known of the base, as each's model.

    Raises AdapterError when an adapter does not fit the base, or when the adapters can't be combined.
    """
    if not 0 < blending.density <= 1:
        raise AdapterError(f"density {blending.density} is not a share; expected more than 0 and at most 1")
    ordered = sorted(adapters, key=lambda weighted: (weighted.adapter.sha256, weighted.weight))
    targets = [changes_by_parameter(base, one.adapter, structure(one.adapter)) for one in ordered]
    if len(ordered) == 1 and ordered[0].weight == 1:
        return targets[0]
    _refuse_dora(ordered)
    names = sorted({name for target in targets for name in target})
    paired = list(zip(ordered, targets, strict=True))
    return {
        name: _combine_one(
            name, [(weighted, change) for weighted, target in paired for change in target.get(name, ())], blending
        )
        for name in names
    }


def _combine_one(name: str, changes: Sequence[tuple[Weighted, Change]], blending: Blending) -> list[Change]:
    """A replaced tensor first, then the updates, then the biases' increments."""
    fixed: list[tuple[Weighted, Replacement | Rows]] = []
    updates: list[tuple[Weighted, LowRank]] = []
    increments: list[Change] = []
    for weighted, change in changes:
        match change:
            case Replacement() | Rows():
                fixed.append((weighted, change))
            case LowRank():
                updates.append((weighted, change))
            case Increment():
                increments.append(replace(change, scaling=change.scaling * weighted.weight))
            case Scale():
                raise AdapterError(
                    f"{weighted.adapter.path}: an IA3 adapter can't be weighted or combined with others: it multiplies"
                    f" '{name}', and adds nothing to it"
                )
            case Blend():
                raise AssertionError("a blend is made here, of what adapters bring")
    return [*_agreed(name, fixed), *_added(name, updates, blending), *increments]


def _agreed(name: str, fixed: Sequence[tuple[Weighted, Replacement | Rows]]) -> list[Change]:
    """The one value that all adapters give a tensor. Raises AdapterError where they differ."""
    for weighted, change in fixed[1:]:
        if not _same_values(change, fixed[0][1]):
            raise AdapterError(
                f"{weighted.adapter.path}: '{name}' is replaced by {fixed[0][0].adapter.path} too, with other values; "
                "tasks with heads of their own can't be combined"
            )
    return [change for _, change in fixed[:1]]


def _added(name: str, updates: Sequence[tuple[Weighted, LowRank]], blending: Blending) -> list[Change]:
    """The updates with their weights; or their blend, where a rule needs all of them."""
    if blending.rule == "linear" or not updates:
        return [replace(update, scaling=update.scaling * weighted.weight) for weighted, update in updates]
    blend = Blend(
        updates=tuple(update for _, update in updates),
        weights=tuple(weighted.weight for weighted, _ in updates),
        rule=blending.rule,
        density=blending.density,
        seeds=tuple(_seed(blending.seed, weighted.adapter, name) for weighted, _ in updates),
    )
    return [blend]


def _refuse_dora(adapters: Sequence[Weighted]) -> None:
    for weighted in adapters:
        if any(isinstance(change, LowRank) and change.magnitude is not None for change in weighted.adapter.changes):
            raise AdapterError(
                f"{weighted.adapter.path}: a DoRA adapter can't be weighted or combined with others: its norm depends"
                " on the weight it is added to"
            )


def _same_values(change: Replacement | Rows, other: Replacement | Rows) -> bool:
    if isinstance(change, Replacement) and isinstance(other, Replacement):
        return np.array_equal(change.value, other.value)
    if isinstance(change, Rows) and isinstance(other, Rows):
        return change.rows == other.rows and np.array_equal(change.values, other.values)
    return False


def _seed(seed: int, adapter: Adapter, name: str) -> int:
    """A seed of its own for each adapter and tensor, whatever the order of either."""
    return int.from_bytes(hashlib.sha256(f"{seed} {adapter.sha256} {name}".encode()).digest()[:8], "little")

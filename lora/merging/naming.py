"""From the names that an adapter gives to modules to the parameters of a base.

Usually they are the same. An adapter of a part of the model lacks what stands before that part's names, one of a model
with a head bears a prefix that the body alone lacks, and kohya's names have their dots flattened. A renaming is taken
only where one alone fits: the first that fits may be another part of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lora.adapter import Adapter, Blend, Change, Replacement
from lora.bases.structure import BaseStructure, Parameter
from lora.errors import AdapterError

STRIPPED = 3  # parts of a name that are tried to be left out


@dataclass(frozen=True)
class Renaming:
    """Takes ``strip`` from the front of a name and puts ``add`` there; or looks a flattened name up in ``table``."""

    strip: str = ""
    add: str = ""
    table: dict[str, str] | None = field(default=None, hash=False)

    def __call__(self, name: str) -> str:
        """The base's name for the adapter's."""
        if self.table is not None:
            return self.table.get(name, name)
        return self.add + name.removeprefix(self.strip)


def renaming(adapter: Adapter, structure: BaseStructure, fits: Callable[[Renaming], bool]) -> Renaming:
    """The one renaming under which every module of the adapter is in the base; ``fits`` tells whether shapes agree.

    Without any, names stay as they are, for the caller to say which has no place. Raises AdapterError when several fit
    that mean different tensors.
    """
    if adapter.spelling == "flattened":
        return Renaming(table=_unflattened(adapter, structure))
    named = [change for change in adapter.changes if not isinstance(change, Replacement | Blend)]
    as_it_is = Renaming()
    if _reached(named, structure, as_it_is) is not None:
        return as_it_is
    found = _fitting(named, structure, fits)
    if len(found) > 1:
        parts = sorted(reached[0] for reached in found)
        raise AdapterError(
            f"{adapter.path}: its module '{named[0].module}' may be {' or '.join(map(repr, parts))} of the base, and"
            " the file does not say which; give the part's own checkpoint as the base, or an adapter that names its"
            " class (auto_mapping in adapter_config.json)"
        )
    return next(iter(found.values()), as_it_is)


def _fitting(
    named: Sequence[Change], structure: BaseStructure, fits: Callable[[Renaming], bool]
) -> dict[tuple[str, ...], Renaming]:
    """{the tensors that are reached: how}. Names that lack their beginning come first, then those that have one too
    many, then those that have another: what keeps more of a name says more.
    """
    candidates = list(_candidates(named, structure))
    for kind in (
        [one for one in candidates if not one.strip],
        [one for one in candidates if one.strip and not one.add],
        [one for one in candidates if one.strip and one.add],
    ):
        found: dict[tuple[str, ...], Renaming] = {}
        for candidate in kind:
            reached = _reached(named, structure, candidate)
            if reached is not None:
                found.setdefault(reached, candidate)
        if found:
            return {reached: one for reached, one in found.items() if fits(one)} or found
    return {}


def parameter_names(change: Change, rename: Renaming) -> list[str]:
    """The names that the change's parameter may have."""
    assert not isinstance(change, Replacement | Blend)
    module = rename(change.module)
    return [f"{module}.{parameter}" if module else parameter for parameter in change.parameters]


def _reached(named: Sequence[Change], structure: BaseStructure, rename: Renaming) -> tuple[str, ...] | None:
    """The stored tensors that the changes are for, under this renaming; None where one has none."""
    reached = []
    for change in named:
        found = next(filter(None, map(structure.find, parameter_names(change, rename))), None)
        if found is None:
            return None
        reached.append(_identity(found) or parameter_names(change, rename)[0])
    return tuple(reached)


def _identity(parameter: Parameter) -> str:
    return parameter.stored[0].name if parameter.stored else ""


def _candidates(named: Sequence[Change], structure: BaseStructure) -> Iterator[Renaming]:
    """Without some leading parts of the name, and with what the base has before the rest."""
    if not named:
        return
    first = named[0]
    assert not isinstance(first, Replacement | Blend)
    for strip in _leading_parts(first.module):
        rest = first.module.removeprefix(strip)
        endings = tuple(f"{rest}.{parameter}" if rest else parameter for parameter in first.parameters)
        for add in sorted(set(_before(endings, (*structure.parameters, *structure.aliases)))):
            yield Renaming(strip, add)


def _leading_parts(name: str) -> Iterator[str]:
    """Nothing, the first part with its dot, the first two ..."""
    parts = name.split(".")
    for count in range(min(STRIPPED, len(parts) - 1) + 1):
        yield "".join(f"{part}." for part in parts[:count])


def _before(endings: tuple[str, ...], names: Iterable[str]) -> Iterator[str]:
    """What stands before the ending in the names that have it, up to a dot."""
    for name in names:
        for ending in endings:
            if name == ending or name.endswith("." + ending):
                yield name.removesuffix(ending)


def _unflattened(adapter: Adapter, structure: BaseStructure) -> dict[str, str]:
    """{name with dots as underscores: module} for the base's modules; an ambiguous name that is used is an error."""
    table: dict[str, str] = {}
    ambiguous = set()
    for name in (*structure.parameters, *structure.aliases):
        module = name.rpartition(".")[0]
        flat = module.replace(".", "_")
        if table.setdefault(flat, module) != module:
            ambiguous.add(flat)
    for change in adapter.changes:
        if not isinstance(change, Replacement | Blend) and change.module in ambiguous:
            raise AdapterError(
                f"{adapter.path}: '{change.module}' stands for several modules of the base; save the adapter with"
                " dotted names"
            )
    return table

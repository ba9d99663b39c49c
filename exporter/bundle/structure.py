"""What a bundle knows of its base's parameters: the kind of each, kept in a file of its own.

The weights of a bundle stand under the parameters' own names, each as a whole, whatever the checkpoint calls them and
however it cuts them. Heads over one base share the body and differ in the head, so one file holds the parameters of all
of them; the shapes, and what has values, are those of the graphs that are read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from exporter.bundle.layout import WeightMap
from exporter.bundle.manifest import Bundle
from exporter.bundle.records import File, Weight
from exporter.bundle.staging import named_by_content
from lora.bases.structure import BaseStructure, Parameter, Piece, from_json
from lora.errors import LorafuseError

TOWERS = ("text", "vision")


def read_structure(bundle: Bundle) -> BaseStructure | None:
    """The structure that the bundle keeps; None of one that has none: an older one, or one of a Python module.

    Raises BundleError where its file is damaged, CheckpointError where it is no structure.
    """
    file = bundle.manifest.base.structure
    return None if file is None else from_json(bundle.content(file), bundle.path / file.path)


def of_parameters(structure: BaseStructure) -> BaseStructure:
    """The structure of the same model where each parameter is stored as itself, whole."""
    homes = {piece.name: name for name, parameter in structure.parameters.items() for piece in parameter.stored}
    parameters = {name: _as_itself(name, parameter) for name, parameter in structure.parameters.items()}
    aliases = {
        alias: parameters[homes[alias]]
        for alias, parameter in structure.aliases.items()
        if alias not in parameters and parameter is structure.parameters[homes[alias]]
    }
    return replace(structure, parameters=parameters, aliases=aliases)


def joined(known: BaseStructure | None, found: BaseStructure | None) -> BaseStructure | None:
    """The parameters of both: of models with one body, and each its head."""
    if known is None or found is None:
        return known or found
    models = dict.fromkeys((*known.model.split(", "), *found.model.split(", ")))
    return replace(
        known,
        model=", ".join(sorted(models)),
        parameters={**known.parameters, **found.parameters},
        tied=tuple(sorted({*known.tied, *found.tied})),
        prefix=known.prefix or found.prefix,
        aliases={**known.aliases, **found.aliases},
    )


def of_graphs(known: BaseStructure | None, weights: WeightMap, held: Collection[str]) -> BaseStructure | None:
    """The structure of the model that these graphs' ``weights`` are of, of which the base has values of ``held``.

    A parameter that no file of the bundle says the kind of is read by the adapter's own word.
    """
    if known is None:
        return None
    partners = {name for group in known.tied if weights.keys() & set(group) for name in group} - weights.keys()
    parameters = {
        name: replace(parameter, stored=()) if name in partners else parameter
        for name, parameter in known.parameters.items()
    }
    for name, weight in weights.items():
        kind = known.parameters[name].kind if name in known.parameters else "flagged"
        parameters[name] = Parameter(kind, _shape(weight), (Piece(name),) if name in held else ())
    aliases = {alias: parameters[parameter.stored[0].name] for alias, parameter in known.aliases.items()}
    return replace(known, parameters=parameters, aliases={name: one for name, one in aliases.items() if one.stored})


def of_class(structure: BaseStructure | None, model_class: str | None) -> BaseStructure | None:
    """Of a model of two towers the one whose class an adapter names: the layers of both are called the same."""
    towers = towers_of_class(model_class)
    if structure is None or not towers:
        return structure
    others = tuple(f"{tower}_model." for tower in TOWERS if tower not in towers)
    parameters, aliases = (
        {name: parameter for name, parameter in names.items() if not name.startswith(others)}
        for names in (structure.parameters, structure.aliases)
    )
    return replace(structure, parameters=parameters, aliases=aliases)


def towers_of_class(model_class: str | None) -> set[str]:
    """The towers whose class this is, as CLIPTextModel is the text's; none of any other class."""
    return {tower for tower in TOWERS if f"{tower.capitalize()}Model" in (model_class or "")}


def unread(structure: BaseStructure | None, names: Iterable[str], weights: WeightMap) -> frozenset[str]:
    """Of these parameters those that the model has and no graph reads, so that no output depends on them (the pooler
    of an encoder whose decoder reads its hidden states). A tied one is not among them: its partner is read.
    """
    if structure is None:
        return frozenset()
    return frozenset(
        name
        for name in names
        if name not in weights and (known := structure.parameters.get(name)) is not None and known.stored
    )


def staged_structure(stage: Path, current: Bundle | None, found: BaseStructure | None) -> File | None:
    """The file of what the current bundle knows and of what was found; a new one is staged where they differ."""
    held = None if current is None else current.manifest.base.structure
    if found is None:
        return held
    known = None
    if current is not None:
        with suppress(LorafuseError):  # a damaged one is written anew
            known = read_structure(current)
    together = joined(known, found)
    assert together is not None
    if together == known:
        return held
    (stage / "base").mkdir(exist_ok=True)
    path = stage / "base" / "structure.json"
    path.write_bytes(together.to_json())
    file = named_by_content(path, "structure")
    return File(f"base/{file.path}", file.size, file.sha256)


def _as_itself(name: str, parameter: Parameter) -> Parameter:
    return Parameter(parameter.kind, parameter.shape, (Piece(name),))


def _shape(weight: Weight) -> tuple[int, ...]:
    """In the model's order of axes."""
    if weight.order is None:
        return weight.shape
    return tuple(weight.shape[axis] for axis in np.argsort(weight.order))

"""Tied tensors of which one changes: from then on each is stored by itself.

transformers ties what the file leaves out, and does not tie two that are both there and differ. So every tensor of a
group that a merge parts is written, the unchanged ones with the base's values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lora.adapter import Change, Replacement, Rows
from lora.bases.checkpoint import INPUT_EMBEDDINGS, OUTPUT_EMBEDDING
from lora.bases.opening import Base
from lora.bases.structure import BaseStructure, of_names
from lora.errors import AdapterError
from lora.files.tensorfile import Array
from lora.merging.layouts import INSTALL
from lora.merging.merge import Targets


@dataclass(frozen=True)
class Untying:
    """``copies`` is {a tensor that is to be written too: the stored one whose values it has}.

    ``targets`` are those that are merged: of a group that is replaced by the same values, one. ``parted`` says whether
    any group is parted, and ``flag`` whether the configuration has to say so.
    """

    targets: Targets
    copies: Mapping[str, str] = field(default_factory=dict)
    parted: bool = False
    flag: bool = False


def untying(base: Base, targets: Targets, source: object) -> Untying:
    """Which tied groups of the base the changes part.

    Raises AdapterError where a tied embedding changes and nothing here says what the model ties to it.
    """
    structure = base.structure if base.structure is not None else of_names(base.tensors, "flagged")
    _refuse_unknown(base, structure, targets, source)
    groups = [_stored_names(structure, group) for group in structure.tied]
    parted = [group for group in groups if _parts(group, targets) and not _agrees(group, targets)]
    if not parted:
        repeated = {name for group in groups if _agrees(group, targets) for name in group[1:]}
        return Untying({name: changes for name, changes in targets.items() if name not in repeated})
    # With the flag, transformers ties nothing any more: then every group is written out.
    written = groups if structure.flag_unties else parted
    tied = base.tensors.tied
    copies = {name: tied[name] for group in written for name in group if name in tied and name not in targets}
    return Untying(targets, copies, True, structure.flag_unties)


def _stored_names(structure: BaseStructure, group: Sequence[str]) -> tuple[str, ...]:
    """The tensors of a group as the merge calls them: by their names on the disk, where they are stored."""
    return tuple(structure.stored_name(name) for name in group)


def _parts(group: Sequence[str], targets: Targets) -> bool:
    """Whether the group's tensors differ afterwards. Trained tokens stay tied, as they were trained."""
    return any(name in targets and not all(isinstance(change, Rows) for change in targets[name]) for name in group)


def _agrees(group: Sequence[str], targets: Targets) -> bool:
    """Whether all of the group are replaced by the very same values: then it stays one tensor."""
    first, *others = (_replaced_by(targets.get(name, ())) for name in group)
    return first is not None and all(other is not None and np.array_equal(other, first) for other in others)


def _replaced_by(changes: Sequence[Change]) -> Array | None:
    return changes[0].value if len(changes) == 1 and isinstance(changes[0], Replacement) else None


def _refuse_unknown(base: Base, structure: BaseStructure, targets: Targets, source: object) -> None:
    """An embedding of a model that nobody here knows may be tied by the configuration, or by the class."""
    unknown = not structure.model and any(parameter.kind == "unknown" for parameter in structure.parameters.values())
    if not unknown or not base.config.get("tie_word_embeddings", True):
        return
    for name, changes in targets.items():
        embedding = name.endswith(INPUT_EMBEDDINGS) or name == OUTPUT_EMBEDDING
        if embedding and not all(isinstance(change, Rows) for change in changes):
            raise AdapterError(
                f"{source}: changes the embedding '{name}', and nothing here says which tensors this model"
                f" ({base.config.get('model_type')}) ties to it; {INSTALL}"
            )

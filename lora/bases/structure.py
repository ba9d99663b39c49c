"""What a base is: for every parameter of its model the kind of its module, and where its values are stored.

Names in files say neither how a matrix lies in memory, nor what is tied, nor what transformers calls a tensor when it
loads the file. This value says it. It comes from ``lora.bases.architectures`` (written down, for common models), or
from a caller that has transformers; and it is plain enough to be kept as JSON beside what was made from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec

from lora.errors import CheckpointError
from lora.files.tensorfile import Array, shape_of

# The kind of the module that owns a parameter. Of matrices:
#   linear, attention (a fused input projection)   stored (out, in)
#   conv1d (transformers' Conv1D), embedding       stored (in, out)
#   convolution                                    stored (out, in / groups, kernel ...)
#   experts, experts_transposed                    stored (experts, out, in), (experts, in, out)
#   unknown                                        nothing says it: what could be read in two ways is refused
#   flagged                                        nothing says it: the adapter's own word is taken
Kind = Literal[
    "linear",
    "conv1d",
    "embedding",
    "convolution",
    "attention",
    "experts",
    "experts_transposed",
    "norm",
    "other",
    "unknown",
    "flagged",
]
Bounds = tuple[int, int]  # start and stop along one axis


@dataclass(frozen=True)
class Piece:
    """A stored tensor, and which part of a parameter it holds.

    ``inside`` bounds the parameter's leading axes, ``of`` those of the stored tensor; empty means all of it. An expert
    that is stored by itself has its index as the first of ``inside``, and the stored tensor lacks that axis.
    """

    name: str
    inside: tuple[Bounds, ...] = ()
    of: tuple[Bounds, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether the stored tensor is the parameter."""
        return not self.inside and not self.of


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model: ``stored`` is where its values are, nowhere for a new head or a tied partner.

    ``converted`` names a conversion on loading that can't be undone here; such a parameter can't be changed.
    """

    kind: Kind
    shape: tuple[int, ...]
    stored: tuple[Piece, ...] = ()
    converted: str = ""


@dataclass(frozen=True)
class BaseStructure:
    """The parameters of ``model`` (a class of transformers; empty where none is known) by the module's names.

    ``tied`` are the groups of parameters that share one tensor. ``flag_unties`` says whether the configuration's
    ``tie_word_embeddings: false`` parts them and does nothing else. ``complete`` says whether ``parameters`` are all
    that the model has: then what is not among them has no place. ``prefix`` is what models with a head put before
    the names of the body.
    """

    model: str
    parameters: Mapping[str, Parameter]
    tied: tuple[tuple[str, ...], ...] = ()
    flag_unties: bool = True
    complete: bool = False
    prefix: str = ""
    aliases: Mapping[str, Parameter] = field(default_factory=dict, compare=False)

    def find(self, name: str) -> Parameter | None:
        """The parameter of this name in the module; or on the disk, as adapters of older versions spell it."""
        return self.parameters.get(name) or self.aliases.get(name)

    def stored_name(self, name: str) -> str:
        """The name under which a parameter's tensor is read: its own, or a tied partner's."""
        parameter = self.parameters.get(name)
        return parameter.stored[0].name if parameter is not None and parameter.stored else name

    def shared(self) -> dict[str, str]:
        """{a tied parameter that is not stored: the stored tensor that holds its values}."""
        found: dict[str, str] = {}
        for group in self.tied:
            homes = [self.stored_name(name) for name in group if self._is_stored(name)]
            found |= {name: homes[0] for name in group if homes and not self._is_stored(name)}
        return found

    def to_json(self) -> bytes:
        """As JSON: the same structure gives the same bytes."""
        parameters, aliases = (dict(sorted(names.items())) for names in (self.parameters, self.aliases))
        return msgspec.json.encode(replace(self, parameters=parameters, aliases=aliases))

    def _is_stored(self, name: str) -> bool:
        parameter = self.parameters.get(name)
        return parameter is not None and bool(parameter.stored)


def from_json(content: bytes, source: object) -> BaseStructure:
    """The structure in ``content``, found in ``source``. Raises CheckpointError when it is none."""
    try:
        return msgspec.json.decode(content, type=BaseStructure)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{source}: not the structure of a base ({error}); export the base again") from error


def with_aliases(structure: BaseStructure) -> BaseStructure:
    """The structure, its parameters also found by their names on the disk."""
    aliases: dict[str, Parameter] = {}
    for parameter in structure.parameters.values():
        for piece in parameter.stored:
            if piece.whole:
                aliases[piece.name] = parameter
            elif piece.inside and not piece.of:
                aliases[piece.name] = _as_stored(parameter, piece)
    return replace(structure, aliases=aliases)


def of_names(tensors: Mapping[str, Array], kind: Kind) -> BaseStructure:
    """What names and shapes alone say: every tensor is a parameter, and ``kind`` says whom to believe of the rest."""
    tied: Mapping[str, str] = getattr(tensors, "tied", {})
    parameters = {name: Parameter(kind, shape_of(tensors, name), (Piece(name),)) for name in all_names(tensors)}
    return BaseStructure("", parameters, tuple((home, name) for name, home in sorted(tied.items())))


def all_names(tensors: Mapping[str, Array]) -> Iterable[str]:
    """The names of all tensors, those of tied ones too."""
    return (*tensors, *getattr(tensors, "tied", {}))


def _as_stored(parameter: Parameter, piece: Piece) -> Parameter:
    """A part that is stored by itself, such as one expert's matrix."""
    sizes = [stop - start for start, stop in piece.inside]
    shape = (*sizes, *parameter.shape[len(sizes) :])
    if parameter.kind in ("experts", "experts_transposed"):
        kind: Kind = "linear" if parameter.kind == "experts" else "conv1d"
        return Parameter(kind, shape[1:], (Piece(piece.name),))
    return Parameter(parameter.kind, shape, (Piece(piece.name),))

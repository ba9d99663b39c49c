"""What a task was made of: its adapters, how each file is read, and how they are combined.

One adapter in PEFT's format, as it was trained, says all of it by itself. Anything else has a ``recipe.json`` beside
the adapters' files: a loralib file does not say its alpha, and no file says the weight that it is combined with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import msgspec

from exporter.bundle.structure import of_class
from lora.adapter import Adapter, Change
from lora.bases.structure import BaseStructure
from lora.errors import AdapterError
from lora.files.mapped import MappedFile
from lora.files.tensorfile import Array
from lora.formats.read import ReadOptions, read_adapter_files
from lora.merging.several import Blending, Weighted, combined

RECIPE = "recipe.json"


class _Ingredient(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    files: tuple[str, ...]
    weight: float


class _Written(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    adapters: tuple[_Ingredient, ...]
    options: ReadOptions
    blending: Blending


@dataclass(frozen=True)
class Recipe:
    """The adapters with their weights, in an order that does not depend on how they were given."""

    adapters: tuple[Weighted, ...]
    options: ReadOptions = field(default_factory=ReadOptions)
    blending: Blending = field(default_factory=Blending)

    @property
    def adapter(self) -> Adapter:
        """All of them as one, for what does not depend on weights: which modules change, and which head they have.

        Raises AdapterError where they were trained for different tasks.
        """
        if len(self.adapters) == 1:
            return self.adapters[0].adapter
        read = [weighted.adapter for weighted in self.adapters]
        first, *others = read
        for other in others:
            if other.task_type != first.task_type:
                raise AdapterError(
                    f"{other.path}: was trained for {other.task_type}, and {first.path} for {first.task_type}; combine"
                    " adapters of one kind of task"
                )
        return Adapter(
            path=Path(self.name),
            format="several",
            files=tuple(file for one in read for file in one.files),
            sha256=self.sha256,
            changes=tuple(change for one in read for change in one.changes),
            task_type=first.task_type,
            model_class=next((one.model_class for one in read if one.model_class), None),
        )

    @property
    def name(self) -> str:
        """What messages call it."""
        return ", ".join(str(weighted.adapter.path) for weighted in self.adapters)

    @property
    def skipped(self) -> tuple[str, ...]:
        """The components of the adapters' files that were not chosen."""
        return tuple(sorted({name for weighted in self.adapters for name in weighted.adapter.skipped}))

    @property
    def replaced(self) -> frozenset[str]:
        """The tensors that the adapters bring whole, as they call them."""
        return frozenset(name for weighted in self.adapters for name in weighted.adapter.replaced)

    @property
    def plain(self) -> bool:
        """Whether the adapter says all by itself, or there is none."""
        if not self.adapters:
            return True
        first = self.adapters[0]
        return len(self.adapters) == 1 and first.weight == 1 and first.adapter.format == "PEFT"

    @property
    def sha256(self) -> str:
        """Identifies what the task was made of; empty for the unadapted base."""
        hashes = [weighted.adapter.sha256 for weighted in self.adapters]
        if self.plain:
            return "".join(hashes)
        return hashlib.sha256(self.written() + " ".join(hashes).encode()).hexdigest()

    def targets(self, base: Mapping[str, Array], structure: BaseStructure | None) -> dict[str, list[Change]]:
        """{parameter: its changes} of all adapters together. Raises AdapterError as a merge does."""
        return combined(base, self.adapters, self.blending, lambda one: of_class(structure, one.model_class))

    def places(self) -> Iterator[tuple[str, Path]]:
        """(place below the task's folder, file) of the adapters' files; those of several in a folder for each."""
        for index, weighted in enumerate(self.adapters):
            for file in weighted.adapter.files:
                yield _place(index, len(self.adapters), file.name), file

    def written(self) -> bytes:
        """The recipe as JSON: the same recipe gives the same bytes."""
        count = len(self.adapters)
        ingredients = tuple(
            _Ingredient(tuple(_place(index, count, file.name) for file in one.adapter.files), one.weight)
            for index, one in enumerate(self.adapters)
        )
        written = _Written(ingredients, self.options, self.blending)
        return msgspec.json.format(msgspec.json.encode(written), indent=1) + b"\n"


def ordered(adapters: Sequence[Weighted]) -> tuple[Weighted, ...]:
    """By their hashes and weights."""
    return tuple(sorted(adapters, key=lambda one: (one.adapter.sha256, one.weight)))


def read_recipe(files: Sequence[MappedFile]) -> Recipe:
    """The recipe in the files of a task, which are in memory.

    Raises AdapterError where a file is missing or of no adapter, or the recipe can't be read.
    """
    if not files:
        return Recipe(())
    recipe = next((file for file in files if file.path.name == RECIPE), None)
    if recipe is None:
        return Recipe((Weighted(read_adapter_files(files[0].path.parent, files)),))
    written = _parsed(recipe)
    folder = recipe.path.parent
    by_place = {file.path.relative_to(folder).as_posix(): file for file in files if file.path.is_relative_to(folder)}
    adapters = []
    for ingredient in written.adapters:
        absent = [place for place in ingredient.files if place not in by_place]
        if absent or not ingredient.files:
            raise AdapterError(
                f"{recipe.path}: names '{', '.join(absent)}', which is no file of the task; export the task again"
            )
        own = [by_place[place] for place in ingredient.files]
        adapters.append(Weighted(read_adapter_files(own[0].path.parent, own, written.options), ingredient.weight))
    return Recipe(tuple(adapters), written.options, written.blending)


def _parsed(recipe: MappedFile) -> _Written:
    try:
        return msgspec.json.decode(bytes(recipe.content), type=_Written)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise AdapterError(f"{recipe.path}: not the recipe of a task ({error}); export the task again") from error


def _place(index: int, count: int, name: str) -> str:
    return name if count == 1 else str(PurePosixPath(str(index + 1), name))

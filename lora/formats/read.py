"""Reading an adapter of whichever format: its files and the shape of its keys tell which, and nothing is guessed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from lora.adapter import Adapter
from lora.errors import AdapterError
from lora.files.mapped import MappedFile
from lora.formats import diffusers, peft
from lora.formats.factors import PICKLES, open_factors
from lora.formats.kohya import read_kohya
from lora.formats.loralib import read_loralib

Format = Literal["PEFT", "diffusers", "kohya", "loralib"]

_COMPONENT = diffusers.COMPONENT.pattern
# What a key of each format looks like; those that say nothing (a bias, an alpha) are for the format's reader to judge.
KEYS: dict[Format, re.Pattern[str]] = {
    "PEFT": re.compile(r"base_model\.model\."),
    "diffusers": re.compile(
        rf"({_COMPONENT}|{diffusers.OF_FLUX.pattern}).*"
        r"(\.lora_[AB]\.weight|\.(lora\.|lora_|lora_linear_layer\.|to_\w+_lora\.)(down|up)\.weight)$"
    ),
    "kohya": re.compile(r"lora_[a-z]+[0-9]*_[^.]*\."),
    "loralib": re.compile(r"(.*\.)?lora_[AB]$"),
}
UNDERSTOOD = (
    f"a folder with {peft.CONFIG} (PEFT), {diffusers.WEIGHTS} or a file with keys such as unet.<module>.lora_A.weight"
    " (diffusers), lora_unet_<module>.lora_down.weight (kohya) or <module>.lora_A (loralib)"
)
TENSOR_SUFFIXES = (".safetensors", *PICKLES)


@dataclass(frozen=True)
class ReadOptions:
    """What a file may leave unsaid. ``component`` is for kohya and diffusers, the others are for loralib."""

    alpha: float | None = None
    component: str | None = None
    enable_lora: tuple[bool, ...] | None = None
    fan_in_fan_out: bool | None = None


APPLIES: dict[Format, frozenset[str]] = {
    "PEFT": frozenset(),
    "diffusers": frozenset({"component"}),
    "kohya": frozenset({"component"}),
    "loralib": frozenset({"alpha", "enable_lora", "fan_in_fan_out"}),
}


def read_adapter(path: Path, options: ReadOptions = ReadOptions()) -> Adapter:
    """Find the format of the file or folder ``path`` and read it.

    Raises AdapterError when the format is unknown or mixed, an option is not for it, or its reader refuses the file.
    """
    file = _tensors_of(path)
    found = _format(path, file)
    _check_options(path, found, options)
    return peft.read_peft(path) if found == "PEFT" else _read_file(file, found, options)


def read_adapter_files(folder: Path, files: Sequence[MappedFile], options: ReadOptions = ReadOptions()) -> Adapter:
    """Read an adapter from its files, which are in memory: whatever else lies in ``folder`` is no part of it.

    Raises AdapterError as ``read_adapter`` does, and when the files are not those of one adapter.
    """
    if len(files) != 1 or files[0].path.name in (peft.CONFIG, peft.WEIGHTS, peft.PICKLE):
        return peft.read_peft_files(folder, files)
    (file,) = files
    found = _format_of_file(file.path, file)
    _check_options(file.path, found, options)
    return _read_file(file, found, options)


def _read_file(file: Path | MappedFile, found: Format, options: ReadOptions) -> Adapter:
    match found:
        case "diffusers":
            return diffusers.read_diffusers(file, options.component)
        case "kohya":
            return read_kohya(file, options.component)
        case "loralib":
            return read_loralib(file, options.alpha, options.enable_lora, options.fan_in_fan_out)
        case "PEFT":
            raise AssertionError("a folder's format")


def _check_options(path: Path, found: Format, options: ReadOptions) -> None:
    given = {field.name for field in fields(options) if getattr(options, field.name) is not None}
    if given - APPLIES[found]:
        raise AdapterError(
            f"{path}: the option {min(given - APPLIES[found])} is not for a {found} adapter, which says it itself or"
            " has no use for it; leave it out"
        )


def _tensors_of(path: Path) -> Path:
    """The file with the tensors: ``path``, or that folder's, by diffusers' name for it or as the only one. A PEFT
    folder is its own.
    """
    if not path.exists():
        raise AdapterError(f"{path}: no such file or folder; expected {UNDERSTOOD}")
    if path.is_file() or (path / peft.CONFIG).exists():
        return path
    if (path / diffusers.WEIGHTS).exists():
        return path / diffusers.WEIGHTS
    files = sorted(file for file in path.iterdir() if file.suffix in TENSOR_SUFFIXES)
    if len(files) != 1:
        seen = ", ".join(file.name for file in files) or "no tensors"
        raise AdapterError(f"{path}: holds {seen} and no {peft.CONFIG}; give one file, or expected {UNDERSTOOD}")
    return files[0]


def _format(path: Path, file: Path) -> Format:
    if file.is_dir():
        if others := [name for name in (diffusers.WEIGHTS, diffusers.PICKLE) if (file / name).exists()]:
            raise AdapterError(
                f"{path}: holds {peft.CONFIG} (PEFT) and {others[0]} (diffusers); give the one of the two that is meant"
            )
        return "PEFT"
    return _format_of_file(path, file)


def _format_of_file(path: Path, file: Path | MappedFile) -> Format:
    names = open_factors(file)[0].names()
    found = [name for name, pattern in KEYS.items() if any(pattern.match(key) for key in names)]
    if len(found) != 1:
        seen = f"keys of {' and '.join(found)}" if found else f"keys such as '{names[0]}'"
        raise AdapterError(f"{path}: holds {seen}; expected {UNDERSTOOD}")
    if found == ["PEFT"]:
        raise AdapterError(
            f"{path}: holds the tensors of a PEFT adapter without their scaling; give the folder that has"
            f" {peft.CONFIG} too"
        )
    return found[0]

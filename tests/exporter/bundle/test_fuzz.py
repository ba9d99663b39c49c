"""Whatever happens to a bundle's bytes, ``bundle check`` finds it, and nothing else than a BundleError comes of a
manifest.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from exporter.bundle.check import check_bundle
from exporter.bundle.manifest import open_bundle
from exporter.bundle.manifest_file import MANIFEST
from exporter.bundle.records import MODEL, Engine, File, all_files, encode
from exporter.bundle.staging import describe
from lora.errors import BundleError
from scripts.support.hand_made_bundle import hand_made_bundle

FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small enough for hypothesis to play with: dense tasks, one of them with an engine, and one stored as factors."""
    opened = hand_made_bundle(tmp_path_factory.mktemp("fuzz") / "bundle")
    path, manifest = opened.path, opened.manifest
    (path / "engines").mkdir()
    (path / "engines/left.plan").write_bytes(b"a plan")
    left = manifest.tasks["left"]
    part = left.parts[MODEL]
    engine = Engine("tensorrt", "10", "8.9", part.model.sha256, "0" * 64, describe(path, "engines/left.plan"))
    part = msgspec.structs.replace(part, engines=(engine,))
    tasks = {**manifest.tasks, "left": msgspec.structs.replace(left, parts={MODEL: part})}
    (path / MANIFEST).write_bytes(encode(msgspec.structs.replace(manifest, tasks=tasks)))
    assert check_bundle(path) == []
    return path


@pytest.fixture(scope="module")
def files(bundle: Path) -> list[File]:
    """Every file that the manifest names."""
    return sorted(set(all_files(open_bundle(bundle).manifest)), key=lambda file: file.path)


@contextmanager
def changed(path: Path, change: Callable[[bytes], bytes]) -> Iterator[None]:
    """The file as ``change`` makes it, for a while."""
    before = path.read_bytes()
    path.write_bytes(change(before))
    try:
        yield
    finally:
        path.write_bytes(before)


def found(bundle: Path) -> list[str]:
    """The paths of all findings, each of which is told in one printable line."""
    findings = check_bundle(bundle)
    assert [finding for finding in findings if not finding.problem.isprintable()] == []
    return [finding.path for finding in findings]


# --- The files -----------------------------------------------------------------------------------------------------


@FUZZ
@given(st.data())
def test_any_flipped_bit_of_any_file_is_found(bundle: Path, files: list[File], data: st.DataObject):
    file = data.draw(st.sampled_from(files))
    place, bit = data.draw(st.integers(0, file.size - 1)), data.draw(st.integers(0, 7))
    with changed(bundle / file.path, lambda content: flipped(content, place, bit)):
        assert found(bundle) == [file.path]


def flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


@FUZZ
@given(st.data())
def test_any_other_length_of_any_file_is_found(bundle: Path, files: list[File], data: st.DataObject):
    file = data.draw(st.sampled_from(files))
    size = data.draw(st.integers(0, file.size + 64).filter(lambda size: size != file.size))
    with changed(bundle / file.path, lambda content: (content + bytes(64))[:size]):
        assert found(bundle) == [file.path]


INSTEAD: dict[str, Callable[[Path, Path], object]] = {
    "nothing": lambda path, away: None,
    "a folder": lambda path, away: path.mkdir(),
    "a link to it": lambda path, away: path.symlink_to(away),
}


@pytest.mark.parametrize("put", INSTEAD.values(), ids=INSTEAD)
def test_any_file_is_missed_whatever_is_in_its_place(
    bundle: Path, files: list[File], tmp_path: Path, put: Callable[[Path, Path], object]
):
    for file in files:
        path, away = bundle / file.path, tmp_path / "away"
        path.rename(away)
        put(path, away)
        try:
            assert found(bundle) == [file.path]
        finally:
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
            away.rename(path)


def test_any_two_files_that_changed_places_are_found(bundle: Path, files: list[File]):
    for one, other in pairwise(files):
        if one.sha256 != other.sha256:
            swap(bundle / one.path, bundle / other.path)
            assert found(bundle) == [one.path, other.path]
            swap(bundle / one.path, bundle / other.path)


def swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    other.replace(one)
    other.write_bytes(content)


names = st.binary(min_size=1, max_size=20).filter(
    lambda name: not set(b"/\0") & set(name) and name not in (b".", b"..")
)


@FUZZ
@given(names, st.sampled_from(["", "adapters", "base", "engines", "new"]), st.booleans())
def test_any_extra_file_or_link_of_any_name_is_found(bundle: Path, name: bytes, folder: str, link: bool):
    extra = bundle / folder / os.fsdecode(name)
    assume(not os.path.lexists(extra))
    extra.parent.mkdir(exist_ok=True)
    extra.symlink_to("/etc") if link else extra.write_bytes(b"")
    try:
        paths = found(bundle)
        assert len(paths) == 1
        assert paths[0] == extra.relative_to(bundle).as_posix() or not str(extra).isprintable()
    finally:
        extra.unlink()
        (bundle / "new").rmdir() if folder == "new" else None


# --- The manifest --------------------------------------------------------------------------------------------------


def followed(bundle: Path, files: list[File]) -> None:
    """A manifest is refused in one line, or leads to a finding, or names the same files; anything else is a bug."""
    paths = found(bundle)
    try:
        manifest = open_bundle(bundle).manifest
    except BundleError:
        assert paths == [MANIFEST]
    else:
        assert paths or set(all_files(manifest)) == set(files)


@FUZZ
@given(st.lists(st.tuples(st.integers(min_value=0), st.integers(0, 7)), min_size=1, max_size=3))
def test_bits_of_the_manifest_may_be_flipped(bundle: Path, files: list[File], flips: list[tuple[int, int]]):
    def flip(content: bytes) -> bytes:
        for place, bit in flips:
            content = flipped(content, place % len(content), bit)
        return content

    with changed(bundle / MANIFEST, flip):
        followed(bundle, files)


@FUZZ
@given(st.integers(min_value=0), st.integers(0, 40), st.binary(max_size=12))
def test_bytes_of_the_manifest_may_be_anything(bundle: Path, files: list[File], start: int, cut: int, noise: bytes):
    start %= (bundle / MANIFEST).stat().st_size
    with changed(bundle / MANIFEST, lambda content: content[:start] + noise + content[start + cut :]):
        followed(bundle, files)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The place of every value inside a JSON document."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


def at(content: Any, place: tuple) -> Any:
    for key in place:
        content = content[key]
    return content


@FUZZ
@given(st.data())
def test_values_of_the_manifest_may_be_anything_another_value_or_gone(
    bundle: Path, files: list[File], data: st.DataObject
):
    content = json.loads((bundle / MANIFEST).read_bytes())
    everywhere = st.sampled_from(list(places(content)))
    *parents, last = data.draw(everywhere)
    match data.draw(st.sampled_from(["anything", "another", "gone"])):
        case "anything":
            at(content, tuple(parents))[last] = data.draw(values)
        case "another":
            at(content, tuple(parents))[last] = copy.deepcopy(at(content, data.draw(everywhere)))
        case _:
            del at(content, tuple(parents))[last]
    with changed(bundle / MANIFEST, lambda _: json.dumps(content).encode()):
        followed(bundle, files)

"""Whatever happens to a bundle's bytes, ``bundle check`` finds it, and nothing else than a BundleError comes of a manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.bundle.check import check_bundle
from exporter.bundle.manifest import MANIFEST, all_files, open_bundle
from lora.errors import BundleError

FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def bundle(tiny_bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose large files are cut to what hypothesis can play with; its manifest agrees."""
    path = Path(shutil.copytree(tiny_bundle.path, tmp_path_factory.mktemp("fuzz") / "bundle"))
    content = json.loads((path / MANIFEST).read_text())
    base = content["base"]["weights"][0]
    (path / base["path"]).write_bytes(bytes(range(256)))
    base["size"], base["sha256"] = 256, "40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880"
    (path / MANIFEST).write_text(json.dumps(content))
    assert check_bundle(path) == []
    return path


@contextmanager
def changed(path: Path, change: Callable[[bytes], bytes]) -> Iterator[None]:
    """The file as ``change`` makes it, for a while."""
    before = path.read_bytes()
    path.write_bytes(change(before))
    try:
        yield
    finally:
        path.write_bytes(before)


@FUZZ
@given(st.data())
def test_any_flipped_bit_of_any_file_is_found(bundle: Path, data: st.DataObject):
    file = data.draw(st.sampled_from(sorted(all_files(open_bundle(bundle).manifest), key=lambda file: file.path)))
    place, bit = data.draw(st.integers(0, file.size - 1)), data.draw(st.integers(0, 7))

    def flip(content: bytes) -> bytes:
        return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]

    with changed(bundle / file.path, flip):
        assert [finding.path for finding in check_bundle(bundle)] == [file.path]


@FUZZ
@given(st.data())
def test_any_other_length_of_any_file_is_found(bundle: Path, data: st.DataObject):
    file = data.draw(st.sampled_from(sorted(all_files(open_bundle(bundle).manifest), key=lambda file: file.path)))
    size = data.draw(st.integers(0, file.size + 64).filter(lambda size: size != file.size))
    with changed(bundle / file.path, lambda content: (content + bytes(64))[:size]):
        assert [finding.path for finding in check_bundle(bundle)] == [file.path]


@FUZZ
@given(
    st.text("abcdefghijklmnopqrstuvwxyz0123456789.-_", min_size=1, max_size=20).filter(lambda name: name.strip(".") != ""),
    st.sampled_from(["", "adapters", "base"]),
)
def test_any_extra_file_is_found(bundle: Path, name: str, folder: str):
    extra = bundle / folder / name
    if extra.exists():
        return
    extra.write_bytes(b"")
    try:
        assert [finding.path for finding in check_bundle(bundle)] == [extra.relative_to(bundle).as_posix()]
    finally:
        extra.unlink()


def outcome(bundle: Path) -> str:
    """A manifest is opened or refused in one line; anything else is a bug."""
    try:
        open_bundle(bundle)
    except BundleError as error:
        assert "\n" not in str(error)
        assert check_bundle(bundle)
        return "refused"
    check_bundle(bundle)
    return "opened"


@FUZZ
@given(st.data())
def test_bytes_of_the_manifest_may_be_anything(bundle: Path, data: st.DataObject):
    size = (bundle / MANIFEST).stat().st_size
    start = data.draw(st.integers(0, size))
    noise = data.draw(st.binary(max_size=12))
    cut = data.draw(st.integers(0, 40))
    with changed(bundle / MANIFEST, lambda content: content[:start] + noise + content[start + cut :]):
        outcome(bundle)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=2), max_leaves=4)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@FUZZ
@given(st.data())
def test_values_of_the_manifest_may_be_anything(bundle: Path, data: st.DataObject):
    content = json.loads((bundle / MANIFEST).read_bytes())
    path = data.draw(st.sampled_from(list(places(content))[1:]))
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = data.draw(JSON)
    with changed(bundle / MANIFEST, lambda _: json.dumps(content).encode()):
        outcome(bundle)

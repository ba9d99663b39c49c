"""The bundle format, read as if a stranger had written it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import exporter.bundle.manifest
from exporter.bundle.manifest import Bundle, check_sha256, open_bundle
from exporter.bundle.manifest_file import check_task_name
from exporter.bundle.records import MODEL, SCHEMA, all_files, encode, task_files
from lora.errors import BundleError

Edit = Callable[[dict[str, Any]], object]


def edited(bundle: Path, edit: Edit) -> Path:
    """``bundle`` with its manifest's JSON changed by ``edit``."""
    path = bundle / "manifest.json"
    content = json.loads(path.read_bytes())
    edit(content)
    path.write_text(json.dumps(content))
    return bundle


def test_manifest_survives_writing_and_reading(tiny_copy: Path, tiny_bundle: Bundle):
    assert open_bundle(tiny_copy).manifest == tiny_bundle.manifest
    assert encode(open_bundle(tiny_copy).manifest) == (tiny_bundle.path / "manifest.json").read_bytes()


def test_encoding_does_not_depend_on_the_order_of_tasks(tiny_bundle: Bundle):
    manifest = tiny_bundle.manifest
    manifests = [json.loads(encode(manifest)) for _ in range(2)]
    manifests[1]["versions"] = dict(reversed(manifests[1]["versions"].items()))
    one, other = (encode(msgspec.convert(content, type(manifest))) for content in manifests)
    assert one == other


def test_manifest_names_every_file_of_the_bundle(tiny_bundle: Bundle):
    on_disk = {str(path.relative_to(tiny_bundle.path)) for path in tiny_bundle.path.rglob("*") if path.is_file()}
    assert {file.path for file in all_files(tiny_bundle.manifest)} | {"manifest.json"} == on_disk


def test_a_tasks_files_are_its_graph_its_tensors_and_its_adapter(tiny_bundle: Bundle):
    suffixes = [Path(file.path).suffix for file in task_files(tiny_bundle.task("first"))]
    assert suffixes == [".onnx", ".safetensors", ".json", ".safetensors"]


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path):
    with pytest.raises(BundleError, match=r"not a bundle .* create one with 'lorafuse export'"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("schema", [SCHEMA - 2, 0, -1])
def test_an_earlier_schema_is_refused_with_both_versions(tiny_copy: Path, schema: int):
    edited(tiny_copy, lambda content: content.update(schema=schema))
    with pytest.raises(
        BundleError,
        match=rf"schema {schema} is of an earlier lorafuse, and this one reads {SCHEMA}; export the tasks again",
    ):
        open_bundle(tiny_copy)


def test_the_last_schema_is_refused_with_the_command_that_upgrades_it(tiny_copy: Path):
    edited(tiny_copy, lambda content: content.update(schema=SCHEMA - 1))
    said = (
        f"{tiny_copy / 'manifest.json'}: schema {SCHEMA - 1} is of an earlier lorafuse, and this one reads {SCHEMA};"
        f" run 'lorafuse bundle upgrade {tiny_copy}'"
    )
    with pytest.raises(BundleError, match=rf"\A{re.escape(said)}\Z"):
        open_bundle(tiny_copy)


def test_a_newer_schema_is_refused_with_both_versions(tiny_copy: Path):
    edited(tiny_copy, lambda content: content.update(schema=SCHEMA + 1, something_new=[]))
    with pytest.raises(
        BundleError, match=rf"schema {SCHEMA + 1} is newer than this program reads \({SCHEMA}\); update lorafuse"
    ):
        open_bundle(tiny_copy)


def a_graph(content: dict[str, Any]) -> dict[str, Any]:
    return next(iter(content["graphs"].values()))


def a_part(content: dict[str, Any]) -> dict[str, Any]:
    return content["tasks"]["first"]["parts"]["model"]


def at(content: dict[str, Any], place: str) -> Any:
    for step in place.split("/") if place else ():
        content = content[int(step) if step.isdigit() else step]
    return content


# A field that may not be absent, by the place of what has it.
PLACES = {
    "": "base",
    "base": "longest",
    "base/weights/0": "sha256",
    "tasks/first": "parts",
    "tasks/first/parts/model": "graph",
    "tasks/first/parts/model/model": "size",
    "tasks/first/adapter/1": "path",
}


@pytest.mark.parametrize("place", PLACES)
def test_an_unknown_field_is_refused_by_name(tiny_copy: Path, place: str):
    edited(tiny_copy, lambda content: at(content, place).update(surprise=1))
    with pytest.raises(BundleError, match=r"manifest\.json: not a bundle's manifest \(.*surprise"):
        open_bundle(tiny_copy)


@pytest.mark.parametrize(("place", "field"), PLACES.items())
def test_an_absent_field_is_refused_by_name(tiny_copy: Path, place: str, field: str):
    edited(tiny_copy, lambda content: at(content, place).pop(field))
    with pytest.raises(BundleError, match=rf"not a bundle's manifest \(.*{field}"):
        open_bundle(tiny_copy)


def test_what_is_not_understood_is_told_in_printable_characters(tiny_copy: Path):
    edited(tiny_copy, lambda content: content.update({"\x1b[31m": 1}))
    with pytest.raises(BundleError, match=r"unknown field `\\x1b\[31m`"):
        open_bundle(tiny_copy)


BAD_PATHS = [
    "/etc/passwd",
    "..",
    "../x",
    "a/../../x",
    "a/..",
    "a\\..\\x",
    "",
    ".",
    "a\0b",
    "a\nb",
    "a\x1b[31mb",
    "manifest.json",
    "./manifest.json",
]


@pytest.mark.parametrize("path", BAD_PATHS)
@pytest.mark.parametrize(
    "place",
    [
        "base/weights/0",
        "base/files/1",
        "tasks/first/parts/model/model",
        "tasks/first/parts/model/weights",
        "tasks/first/adapter/0",
    ],
)
def test_a_path_that_leaves_the_bundle_is_its_manifest_or_unprintable_is_refused(
    tiny_copy: Path, place: str, path: str
):
    edited(tiny_copy, lambda content: at(content, place).update(path=path))
    with pytest.raises(BundleError, match="refusing to follow it"):
        open_bundle(tiny_copy)


LEADING_OUT = {"path": "../plan", "size": 1, "sha256": "0"}
ENGINE = {
    "backend": "b",
    "version": "1",
    "target": "t",
    "model_sha256": "0",
    "weights_sha256": "0",
    "file": LEADING_OUT,
}


@pytest.mark.parametrize(
    "add",
    [
        pytest.param(lambda content: a_part(content).update(engines=[ENGINE]), id="a task's engine"),
        pytest.param(lambda content: a_graph(content).update(engines=[ENGINE]), id="a graph's engine"),
        pytest.param(lambda content: content.update(timing_caches={"any": LEADING_OUT}), id="a timing cache"),
        pytest.param(lambda content: content["base"].update(structure=LEADING_OUT), id="the base's structure"),
    ],
)
def test_an_engines_path_is_held_to_the_same_rules(tiny_copy: Path, add: Callable[[Any], None]):
    edited(tiny_copy, add)
    with pytest.raises(BundleError, match=r"file path '\.\./plan' leaves the bundle"):
        open_bundle(tiny_copy)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda content: content["tasks"]["first"]["labels"].append("more"),
            "task 'first' has 3 labels, but its head has 2 outputs",
        ),
        (
            lambda content: content["base"].update(longest=-1),
            "the base's longest is -1; expected a number of tokens, or 0 for none",
        ),
        (
            lambda content: a_graph(content).update(outputs=[]),
            "… has no outputs; export its tasks again",
        ),
        (
            lambda content: a_graph(content)["head"].update(task_type="\x1b[31m"),
            "is of the task type '\\x1b[31m', which can't be printed",
        ),
        (
            lambda content: a_graph(content).update(part="Text tower"),
            "… is of the part 'Text tower', which is no name of a part; export its tasks again",
        ),
        (
            lambda content: a_graph(content).update(part="decoder"),
            "task 'first' has as its part 'model' a graph of the part 'decoder'; export the task again",
        ),
        (
            lambda content: content["tasks"]["first"].update(parts={}),
            "task 'first' has no parts; export the task again",
        ),
    ],
)
def test_what_no_reader_could_use_is_refused(tiny_copy: Path, edit: Edit, said: str):
    edited(tiny_copy, edit)
    with pytest.raises(BundleError, match=rf"manifest\.json: .*{re.escape(said)}"):
        open_bundle(tiny_copy)


@pytest.mark.parametrize("role", ["", "Model", "2nd", "vision-tower", "vision tower", "é", "model\n", "a" * 33])
def test_a_part_whose_name_can_not_stand_in_a_file_name_is_refused(tiny_copy: Path, role: str):
    def edit(content: dict[str, Any]) -> None:
        a_graph(content).update(part=role)
        content["tasks"]["first"].update(parts={role: a_part(content)})

    with pytest.raises(BundleError, match=rf"is of the part {re.escape(repr(role))}, which is no name of a part"):
        open_bundle(edited(tiny_copy, edit))


@pytest.mark.parametrize("role", ["vision", "text_encoder_2", "a" * 32])
def test_a_part_may_have_another_name_than_model(tiny_copy: Path, role: str):
    def edit(content: dict[str, Any]) -> None:
        a_graph(content).update(part=role)
        content["tasks"]["first"].update(parts={role: a_part(content)})

    assert list(open_bundle(edited(tiny_copy, edit)).task("first").parts) == [role]


TRANSPOSED = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize("order", [[0], [0, 0], [1, 2], [0, 1, 2], [-1, 0], []])
def test_an_order_that_is_none_of_the_weights_axes_is_refused(tiny_copy: Path, order: list[int]):
    edited(tiny_copy, lambda content: a_graph(content)["weights"][TRANSPOSED].update(order=order))
    said = f"… stores '{TRANSPOSED}' in an order of axes that its shape does not have; export its tasks again"
    with pytest.raises(BundleError, match=rf"manifest\.json: the graph '[0-9a-f]{{12}}'{re.escape(said)}\Z"):
        open_bundle(tiny_copy)


@pytest.mark.parametrize("integers", ["int4", "int8"])
def test_a_weight_that_is_stored_in_integers_is_refused_by_name(tiny_copy: Path, integers: str):
    stored = {"as": integers, "block": 32, "axis": 0}
    edited(tiny_copy, lambda content: a_graph(content)["weights"][TRANSPOSED].update(stored=stored))
    said = f"weight '{TRANSPOSED}' is stored as {integers}, which this version can't read; update lorafuse"
    with pytest.raises(BundleError, match=rf"manifest\.json: {re.escape(said)}\Z"):
        open_bundle(tiny_copy)


@pytest.mark.parametrize("stored", ["int4", None, {"as": "int3", "block": 32, "axis": 0}, {"as": "int4", "block": 32}])
def test_a_weight_that_is_stored_in_no_known_way_is_refused(tiny_copy: Path, stored: object):
    edited(tiny_copy, lambda content: a_graph(content)["weights"][TRANSPOSED].update(stored=stored))
    with pytest.raises(BundleError, match=r"not a bundle's manifest \(.*stored"):
        open_bundle(tiny_copy)


@pytest.mark.parametrize(("outputs", "labels"), [(2, []), (1, [])])
def test_a_task_needs_no_labels(tiny_copy: Path, outputs: int, labels: list[str]):
    def edit(content: dict[str, Any]) -> None:
        a_graph(content)["head"].update(outputs=outputs)
        content["tasks"]["first"].update(labels=labels)

    assert open_bundle(edited(tiny_copy, edit)).task("first").labels == ()


@pytest.mark.parametrize("name", ["../x", "base", "UPPER", ""])
def test_a_task_name_in_the_manifest_is_checked_too(tiny_copy: Path, name: str):
    edited(tiny_copy, lambda content: content["tasks"].update({name: content["tasks"].pop("first")}))
    with pytest.raises(BundleError, match="can't be used"):
        open_bundle(tiny_copy)


def test_a_task_whose_graph_is_not_there_is_refused(tiny_copy: Path):
    edited(tiny_copy, lambda content: a_part(content).update(graph="f" * 64))
    with pytest.raises(BundleError, match="task 'first' names the graph 'ffffffffffff'…, which the manifest lacks"):
        open_bundle(tiny_copy)


@pytest.mark.parametrize("name", ["movies", "a", "0", "a.b-c_d", "a" * 64])
def test_task_names_that_can_stand_in_a_file_name_are_taken(name: str):
    check_task_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../x",
        "a/b",
        ".hidden",
        "-option",
        "UPPER",
        "é",
        "a b",
        "a\n",
        "a" * 65,
        "base",
        "manifest",
        "adapters",
        "engines",
    ],
)
def test_task_names_that_can_not_are_refused_in_one_line(name: str):
    with pytest.raises(BundleError, match=r"\Atask name '[^\n]* can't be used[^\n]*\Z"):
        check_task_name(name)


def test_an_unknown_task_is_refused_with_those_there_are(tiny_bundle: Bundle):
    with pytest.raises(BundleError, match="no task 'second' in this bundle; it holds: first"):
        tiny_bundle.task("second")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    """The right content, but outside the bundle."""
    outside = path.parent.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "missing from the bundle"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "missing from the bundle"),
    "a link": (link, "missing from the bundle"),
    "shorter": (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes, but the manifest says"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes, but the manifest says"),
    "a flipped bit": (flip, "content does not match the manifest's SHA-256"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_refused_by_name(tiny_copy: Path, damage: Callable[[Path], object], words: str):
    bundle = open_bundle(tiny_copy)
    model = bundle.task("first").parts[MODEL].model
    damage(bundle.checked(model))
    with pytest.raises(BundleError, match=f"{model.path}: .*{words}.*; export the task again"):
        bundle.checked(model)


def test_a_file_is_hashed_again_only_when_it_may_have_changed(tiny_copy: Path, monkeypatch: pytest.MonkeyPatch):
    hashed: list[Path] = []
    monkeypatch.setattr(
        exporter.bundle.manifest, "check_sha256", lambda path, *rest: hashed.append(path) or check_sha256(path, *rest)
    )
    bundle = open_bundle(tiny_copy)
    model = bundle.task("first").parts[MODEL].model
    bundle.checked(model)
    bundle.checked(model)
    assert (
        len(hashed) == 2
    )  # it was written a moment ago, and may be written again before the file system's clock moves
    monkeypatch.setattr(exporter.bundle.manifest, "CLOCK_STEP", 0)
    bundle.checked(model)
    bundle.checked(model)
    assert len(hashed) == 3
    time.sleep(0.02)  # a step of the clock
    path, times = tiny_copy / model.path, (tiny_copy / model.path).stat()
    flip(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # a time that can be set does not hide it
    with pytest.raises(BundleError, match="content does not match"):
        bundle.checked(model)


def test_a_folder_that_is_a_link_is_refused(tiny_copy: Path, tmp_path: Path):
    (tiny_copy / "adapters").rename(tmp_path / "outside")
    (tiny_copy / "adapters").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match="adapters: a link"):
        open_bundle(tiny_copy)


def test_a_bundle_reached_through_a_link_is_a_bundle(tiny_copy: Path, tmp_path: Path):
    (tmp_path / "current").symlink_to(tiny_copy)
    assert open_bundle(tmp_path / "current").checked(open_bundle(tiny_copy).task("first").parts[MODEL].model).is_file()


def test_a_bundles_name_longer_than_the_system_takes_is_refused(tmp_path: Path):
    with pytest.raises(BundleError, match=r"a{300}: "):
        open_bundle(tmp_path / ("a" * 300))


def test_a_file_name_longer_than_the_system_takes_is_refused(tiny_copy: Path):
    bundle = open_bundle(edited(tiny_copy, lambda content: a_part(content)["model"].update(path="a" * 300)))
    with pytest.raises(BundleError, match="File name too long"):
        bundle.checked(bundle.task("first").parts[MODEL].model)
    with pytest.raises(BundleError, match="File name too long"):
        bundle.present(bundle.task("first").parts[MODEL].model)


def test_a_folder_name_longer_than_the_system_takes_is_refused(tiny_copy: Path):
    edited(tiny_copy, lambda content: a_part(content)["model"].update(path="a" * 300 + "/x"))
    with pytest.raises(BundleError, match="File name too long"):
        open_bundle(tiny_copy)


NO_MANIFESTS = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff",
    b'{"schema": "1"}',
    f'{{"schema": {SCHEMA}}}'.encode(),
    b'{"schema": 1e999}',
    f'{{"schema": {SCHEMA}, "x": '.encode() + b"[" * 100_000,
]


@pytest.mark.parametrize("content", NO_MANIFESTS, ids=lambda content: content[:20].decode(errors="replace"))
def test_what_is_no_manifest_is_refused(tiny_copy: Path, content: bytes):
    (tiny_copy / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json: not a bundle's manifest"):
        open_bundle(tiny_copy)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def places(value: object, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every value inside a JSON document."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in entries for found in [(*place, key), *places(inner, (*place, key))]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(st.data())
def test_a_mutated_manifest_opens_or_is_refused_and_nothing_else(
    tiny_bundle: Bundle, tmp_path: Path, data: st.DataObject
):
    content = json.loads((tiny_bundle.path / "manifest.json").read_bytes())
    *parents, last = data.draw(st.sampled_from(places(content)))
    parent = content
    for step in parents:
        parent = parent[step]
    value = parent.pop(last)
    match data.draw(st.sampled_from(["remove", "replace", "rename"])):
        case "replace":
            (
                parent.insert(last, data.draw(json_values))
                if isinstance(parent, list)
                else parent.update({last: data.draw(json_values)})
            )
        case "rename" if isinstance(parent, dict):
            parent[data.draw(st.text())] = value
    assert opens_or_refuses(tmp_path, json.dumps(content).encode())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(st.integers(min_value=0), st.integers(0, 40), st.binary(max_size=8))
def test_a_manifest_with_torn_bytes_opens_or_is_refused_and_nothing_else(
    tiny_bundle: Bundle, tmp_path: Path, start: int, length: int, inserted: bytes
):
    content = (tiny_bundle.path / "manifest.json").read_bytes()
    start %= len(content)
    assert opens_or_refuses(tmp_path, content[:start] + inserted + content[start + length :])


def opens_or_refuses(folder: Path, manifest: bytes) -> bool:
    (folder / "manifest.json").write_bytes(manifest)
    try:
        return isinstance(open_bundle(folder), Bundle)
    except BundleError as error:
        return "\n" not in str(error)


def test_reading_a_bundle_needs_neither_torch_nor_onnx(tiny_bundle: Bundle):
    program = (
        "import sys; from pathlib import Path; from exporter.bundle.manifest import open_bundle;"
        " open_bundle(Path(sys.argv[1])); print(*sys.modules)"
    )
    modules = subprocess.run(
        [sys.executable, "-c", program, tiny_bundle.path], check=True, capture_output=True, text=True
    ).stdout.split()
    assert {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "typer"}.isdisjoint(modules)
    assert "msgspec" in modules

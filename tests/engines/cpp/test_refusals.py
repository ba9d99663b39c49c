"""A damaged or hostile bundle is refused by both runtimes, in the same words."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from compiled import Built
from safetensors.numpy import load_file, save_file

import engines
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import MODEL
from exporter.task import add_task
from lora.errors import LorafuseError

Manifest = dict[str, Any]


def both_refuse(built: Built, bundle: Path, task: str = "first", **options: Any) -> str:
    """What both say; the C++ runtime under the sanitizers."""
    with pytest.raises(LorafuseError) as refused, engines.open(bundle, threads=1, **options) as runtime:
        runtime.run(task, {})
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert built.ask(bundle, "--task", task, "--ids", "101", *given, status=3) == f"lorafuse-ask: {refused.value}\n"
    return str(refused.value)


def task_file(bundle: Path) -> Path:
    weights = open_bundle(bundle).task("first").parts[MODEL].weights
    assert weights is not None
    return bundle / weights.path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def linked(path: Path) -> None:
    path.rename(path.with_suffix(".aside"))
    path.symlink_to(path.with_suffix(".aside"))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "a link": linked,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "shorter": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "a flipped bit": flip,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("which", ["weights", "model", "base"])
def test_a_damaged_file_is_named(built: Built, tiny_copy: Path, which: str, damage: Callable[[Path], object]):
    bundle = open_bundle(tiny_copy)
    paths = {
        "weights": task_file(tiny_copy),
        "model": tiny_copy / bundle.task("first").parts[MODEL].model.path,
        "base": tiny_copy / bundle.manifest.base.weights[0].path,
    }
    damage(paths[which])
    assert both_refuse(built, tiny_copy).startswith(f"{paths[which]}: ")


def edit(bundle: Path, change: Callable[[Manifest], object]) -> None:
    path = bundle / "manifest.json"
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def first(content: Manifest) -> Manifest:
    return content["tasks"]["first"]


def only(mapping: Manifest) -> Manifest:
    (value,) = mapping.values()
    return value


BASE = {"sha256": "0", "precision": "float32", "longest": 1, "vocabulary": 1, "weights": []}
ENGINE = {"backend": "b", "version": "1", "target": "t", "model_sha256": "0", "weights_sha256": "0"}
EDITS: dict[str, Callable[[Manifest], object]] = {
    "a newer schema": lambda content: content.update(schema=99),
    "an older schema": lambda content: content.update(schema=1),
    "no schema": lambda content: content.pop("schema"),
    "a schema of text": lambda content: content.update(schema="3"),
    "a missing field": lambda content: content["base"].pop("longest"),
    "an unknown field": lambda content: first(content).update(more=1),
    "a number for a text": lambda content: content["base"].update(sha256=7),
    "a text for a number": lambda content: first(content)["model"].update(size="7"),
    "a fraction for a number": lambda content: first(content)["model"].update(size=7.5),
    "a list for an object": lambda content: content.update(tasks=[]),
    "an object for a list": lambda content: first(content).update(labels={}),
    "a precision that there is not": lambda content: content["base"].update(precision="float8"),
    "a store that there is not": lambda content: first(content).update(store="both"),
    "an unknown graph": lambda content: first(content).update(graph="0" * 64),
    "a path upwards": lambda content: first(content)["model"].update(path="../model.onnx"),
    "an absolute path": lambda content: first(content)["weights"].update(path="/etc/passwd"),
    "no path": lambda content: content["base"]["weights"][0].update(path="./."),
    "the manifest itself": lambda content: content["base"]["files"][0].update(path="./manifest.json"),
    "a control character": lambda content: first(content)["model"].update(path="a\nb"),
    "a backslash": lambda content: first(content)["model"].update(path="a\\b"),
    "an engine's path upwards": (
        lambda content: first(content).update(
            engines={"b": ENGINE | {"file": {"path": "a/../../b", "size": 1, "sha256": "0"}}}
        )
    ),
    "an engine of an unknown mode": lambda content: first(content).update(engines={"b": ENGINE | {"mode": "magic"}}),
    "an engine with too little": lambda content: only(content["graphs"]).update(engines={"b": {"backend": "b"}}),
    "a timing cache upwards": lambda content: content.update(
        timing_caches={"k": {"path": "../b", "size": 1, "sha256": "0"}}
    ),
    "a label too many": lambda content: first(content)["labels"].append("more"),
    "a graph without outputs": lambda content: only(content["graphs"]).update(outputs=[]),
    "a negative length": lambda content: content["base"].update(longest=-1),
    "a task type that does not show": (
        lambda content: only(content["graphs"])["head"].update(task_type="SEQ\x1b[2J'_CLS")
    ),
    "an axis that is none": lambda content: only(content["graphs"])["weights"].update({"classifier.weight": ["a"]}),
    "a task name upwards": lambda content: content["tasks"].update({"../first": first(content)}),
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
def test_a_hostile_manifest_is_refused(built: Built, tiny_copy: Path, change: Callable[[Manifest], object]):
    edit(tiny_copy, change)
    both_refuse(built, tiny_copy)


def parts(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The place of everything in a document."""
    yield place
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from parts(value[key], (*place, key))


def changed(content: Manifest, place: tuple[str | int, ...], change: Callable[[Any, str | int], object]) -> Manifest:
    copied = inner = copy.deepcopy(content)
    for key in place[:-1]:
        inner = inner[key]
    change(inner, place[-1])
    return copied


VALUES = [None, True, -1, 7.5, "", "a/../b", "a" * 300 + "/b", "x\u061c\u2028", "a\\b'\"", [], [None], {}, {"a": 1}]


def test_whatever_is_wrong_in_a_manifest_is_said_in_the_same_words(built: Built, tiny_bundle: Bundle, tmp_path: Path):
    """Everything in it removed, and replaced by a value of each kind, one at a time."""
    content = json.loads((tiny_bundle.path / "manifest.json").read_bytes())
    file = {"path": "engines/b", "size": 1, "sha256": "0"}
    engine = ENGINE | {"file": file, "mode": "refit", "refittable": ["a"], "proven": {"a": "b"}}
    first(content)["engines"] = only(content["graphs"])["engines"] = {"b": engine}
    only(content["graphs"])["weights"] = {"a": None, "b": [1, 0]}
    content["timing_caches"] = {"k": file}
    places = [place for place in parts(content) if place]
    manifests = [changed(content, place, lambda inner, key: inner.pop(key)) for place in places]
    manifests += [
        changed(content, place, lambda inner, key, value=value: inner.__setitem__(key, value))
        for place in places
        for value in VALUES
    ]
    paths = [tmp_path / f"{number:04}" for number in range(len(manifests))]
    for path, manifest in zip(paths, manifests, strict=True):
        path.mkdir()
        (path / "manifest.json").write_text(json.dumps(manifest))
    found, wanted = built.probe("bundles", *paths).splitlines(), [opened_in_python(path) for path in paths]
    assert [pair for pair in zip(found, wanted, strict=True) if pair[0] != pair[1]] == []
    assert len({said.removeprefix(str(path)) for said, path in zip(found, paths, strict=True)}) > 100


def opened_in_python(path: Path) -> str:
    try:
        open_bundle(path)
    except LorafuseError as error:
        return str(error)
    return "whole"


def test_characters_that_do_not_show_are_those_that_python_escapes(built: Built, tmp_path: Path):
    """All that this Python's Unicode has assigned, in a path that is refused."""
    characters = "".join(char for char in map(chr, range(0x110000)) if unicodedata.category(char) not in ("Cn", "Cs"))
    manifest = {
        "schema": 3,
        "base": BASE | {"files": [{"path": f"/{characters}", "size": 1, "sha256": "0"}]},
        "graphs": {},
        "tasks": {},
        "versions": {},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert built.probe("bundles", tmp_path) == opened_in_python(tmp_path) + "\n"


@pytest.mark.parametrize("spelled", ["{}/", "{}//.", "{}/../bundle/"])
def test_a_bundles_path_is_shown_as_python_shows_it(built: Built, tiny_copy: Path, spelled: str):
    with pytest.raises(LorafuseError) as refused, engines.open(spelled.format(tiny_copy)) as runtime:
        runtime.run("nope", {})
    assert (
        built.ask(spelled.format(tiny_copy), "--task", "nope", "--ids", "1", status=3)
        == f"lorafuse-ask: {refused.value}\n"
    )


def test_a_weight_that_neither_has_is_named(built: Built, tiny_copy: Path, write_adapter):
    """Of two tasks in one session, ``less`` leaves alone what ``first`` changes; the base has lost one such tensor."""
    less = {
        f"base_model.model.bert.encoder.layer.{layer}.attention.self.value.lora_{part}.weight": None
        for layer in range(2)
        for part in "AB"
    }
    add_task(tiny_copy, write_adapter("less", tensors=less, config={"target_modules": ["query"]}), "less")
    weights = tiny_copy / open_bundle(tiny_copy).manifest.base.weights[0].path
    save_file(
        {
            name: values
            for name, values in load_file(weights).items()
            if ".layer.0.attention.self.value.weight" not in name
        },
        weights,
    )
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    edit(tiny_copy, lambda content: content["base"]["weights"][0].update(size=weights.stat().st_size, sha256=sha256))
    said = both_refuse(built, tiny_copy, "less", mode="resident")
    assert "neither the base nor task 'less' has the weight 'bert.encoder.layer.0.attention.self.value.weight'" in said


ASKED = {
    "no words": ((), "give a bundle, a task and ids\nusage: "),
    "no task": (("bundle", "--ids", "1"), "give a bundle, a task and ids\nusage: "),
    "an id that is none": (("bundle", "--ids", "1,x"), "--ids 'x': expected a whole number, 0 or more\n"),
    "a mode that there is not": (
        ("bundle", "--mode", "both"),
        "mode 'both' is not known; expected dedicated or resident\n",
    ),
    "an option that there is not": (("bundle", "--fast"), "'--fast' is not known\nusage: "),
    "half an option": (("bundle", "--task"), "--task needs a value\n"),
}


@pytest.mark.parametrize(("words", "said"), ASKED.values(), ids=ASKED)
def test_the_example_says_what_it_does_not_understand(built: Built, words: tuple[str, ...], said: str):
    assert built.ask(*words, status=3).startswith(f"lorafuse-ask: {said}")


def test_a_classifier_generates_nothing(built: Built, tiny_copy: Path):
    said = built.ask(tiny_copy, "--task", "first", "--ids", "101", "--tokens", "2", status=3)
    assert said == "lorafuse-ask: task 'first' generates no tokens\n"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"schema": 3} more'],
    ids=["empty", "cut short", "no text", "deep", "two"],
)
def test_a_manifest_that_is_no_json_is_refused(built: Built, tiny_copy: Path, content: bytes):
    (tiny_copy / "manifest.json").write_bytes(content)
    said = built.ask(tiny_copy, "--task", "first", "--ids", "1", status=3)
    assert said.startswith(f"lorafuse-ask: {tiny_copy / 'manifest.json'}: not a bundle's manifest (")
    assert said.endswith("); export the tasks again\n")
    assert said.isascii()
    assert said.count("\n") == 1


def test_a_folder_that_is_a_link_is_refused(built: Built, tiny_copy: Path, tmp_path: Path):
    (tiny_copy / "adapters").rename(tmp_path / "outside")
    (tiny_copy / "adapters").symlink_to(tmp_path / "outside")
    both_refuse(built, tiny_copy)


def test_no_bundle_no_task_and_no_memory_are_refused(built: Built, tiny_copy: Path, tmp_path: Path):
    both_refuse(built, tmp_path / "nowhere")
    both_refuse(built, tiny_copy, "nope")
    assert "memory budget is 100" in both_refuse(built, tiny_copy, memory=100, mode="resident")


def test_a_task_stored_as_factors_is_refused_by_name_and_the_others_are_not(built: Built, stored_both_ways: Path):
    said = built.ask(stored_both_ways, "--task", "factors", "--ids", "101", status=3)
    assert (
        said
        == f"lorafuse-ask: {stored_both_ways}: task 'factors' is stored as factors, which the Python runtime merges and"
        " this one does not; add it with '--store dense'\n"
    )
    built.ask(stored_both_ways, "--task", "dense", "--ids", "101")


@pytest.mark.parametrize("mode", ["dedicated", "resident"])
def test_a_damaged_task_harms_no_other(built: Built, stored_both_ways: Path, mode: str):
    task_file(stored_both_ways).unlink()
    built.ask(stored_both_ways, "--task", "dense", "--ids", "101", "--mode", mode)
    both_refuse(built, stored_both_ways, mode=mode)


@pytest.mark.parametrize(
    ("library", "said"),
    [
        ("/nowhere/libonnxruntime.so", "ONNX Runtime can't be loaded ("),
        ("libm.so.6", "libm.so.6: not ONNX Runtime (it has no OrtGetApiBase)"),
    ],
)
def test_a_library_that_is_not_onnx_runtime_is_refused(built: Built, tiny_copy: Path, library: str, said: str):
    refused = built.ask(tiny_copy, "--task", "first", "--ids", "101", "--onnxruntime", library, status=3)
    assert refused.startswith(f"lorafuse-ask: {said}")
    assert refused.endswith("; give its library's path as Options::onnxruntime\n")

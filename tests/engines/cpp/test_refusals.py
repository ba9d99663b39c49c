"""A damaged or hostile bundle is refused by both runtimes, in the same words."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compiled import Built

import engines
from exporter.bundle.manifest import open_bundle
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
    weights = open_bundle(bundle).task("first").weights
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
    paths = {"weights": task_file(tiny_copy), "model": tiny_copy / bundle.task("first").model.path, "base": tiny_copy / bundle.manifest.base.weights[0].path}
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
    "an engine's path upwards": lambda content: first(content).update(engines={"b": ENGINE | {"file": {"path": "a/../../b", "size": 1, "sha256": "0"}}}),
    "an engine of an unknown mode": lambda content: first(content).update(engines={"b": ENGINE | {"mode": "magic"}}),
    "an engine with too little": lambda content: only(content["graphs"]).update(engines={"b": {"backend": "b"}}),
    "a timing cache upwards": lambda content: content.update(timing_caches={"k": {"path": "../b", "size": 1, "sha256": "0"}}),
    "an axis that is none": lambda content: only(content["graphs"])["weights"].update({"classifier.weight": ["a"]}),
    "a task name upwards": lambda content: content["tasks"].update({"../first": first(content)}),
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
def test_a_hostile_manifest_is_refused(built: Built, tiny_copy: Path, change: Callable[[Manifest], object]):
    edit(tiny_copy, change)
    both_refuse(built, tiny_copy)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"schema": 3} more'], ids=["empty", "cut short", "no text", "deep", "two"])
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
    assert said == (
        f"lorafuse-ask: {stored_both_ways}: task 'factors' is stored as factors, which the Python runtime merges and this one does not; "
        "add it with '--store dense'\n"
    )
    built.ask(stored_both_ways, "--task", "dense", "--ids", "101")


@pytest.mark.parametrize("mode", ["dedicated", "resident"])
def test_a_damaged_task_harms_no_other(built: Built, stored_both_ways: Path, mode: str):
    task_file(stored_both_ways).unlink()
    built.ask(stored_both_ways, "--task", "dense", "--ids", "101", "--mode", mode)
    both_refuse(built, stored_both_ways, mode=mode)


@pytest.mark.parametrize(
    ("library", "said"),
    [("/nowhere/libonnxruntime.so", "ONNX Runtime can't be loaded ("), ("libm.so.6", "libm.so.6: not ONNX Runtime (it has no OrtGetApiBase)")],
)
def test_a_library_that_is_not_onnx_runtime_is_refused(built: Built, tiny_copy: Path, library: str, said: str):
    refused = built.ask(tiny_copy, "--task", "first", "--ids", "101", "--onnxruntime", library, status=3)
    assert refused.startswith(f"lorafuse-ask: {said}")
    assert refused.endswith("; give its library's path as Options::onnxruntime\n")

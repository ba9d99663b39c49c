"""A damaged or hostile bundle is refused by both runtimes: by the same decision, and in the same words where they are
ours. Of a manifest that can't be decoded each says the reason in its own way, in parentheses.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import resource
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from compiled import Built, run
from safetensors.numpy import load_file, save_file

import engines
from engines.backends.onnxruntime import OLDEST
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import MODEL
from exporter.task import add_task
from lora.errors import LorafuseError

Manifest = dict[str, Any]


def ours(said: str) -> str:
    """What both say alike: all but why a text is no manifest, and how text that does not show is quoted."""
    said = re.sub(r"not a bundle's manifest \(.*\); ", "not a bundle's manifest; ", said)
    return re.sub(r"[\\\\'\"]", "", said)


def both_refuse(built: Built, bundle: Path, task: str = "first", **options: Any) -> str:
    """What Python says, and C++ in the same words; the C++ runtime under the sanitizers."""
    with pytest.raises(LorafuseError) as refused, engines.open(bundle, threads=1, **options) as runtime:
        runtime.run(task, {})
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    said = built.ask(bundle, "--task", task, "--ids", "101", *given, status=3)
    assert said.count("\n") == 1
    assert ours(said) == ours(f"lorafuse-ask: {refused.value}\n")
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


def part(content: Manifest) -> Manifest:
    return first(content)["parts"]["model"]


def only(mapping: Manifest) -> Manifest:
    (value,) = mapping.values()
    return value


def graph(content: Manifest) -> Manifest:
    return only(content["graphs"])


def weight(content: Manifest) -> Manifest:
    return graph(content)["weights"]["classifier.weight"]


BASE = {"sha256": "0", "precision": "float32", "longest": 1, "vocabulary": 1, "weights": [], "files": []}
ENGINE = {"backend": "b", "version": "1", "target": "t", "model_sha256": "0", "weights_sha256": "0"}
FILE = {"path": "engines/b", "size": 1, "sha256": "0"}
EDITS: dict[str, Callable[[Manifest], object]] = {
    "a newer schema": lambda content: content.update(schema=99),
    "the schema before": lambda content: content.update(schema=3),
    "an older schema": lambda content: content.update(schema=1),
    "no schema": lambda content: content.pop("schema"),
    "a schema of text": lambda content: content.update(schema="4"),
    "a missing field": lambda content: content["base"].pop("longest"),
    "an unknown field": lambda content: first(content).update(more=1),
    "a number for a text": lambda content: content["base"].update(sha256=7),
    "a text for a number": lambda content: part(content)["model"].update(size="7"),
    "a fraction for a number": lambda content: part(content)["model"].update(size=7.5),
    "a whole fraction for a number": lambda content: part(content)["model"].update(size=7.0),
    "a list for an object": lambda content: content.update(tasks=[]),
    "an object for a list": lambda content: first(content).update(labels={}),
    "an unknown precision": lambda content: content["base"].update(precision="float8"),
    "an unknown store": lambda content: first(content).update(store="both"),
    "an unknown graph": lambda content: part(content).update(graph="0" * 64),
    "a path upwards": lambda content: part(content)["model"].update(path="../model.onnx"),
    "an absolute path": lambda content: part(content)["weights"].update(path="/etc/passwd"),
    "no path": lambda content: content["base"]["weights"][0].update(path="./."),
    "the manifest itself": lambda content: content["base"]["files"][0].update(path="./manifest.json"),
    "a control character": lambda content: part(content)["model"].update(path="a\nb"),
    "a backslash": lambda content: part(content)["model"].update(path="a\\b"),
    "a structure upwards": lambda content: content["base"].update(structure=FILE | {"path": "../b"}),
    "tied groups that are none": lambda content: content["base"].update(tied=["a", "b"]),
    "an engine's path upwards": (
        lambda content: part(content).update(engines=[ENGINE | {"file": FILE | {"path": "a/../../b"}}])
    ),
    "an engine of an unknown mode": lambda content: part(content).update(engines=[ENGINE | {"mode": "magic"}]),
    "an engine with too little": lambda content: graph(content).update(engines=[{"backend": "b"}]),
    "engines by their backends": lambda content: graph(content).update(engines={"b": ENGINE}),
    "two engines for a target": lambda content: part(content).update(engines=[ENGINE, ENGINE | {"version": "2"}]),
    "two engines of a graph for a target": lambda content: graph(content).update(engines=[ENGINE, ENGINE]),
    "a timing cache upwards": lambda content: content.update(timing_caches={"k": FILE | {"path": "../b"}}),
    "a label too many": lambda content: first(content)["labels"].append("more"),
    "a task without parts": lambda content: first(content).update(parts={}),
    "a part of another role": lambda content: first(content).update(parts={"text": part(content)}),
    "a graph of no role": lambda content: graph(content).update(part="Text tower"),
    "a graph of another role": lambda content: graph(content).update(part="text"),
    "a graph without outputs": lambda content: graph(content).update(outputs=[]),
    "a negative length": lambda content: content["base"].update(longest=-1),
    "a task type that does not show": lambda content: graph(content)["head"].update(task_type="SEQ\x1b[2J'_CLS"),
    "an axis that is none": lambda content: weight(content).update(order=["a"]),
    "an axis too many": lambda content: weight(content).update(order=[1, 0, 2]),
    "an axis twice": lambda content: weight(content).update(order=[1, 1]),
    "a weight without a shape": lambda content: weight(content).pop("shape"),
    "a weight as schema 3 has it": lambda content: graph(content)["weights"].update({"classifier.weight": [1, 0]}),
    "a weight in four bits": lambda content: weight(content).update(stored={"as": "int4", "block": 32, "axis": 0}),
    "a weight in five bits": lambda content: weight(content).update(stored={"as": "int5", "block": 32, "axis": 0}),
    "a weight stored in a way of its own": lambda content: weight(content).update(stored="packed"),
    "a weight in four bits without blocks": lambda content: weight(content).update(stored={"as": "int4", "axis": 0}),
    "a task name upwards": lambda content: content["tasks"].update({"../first": first(content)}),
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
def test_a_hostile_manifest_is_refused(built: Built, tiny_copy: Path, change: Callable[[Manifest], object]):
    edit(tiny_copy, change)
    both_refuse(built, tiny_copy)


def places(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The place of everything in a document."""
    yield place
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*place, key))


def changed(content: Manifest, place: tuple[str | int, ...], change: Callable[[Any, str | int], object]) -> Manifest:
    copied = inner = copy.deepcopy(content)
    for key in place[:-1]:
        inner = inner[key]
    change(inner, place[-1])
    return copied


VALUES = [None, True, -1, 7.5, "", "a/../b", "a" * 300 + "/b", "x\u061c\u2028", "a\\b'\"", [], [None], {}, {"a": 1}]


def test_whatever_is_wrong_in_a_manifest_both_refuse_it_alike(built: Built, tiny_bundle: Bundle, tmp_path: Path):
    """Everything in it removed, and replaced by a value of each kind, one at a time."""
    content = json.loads((tiny_bundle.path / "manifest.json").read_bytes())
    engine = ENGINE | {"file": FILE, "mode": "refit", "refittable": ["a"], "proven": {"a": "b"}}
    part(content)["engines"] = graph(content)["engines"] = [engine]
    content["base"] |= {"tied": [["a", "b"]], "structure": FILE}
    plain = {"order": None, "shape": [1], "dtype": "float32", "stored": "plain"}
    graph(content)["weights"] = {"a": plain, "b": {"order": [1, 0], "shape": [2, 2], "dtype": "float16"}}
    content["timing_caches"] = {"k": FILE}
    inside = [place for place in places(content) if place]
    manifests = [changed(content, place, lambda inner, key: inner.pop(key)) for place in inside]
    manifests += [
        changed(content, place, lambda inner, key, value=value: inner.__setitem__(key, value))
        for place in inside
        for value in VALUES
    ]
    paths = [tmp_path / f"{number:04}" for number in range(len(manifests))]
    for path, manifest in zip(paths, manifests, strict=True):
        path.mkdir()
        (path / "manifest.json").write_text(json.dumps(manifest))
    found, wanted = built.probe("bundles", *paths).splitlines(), [opened_in_python(path) for path in paths]
    assert [pair for pair in zip(found, wanted, strict=True) if ours(pair[0]) != ours(pair[1])] == []
    assert len({said.removeprefix(str(path)) for said, path in zip(found, paths, strict=True)}) > 100


def opened_in_python(path: Path) -> str:
    try:
        open_bundle(path)
    except LorafuseError as error:
        return str(error)
    return "whole"


def test_characters_that_do_not_show_are_those_that_python_escapes(built: Built, tmp_path: Path):
    """All that this Python's Unicode has assigned, in a task's name, which is refused."""
    characters = "".join(char for char in map(chr, range(0x110000)) if unicodedata.category(char) not in ("Cn", "Cs"))
    task = {"parts": {}, "store": "dense", "adapter": [], "adapter_sha256": "0", "labels": []}
    manifest = {"schema": 4, "base": BASE, "graphs": {}, "tasks": {characters: task}, "versions": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert ours(built.probe("bundles", tmp_path)) == ours(opened_in_python(tmp_path) + "\n")


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


def in_cpp(built: Built, bundle: Path, *more: str) -> str:
    return built.ask(bundle, "--task", "first", "--ids", "101", *more, status=3)


@pytest.mark.parametrize("mode", ["dedicated", "resident"])
@pytest.mark.parametrize(
    ("change", "described"),
    [({"shape": [3, 32]}, "float32 of shape [3, 32]"), ({"dtype": "float16"}, "float16 of shape [2, 32]")],
)
def test_a_tensor_of_the_task_that_is_not_as_the_manifest_says_is_named(
    built: Built, tiny_copy: Path, change: Manifest, described: str, mode: str
):
    edit(tiny_copy, lambda content: weight(content).update(change))
    said = both_refuse(built, tiny_copy, mode=mode)
    assert said.endswith(
        f"'classifier.weight' is float32 of shape [2, 32], but the weight map says {described}; export the task again"
    )


def test_a_tensor_of_the_base_that_is_not_as_the_manifest_says_is_named(built: Built, tiny_copy: Path):
    name = "bert.encoder.layer.0.output.dense.weight"
    edit(tiny_copy, lambda content: graph(content)["weights"][name].update(shape=[64, 33]))
    said = both_refuse(built, tiny_copy)
    assert f": the weight '{name}' is float32 of shape [64, 32], but the weight map says" in said


@pytest.mark.parametrize("threads", [10**6, 2**31 - 1])
def test_threads_that_the_machine_does_not_have_are_refused(built: Built, tiny_copy: Path, threads: int):
    said = f"threads {threads}: expected 0 for every core, or 1 to {os.cpu_count()}, which this machine has\n"
    assert in_cpp(built, tiny_copy, "--threads", str(threads)) == f"lorafuse-ask: {said}"
    built.ask(tiny_copy, "--task", "first", "--ids", "101", "--threads", "0")


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


NOT_JSON: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut short": lambda content: content[:-2],
    "no text": lambda content: b"\xff\xfe" + content,
    "invalid UTF-8": lambda content: content.replace(b'"first"', b'"f\xc0\x80"'),
    "a byte order mark": lambda content: b"\xef\xbb\xbf" + content,
    "deep": lambda content: b"[" * 100_000,
    "deep within": lambda content: content.replace(
        b'"versions":{', b'"versions":{"a":' + b"[" * 500 + b"]" * 500 + b","
    ),
    "two": lambda content: content + b"{}",
    "a zero byte": lambda content: content + b"\0",
    "half a pair of surrogates": lambda content: content.replace(b'"first"', b'"\\ud800"'),
    "a number that no type holds": lambda content: re.sub(rb'"longest":\d+', b'"longest":1e999', content),
}


def packed(bundle: Path) -> bytes:
    """The manifest without spaces."""
    return json.dumps(json.loads((bundle / "manifest.json").read_bytes()), separators=(",", ":")).encode()


@pytest.mark.parametrize("change", NOT_JSON.values(), ids=NOT_JSON)
def test_a_manifest_that_is_no_json_is_refused(built: Built, tiny_copy: Path, change: Callable[[bytes], bytes]):
    content = packed(tiny_copy)
    (tiny_copy / "manifest.json").write_bytes(change(content))
    assert change(content) != content
    assert "not a bundle's manifest (" in both_refuse(built, tiny_copy)


# A parser may take these, each in a way of its own.
AMBIGUOUS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a field twice": (
        lambda content: content.replace(b'"longest":', b'"longest":7,"longest":'),
        "'longest' stands twice",
    ),
    "a task twice": (lambda content: content.replace(b'"first":', b'"first":1,"f\\u0069rst":'), "'first' stands twice"),
    "a number of 64 bits": (
        lambda content: re.sub(rb'"longest":\d+', b'"longest":9223372036854775808', content),
        "expected a number of 63 bits at base.longest, found 9223372036854775808",
    ),
    "a number of 65 bits": (
        lambda content: re.sub(rb'"longest":\d+', b'"longest":18446744073709551616', content),
        "expected a whole number at base.longest, found a number that is not whole, or too large",
    ),
    "lists in lists": (
        lambda content: content.replace(b'"labels":', b'"labels":' + b"[" * 70 + b"]" * 70 + b',"more":'),
        "JSON is nested more than 64 deep",
    ),
    "a zero byte in a label": (lambda content: content.replace(b'"yes"', b'"y\\u0000s"'), "at tasks.first.labels[1]"),
}


@pytest.mark.parametrize(("change", "reason"), AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_a_manifest_that_two_readers_may_read_differently_is_refused(
    built: Built, tiny_copy: Path, change: Callable[[bytes], bytes], reason: str
):
    content = packed(tiny_copy)
    (tiny_copy / "manifest.json").write_bytes(change(content))
    assert change(content) != content
    said = built.ask(tiny_copy, "--task", "first", "--ids", "1", status=3)
    assert said.startswith(f"lorafuse-ask: {tiny_copy / 'manifest.json'}: not a bundle's manifest (")
    assert said.endswith("); export the tasks again\n")
    assert reason in said
    assert said.count("\n") == 1


def test_a_path_that_is_longer_than_any_system_takes_is_refused(built: Built, tiny_copy: Path):
    edit(tiny_copy, lambda content: part(content)["model"].update(path="a/" * 3000 + "b"))
    assert in_cpp(built, tiny_copy) == (
        f"lorafuse-ask: {tiny_copy / 'manifest.json'}: a file path of 6001 bytes; expected 4096 at most; export the"
        " tasks again\n"
    )


def seconds_to_open(built: Built, folder: Path, content: Manifest) -> float:
    """The processor's time, which other programs don't take."""
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(content))
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    assert "Error" not in built.probe("bundles", folder)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


LARGE: dict[str, Callable[[Manifest, int], object]] = {
    "weights": lambda content, count: graph(content).update(
        weights={f"weight.{i}": {"order": [1, 0], "shape": [32, 32], "dtype": "float32"} for i in range(count)}
    ),
    "axes": lambda content, count: weight(content).update(order=list(range(count))[::-1], shape=[1] * count),
    "fields": lambda content, count: content.update({f"field{i}": i for i in range(count)}),
    "files": lambda content, count: content["base"].update(files=[FILE | {"path": f"a{i}/b"} for i in range(count)]),
    "a path": lambda content, count: content["base"].update(files=[FILE | {"path": "a/" * count + "b"}]),
    "engines": lambda content, count: part(content).update(engines=[ENGINE | {"target": str(i)} for i in range(count)]),
}


@pytest.mark.parametrize("enlarge", LARGE.values(), ids=LARGE)
def test_a_manifest_is_read_in_linear_time(
    built: Built, tiny_bundle: Bundle, tmp_path: Path, enlarge: Callable[[Manifest, int], object]
):
    content = json.loads((tiny_bundle.path / "manifest.json").read_bytes())
    took = []
    for count in (10_000, 80_000):
        enlarge(content, count)
        took.append(seconds_to_open(built, tmp_path / str(count), content))
    assert took[1] < 24 * took[0]  # in quadratic time: 64


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


OLD = """
static const char *version(void) { return "1.23.2"; }
static const void *api(unsigned number) { (void)number; return 0; }
static const struct { const void *(*api)(unsigned); const char *(*version)(void); } base = {api, version};
const void *OrtGetApiBase(void) { return &base; }
"""


def test_an_onnx_runtime_that_is_too_old_is_refused_by_number(built: Built, tiny_copy: Path, tmp_path: Path):
    """Python's wants the same: engines/backends/onnxruntime.py."""
    (tmp_path / "old.c").write_text(OLD)
    library = tmp_path / "libold.so"
    run("gcc", "-shared", "-fPIC", tmp_path / "old.c", "-o", library)
    refused = built.ask(tiny_copy, "--task", "first", "--ids", "101", "--onnxruntime", library, status=3)
    oldest = ".".join(map(str, OLDEST))
    assert refused == f"lorafuse-ask: {library}: ONNX Runtime 1.23.2 is too old; expected {oldest} or newer\n"

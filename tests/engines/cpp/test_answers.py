"""The C++ runtime answers as the Python one does, bit for bit: compiled with AddressSanitizer and UBSan, run against
the wheel's ONNX Runtime.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from compiled import BY_C, Built, run
from tiny_models import IMAGE, TEXT

import engines
import exporter
from engines.feeds.generate import greedy
from engines.feeds.inputs import empty_cache, random_inputs, sizes
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import Graph
from exporter.bundle.task_part import task_part
from exporter.task import Request, add_task, export_task
from lora.errors import EngineError
from lora.files.tensorfile import Array

MODES = ("dedicated", "resident")
IDS = (101, 2307, 3185, 2003, 102)
FEW_IDS = (5, 17, 42, 2)  # of a small vocabulary


@pytest.fixture
def bundle(stored_both_ways: Path, write_adapter) -> Bundle:
    add_task(stored_both_ways, write_adapter("another", seed=7), "other")
    return open_bundle(stored_both_ways)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny Llama and an adapter of it."""
    folder = tmp_path_factory.mktemp("language")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=3200, **shape, initializer_range=0.3))
    model.save_pretrained(folder / "base")
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)).save_pretrained(
        folder / "adapter"
    )
    return export_task(Request(folder / "base", folder / "adapter", "chat"), folder / "bundle").bundle


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny CLIP, and two adapters over both of its towers and their projections."""
    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        vision_config=dict(IMAGE, projection_dim=16),
        text_config=dict(TEXT, projection_dim=16, eos_token_id=2),
        projection_dim=16,
    )
    transformers.CLIPModel(config).save_pretrained(folder / "base")
    targets = ["q_proj", "v_proj", "text_projection", "visual_projection"]
    for name in ("one", "other"):
        model = transformers.CLIPModel.from_pretrained(folder / "base")
        lora = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        peft.get_peft_model(model, lora).save_pretrained(str(folder / name))
        export_task(Request(folder / "base", folder / name, name), folder / "bundle")
    return open_bundle(folder / "bundle")


def one_row(graph: Graph, ids: tuple[int, ...]) -> dict[str, Array]:
    row = np.array([ids], np.int64)
    known = {
        "input_ids": row,
        "attention_mask": np.ones_like(row),
        "token_type_ids": np.zeros_like(row),
        "position_ids": np.arange(len(ids))[None],
    }
    return {port.name: known[port.name] for port in graph.inputs if port.name in known} | empty_cache(graph, 1)


def in_python(bundle: Bundle, task: str, mode: Any, adapted: bool) -> dict[str, bytes]:
    with engines.open(bundle.path, mode, threads=1) as runtime:
        outputs = runtime.run(task, one_row(task_part(bundle, task).graph, IDS), adapted)
    return {name: values.tobytes() for name, values in outputs.items()}


def in_cpp(
    built: Built, bundle: Bundle, task: str, mode: str, adapted: bool, part: str = "model", row: tuple[int, ...] = IDS
) -> dict[str, bytes]:
    ids = ",".join(map(str, row))
    which = ("--part", part, *([] if adapted else ["--unadapted"]))
    said = built.ask(bundle.path, "--task", task, "--ids", ids, "--mode", mode, "--raw", *which)
    return {name: bytes.fromhex(values) for name, values in (line.split(" ") for line in said.splitlines())}


@pytest.mark.parametrize("mode", MODES)
def test_a_classifier_answers_with_the_same_bits(built: Built, bundle: Bundle, mode: str):
    seen = set()
    for task in ("first", "dense", "other"):
        for adapted in (True, False):
            found = in_cpp(built, bundle, task, mode, adapted)
            assert found == in_python(bundle, task, mode, adapted)
            seen.add(found["logits"])
    assert len(seen) == 6  # the heads are the tasks' own


@pytest.mark.parametrize("mode", MODES)
def test_a_head_of_another_size_than_the_bases_own_answers_with_the_same_bits(
    built: Built, tiny_base: Path, tmp_path: Path, write_adapter, mode: str
):
    base = Path(shutil.copytree(tiny_base, tmp_path / "with-head"))
    transformers.BertForSequenceClassification.from_pretrained(base, num_labels=2).save_pretrained(base)
    export_task(Request(base, None, "unadapted"), tmp_path / "bundle")
    bundle = export_task(Request(base, write_adapter(outputs=3), "three"), tmp_path / "bundle").bundle
    for task, adapted in (("unadapted", True), ("three", True), ("three", False)):
        assert in_cpp(built, bundle, task, mode, adapted) == in_python(bundle, task, mode, adapted)


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_language_model_answers_with_the_same_bits_and_tokens(
    built: Built, language: Bundle, mode: Any, adapted: bool
):
    assert in_cpp(built, language, "chat", mode, adapted) == in_python(language, "chat", mode, adapted)
    unadapted = [] if adapted else ["--unadapted"]
    said = built.ask(language.path, "--task", "chat", "--ids", "5,17,42", "--tokens", "8", "--mode", mode, *unadapted)
    with engines.open(language.path, mode, threads=1) as runtime, runtime.use("chat", adapted) as loaded:
        (tokens,) = greedy(loaded, one_row(task_part(language, "chat").graph, (5, 17, 42)), 8)
    assert said == ",".join(map(str, tokens)) + "\n"


def test_the_real_tasks_answer_with_the_same_bits(built: Built, real_bundle: Bundle):
    for task in real_bundle.manifest.tasks:
        assert in_cpp(built, real_bundle, task, "dedicated", True) == in_python(real_bundle, task, "dedicated", True)


def test_the_example_prints_the_class_or_the_value(built: Built, real_bundle: Bundle):
    label, logit = built.ask(real_bundle.path, "--task", "movies", "--ids", "101,2307,3185,102").split()
    assert (label, float(logit) > 0) == ("positive", True)


@pytest.mark.parametrize("mode", MODES)
def test_threads_get_their_own_tasks_answers(built: Built, bundle: Bundle, mode: str):
    """With room for two tasks, so that they are given up and loaded again all the time."""
    parts = [part for task in bundle.manifest.tasks.values() for part in task.parts.values()]
    budget = 2 * max(part.weights.size for part in parts if part.weights)
    assert built.probe("threads", bundle.path, mode, str(budget)) == "100 answers, 0 wrong, 2 loaded\n"


@pytest.mark.parametrize("mode", MODES)
def test_outputs_and_tasks_in_hand_outlive_their_runtime(built: Built, bundle: Bundle, mode: str):
    assert built.probe("outlive", bundle.path, mode, "0") == "same\n"


class Longer:
    """An array of one element more than its shape says."""

    def __init__(self, array: Array) -> None:
        self.dtype, self.shape, self._values = array.dtype, array.shape, array

    def tobytes(self) -> bytes:
        return self._values.tobytes() + bytes(self.dtype.itemsize)


@pytest.fixture
def ask_by_c(built: Built) -> Iterator[Any]:
    """Asks the shared library from a process of its own, where no other ONNX Runtime is loaded."""
    running: list[subprocess.Popen[str]] = []

    def opened(bundle: Path, mode: int = 0, memory: int = 0) -> Any:
        command = [sys.executable, BY_C, built.shared / "liblorafuse.so", bundle, str(mode), str(memory)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        running.append(process)

        def ask(
            task: str | None, inputs: Mapping[str | None, Array | Longer], adapted: bool = True, **more: bool | str
        ) -> Any:
            given = [
                {"name": name, "dtype": str(array.dtype), "shape": array.shape, "data": array.tobytes().hex()}
                for name, array in inputs.items()
            ]
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps({"task": task, "inputs": given, "adapted": adapted, **more}) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        return ask

    yield opened
    for process in running:
        process.communicate(timeout=60)
        assert process.returncode == 0


@pytest.mark.parametrize("mode", MODES)
def test_another_language_gets_the_same_bits_through_c(ask_by_c: Any, bundle: Bundle, mode: Any):
    inputs = random_inputs(task_part(bundle, "dense").graph, bundle.manifest.base.vocabulary, sizes(3, 7), seed=1)
    ask = ask_by_c(bundle.path, MODES.index(mode))
    with engines.open(bundle.path, mode, threads=1) as runtime:
        for task, adapted in (("dense", True), ("other", True), ("dense", False), ("dense", True)):
            wanted = runtime.run(task, inputs, adapted)["logits"]
            assert ask(task, inputs, adapted)["outputs"]["logits"] == {
                "shape": list(wanted.shape),
                "data": wanted.tobytes().hex(),
            }


def test_inputs_that_do_not_fit_are_refused_in_the_same_words_and_the_task_goes_on(ask_by_c: Any, bundle: Bundle):
    good = random_inputs(task_part(bundle, "dense").graph, bundle.manifest.base.vocabulary, sizes(1, 4), seed=1)
    ids = good["input_ids"]
    ask = ask_by_c(bundle.path)
    with engines.open(bundle.path, threads=1) as runtime:
        for bad in (
            good | {"input_ids": ids.astype(np.float32)},
            good | {"input_ids": ids[0]},
            {"input_ids": ids},
            good | {"more": ids},
            good | {"attention_mask": good["attention_mask"][:, :2]},
            good | {"input_ids": ids - 10**6},
            good | {"input_ids": ids + 10**6},
            good | {"token_type_ids": ids - 10**6},
            dict.fromkeys(good, np.zeros((1, 65), np.int64)),
        ):
            with pytest.raises(EngineError) as refused:
                runtime.run("dense", bad)
            assert ask("dense", bad) == {"error": str(refused.value)}
    assert "outputs" in ask("dense", good)


def test_what_c_can_do_wrong_is_refused(ask_by_c: Any, bundle: Bundle):
    ids = np.ones((1, 4), np.int64)
    ask = ask_by_c(bundle.path)
    assert ask(None, {}) == {"error": "the task is NULL"}
    assert ask("dense", {None: ids}) == {"error": "an input's name is NULL"}
    assert ask("dense", {"input_ids": Longer(ids)}) == {"error": "input 'input_ids' has 40 bytes; its shape takes 32"}
    names = [port.name for port in task_part(bundle, "dense").graph.inputs]
    assert ask("dense", dict.fromkeys(names, ids.astype(np.int8))) == {
        "error": "unknown dtype 99; expected one of lorafuse::DType"
    }


def drawn_inputs(bundle: Bundle, task: str, part: str) -> dict[str, Array]:
    vocabulary = TEXT["vocab_size"]  # the smallest of the bases
    return random_inputs(task_part(bundle, task, part).graph, vocabulary, sizes(2, 7), seed=1)


@pytest.mark.parametrize("mode", MODES)
def test_both_towers_of_clip_answer_with_the_same_bits(built: Built, ask_by_c: Any, towers: Bundle, mode: Any):
    """One adapter over a model of two parts: from C++ and through C, adapted and not, from one task to another."""
    ask = ask_by_c(towers.path, MODES.index(mode))
    seen = set()
    with engines.open(towers.path, mode, threads=1) as runtime:
        for task, adapted in (("one", True), ("other", True), ("one", False), ("one", True)):
            for part in ("vision", "text"):
                inputs = drawn_inputs(towers, task, part)
                wanted = runtime.run(task, inputs, adapted, part)
                given = ask(task, inputs, adapted, part=part)["outputs"]
                assert given == {
                    name: {"shape": list(values.shape), "data": values.tobytes().hex()}
                    for name, values in wanted.items()
                }
                seen.add(json.dumps(given))
            row = runtime.run(task, one_row(task_part(towers, task, "text").graph, FEW_IDS), adapted, "text")
            in_bytes = {name: values.tobytes() for name, values in row.items()}
            assert in_cpp(built, towers, task, mode, adapted, "text", FEW_IDS) == in_bytes
    assert len(seen) == 6


def test_of_a_model_of_several_parts_one_must_be_named(built: Built, ask_by_c: Any, towers: Bundle, bundle: Bundle):
    ask = ask_by_c(towers.path)
    assert ask("one", {}, parts=True) == ["text", "vision"]
    with engines.open(towers.path, threads=1) as runtime:
        for part in ("model", "audio"):
            with pytest.raises(EngineError) as refused:
                runtime.run("one", {}, part=part)
            assert ask("one", {}, part=part) == {"error": str(refused.value)}
        assert ask("one", {}) == {"error": "task 'one' has no part 'model'; give one of its parts: text, vision"}
    said = built.ask(towers.path, "--task", "one", "--ids", "1", status=3)
    assert said == (
        f"lorafuse-ask: {towers.path}: task 'one' has no part 'model'; give one of its parts: text, vision\n"
    )
    whole = ask_by_c(bundle.path)
    assert whole("dense", {}, parts=True) == ["model"]
    inputs = drawn_inputs(bundle, "dense", "model")
    assert whole("dense", inputs, part="model")["outputs"] == whole("dense", inputs)["outputs"]


@pytest.mark.parametrize("threads", [-1, 10**6])
def test_threads_that_the_machine_does_not_have_are_refused_through_c(built: Built, bundle: Bundle, threads: int):
    library = built.shared / "liblorafuse.so"
    printed = run(sys.executable, BY_C, library, bundle.path, "0", "0", "0", str(threads))
    said = f"threads {threads}: expected 0 for every core, or 1 to {os.cpu_count()}, which this machine has"
    assert json.loads(printed) == {"error": said}


@pytest.mark.parametrize(
    ("mode", "backend", "said"),
    [
        (7, 0, "mode 7 is not known; expected LORAFUSE_DEDICATED or LORAFUSE_RESIDENT"),
        (0, 9, "backend 9 is not known; expected LORAFUSE_ONNXRUNTIME, LORAFUSE_TENSORRT or LORAFUSE_TENSORRT_RTX"),
        (0, 1, "this library was built without TensorRT; build it with TENSORRT_ROOT, as docs/cpp.md says"),
    ],
)
def test_an_option_of_c_that_there_is_not_is_refused(built: Built, bundle: Bundle, mode: int, backend: int, said: str):
    printed = run(sys.executable, BY_C, built.shared / "liblorafuse.so", bundle.path, str(mode), "0", str(backend))
    assert json.loads(printed) == {"error": said}


def test_c_sees_the_tasks_and_their_labels(ask_by_c: Any, bundle: Bundle):
    assert ask_by_c(bundle.path)("", {}, list=True) == {
        name: list(bundle.task(name).labels) for name in ("dense", "first", "other")
    }


def test_c_sees_what_a_task_takes(ask_by_c: Any, bundle: Bundle):
    wanted = [[port.name, 4, list(port.shape)] for port in task_part(bundle, "dense").graph.inputs]  # int64
    assert any(isinstance(size, str) for _, _, shape in wanted for size in shape)
    ask = ask_by_c(bundle.path)
    assert ask("dense", {}, ports=True) == wanted
    assert ask("nope", {}, ports=True) == []


@pytest.mark.parametrize("mode", MODES)
def test_c_keeps_a_task_in_use_and_gives_it_up_and_takes_a_changed_bundle(
    ask_by_c: Any, bundle: Bundle, write_adapter, mode: str
):
    inputs = random_inputs(task_part(bundle, "dense").graph, bundle.manifest.base.vocabulary, sizes(1, 4), seed=1)
    ask = ask_by_c(bundle.path, MODES.index(mode))
    before = ask("dense", inputs)["outputs"]
    assert ask("dense", inputs, use=True)["outputs"] == before
    assert "no task 'nope'" in ask("nope", inputs, use=True)["error"]
    for change in ("preload", "evict"):
        assert ask("dense", {}, change=change) == {"error": None, "digest": bundle.digest}
        assert "no task 'nope'" in ask("nope", {}, change=change)["error"]
        assert ask(None, {}, change=change)["error"] == "the task is NULL"
    add_task(bundle.path, write_adapter("changed", seed=9), "dense", store="dense")
    changed = open_bundle(bundle.path)
    assert "was asked for" in ask(bundle.digest, {}, change="reload")["error"]
    assert ask(None, {}, change="reload") == {"error": None, "digest": changed.digest}
    with engines.open(bundle.path, mode, threads=1) as runtime:
        wanted = runtime.run("dense", inputs)["logits"].tobytes().hex()
    assert ask("dense", inputs)["outputs"]["logits"]["data"] == wanted != before["logits"]["data"]


def test_null_where_c_may_not_give_it_is_refused(ask_by_c: Any, bundle: Bundle):
    wheres = (
        "where the runtime goes",
        "the bundle",
        "the runtime",
        "the list of inputs",
        "where the outputs go",
        "an input's shape",
    )
    nothing = [None] * 6  # an output, a task, a label, and parts
    assert ask_by_c(bundle.path)("", {}, null=True) == [*(f"{where} is NULL" for where in wheres), 0, *nothing]


class Grid(torch.nn.Module):
    """In float16, ONNX Runtime prepacks the weights of a layer norm, and shares none; here they are a matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.out = torch.nn.LayerNorm((4, 8)), torch.nn.Linear(8, 2)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(grid))


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_can_not_be_shared_are_not(ask_by_c: Any, tmp_path: Path, mode: Any):
    exporter.export(Grid(), {"grid": torch.ones(2, 4, 8)}, tmp_path / "bundle", task="grid", precision="float16")
    grid = np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32)
    with engines.open(tmp_path / "bundle", mode, threads=1) as runtime:
        wanted = runtime.run("grid", {"grid": grid})["output"]
    assert (
        ask_by_c(tmp_path / "bundle", MODES.index(mode))("grid", {"grid": grid})["outputs"]["output"]["data"]
        == wanted.tobytes().hex()
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_classifier_in_float16_answers_with_the_same_bits(
    built: Built, tiny_base: Path, write_adapter, tmp_path: Path, mode: str
):
    half = export_task(Request(tiny_base, write_adapter(), "half", precision="float16"), tmp_path / "bundle").bundle
    for adapted in (True, False):
        assert in_cpp(built, half, "half", mode, adapted) == in_python(half, "half", mode, adapted)


def test_sessions_share_the_base_and_what_is_prepacked_of_it(ask_by_c: Any, real_bundle: Bundle):
    """The first task brings the base's prepacked weights into memory, 43 MB of them; a further one its own 7 MB."""
    ask = ask_by_c(real_bundle.path)
    added = []
    for task in real_bundle.manifest.tasks:
        inputs = random_inputs(task_part(real_bundle, task).graph, 30522, sizes(1, 4), seed=1)
        added.append(ask(task, inputs)["anonymous"])
    first, second = added
    assert 0 < second - first < 20e6 < first

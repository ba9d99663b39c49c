"""The ``lorafuse`` command as a user meets it: a process, its output and its exit status."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import pytest
from command import BAD_INPUT, DONE, NO, answer, lorafuse, refusal
from safetensors.numpy import load_file, save_file

from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import MODEL, File, encode
from lora.adapter import LowRank
from lora.files.tensorfile import TensorFile, file_sha256
from lora.formats.peft import read_peft

COMMANDS = ("export", "build", "verify", "bench", "run", "merge", "inspect", "plan", "train")


# Help and usage


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_shows_an_example_of_it(command: str):
    done = lorafuse(command, "--help")
    assert (done.returncode, done.stderr) == (DONE, "")
    assert f"Example: lorafuse {command} " in done.stdout


def test_help_lists_the_commands_and_shows_an_example():
    done = lorafuse("--help")
    assert (done.returncode, done.stderr) == (DONE, "")
    assert "Example: lorafuse export " in done.stdout
    assert {line.split()[1] for line in done.stdout.splitlines() if line[2:3].isalpha() and line.startswith("│")} == {
        *COMMANDS,
        "bundle",
    }


def test_no_command_is_a_question_for_the_help():
    done = lorafuse()
    assert (done.returncode, done.stderr) == (DONE, "")
    assert done.stdout == lorafuse("--help").stdout


def test_a_group_without_its_command_is_a_usage_error():
    done = lorafuse("bundle")
    assert (done.returncode, done.stderr) == (BAD_INPUT, "lorafuse: no command given (see lorafuse --help)\n")


def test_version_is_the_installed_one():
    done = lorafuse("--version")
    assert (done.returncode, done.stdout, done.stderr) == (DONE, f"{version('lorafuse')}\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], "No such command 'nope'"),
        (["--nope"], "No such option: --nope"),
        (["export"], "Missing argument 'base'"),
        (["export", "base", "adapter", "--out", "x"], "Missing option '--task'"),
        (["build"], "Missing argument 'bundle'"),
        (
            ["build", "{bundle}", "--backend", "openvino"],
            "'openvino' is not one of 'onnxruntime', 'onnxruntime-cuda', ",
        ),
        (["verify", "{bundle}"], "Missing option '--task'"),
        (["run", "{bundle}", "--task", "first"], "Missing option '--text'"),
        (["run", "{bundle}", "--task", "first", "--text"], "Option '--text' requires an argument"),
        (["run", "{bundle}", "surplus", "--task", "first", "--text", "x"], "surplus"),
    ],
    ids=lambda value: " ".join(value[:1] + value[-2:]) if isinstance(value, list) else "",
)
def test_usage_error_is_one_line_and_status_three(fill: Callable[..., list[str]], arguments: list[str], said: str):
    message = refusal(*fill(arguments))
    assert said in message
    assert message.endswith("(see lorafuse --help)")


# What each command gives


def test_export_reports_what_it_added(tiny_base: Path, tiny_copy: Path, write_adapter):
    found = answer(
        "export", tiny_base, write_adapter(seed=1), "--task", "second", "--labels", "bad,good", "--out", tiny_copy
    )
    task = open_bundle(tiny_copy).task("second")
    part = task.parts[MODEL]
    assert task.labels == ("bad", "good")
    assert (found["task"], found["bundle"], found["traced"]) == ("second", str(tiny_copy), False)
    assert len(found["changed"]) == 6  # query and value of two layers, the head's weight and bias
    assert found["bytes_added"] == {
        "base weights": 0,
        "graph": part.model.size,
        "changed tensors": part.weights.size,
        "adapter (kept for verification)": sum(file.size for file in task.adapter),
    }


def test_first_export_creates_a_bundle_that_runs_and_a_regression_prints_its_value_alone(
    tiny_base: Path, write_adapter, tmp_path: Path
):
    done = lorafuse("export", tiny_base, write_adapter(outputs=1), "--task", "rating", "--out", tmp_path / "new")
    assert (done.returncode, done.stderr) == (DONE, "")
    assert "6 tensors changed, base traced" in " ".join(done.stdout.split())
    (found,) = answer("run", tmp_path / "new", "--task", "rating", "--text", "Any text.")
    assert found["label"] is None
    assert (
        lorafuse("run", tmp_path / "new", "--task", "rating", "--text", "Any text.").stdout
        == f"{found['score']:.4f}  Any text.\n"
    )


def test_build_reports_every_tasks_engine(rtx_copy: Path):
    (found,) = answer("build", rtx_copy, "--backend", "tensorrt-rtx", "--compute-capability", "12.0")
    (engine,) = [one for one in open_bundle(rtx_copy).task("first").parts[MODEL].engines if one.target == "12.0"]
    assert (found.pop("seconds") > 0, found.pop("memory") > 10**7) == (True, True)
    assert found == {
        "task": "first",
        "backend": "tensorrt-rtx",
        "version": engine.version,
        "target": "12.0",
        "mode": "rebuild",
        "bytes": engine.file.size,
    }


def test_build_takes_all_tasks_or_those_named(real_bundle: Bundle, tmp_path: Path):
    copy = tmp_path / "bundle"
    shutil.copytree(real_bundle.path, copy)  # not linked: ONNX refuses data with several links
    assert [built["task"] for built in answer("build", copy)] == ["movies", "supersense"]
    (built,) = answer("build", copy, "--task", "supersense")
    wanted = {
        "task": "supersense",
        "backend": "onnxruntime",
        "version": onnxruntime.__version__,
        "target": "CPUExecutionProvider",
        "bytes": 0,
    }
    assert {name: built[name] for name in wanted} == wanted
    table = lorafuse("build", copy, "--task", "movies").stdout
    assert "runs the ONNX model" in table
    assert "supersense" not in table


def test_run_gives_each_text_its_label_and_score(real_bundle: Bundle):
    texts = ["A moving, funny and beautiful film.", "A dull, stupid and boring mess."]
    found = answer("run", real_bundle.path, "--task", "movies", "--text", texts[0], "--text", texts[1])
    assert [(line["text"], line["label"]) for line in found] == [(texts[0], "positive"), (texts[1], "negative")]
    printed = lorafuse("run", real_bundle.path, "--task", "movies", "--text", texts[0], "--text", texts[1])
    assert printed.stdout.splitlines() == [f"{line['label']} {line['score']:.4f}  {line['text']}" for line in found]


def test_verify_holds_every_stage_to_its_bound(rtx_bundle: Path, tmp_path: Path):
    (tmp_path / "texts").write_text("A text.\n\nAnother one.\n  \nÀ troisième.\n", encoding="utf-8")
    found = answer("verify", rtx_bundle, "--task", "first", "--texts", tmp_path / "texts")
    assert (found["task"], found["inputs"], found["passed"]) == ("first", 3, True)
    assert found["digest"] == found["unadapted_digest"]
    assert found["moved"] >= found["least_move"] > 0
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert list(stages) == ["stored weights", "merged torch", "ONNX graph", "engine onnxruntime", "engine tensorrt-rtx"]
    assert all(
        stage["passed"] and stage["difference"] <= stage["bound"]
        for name, stage in stages.items()
        if name != "engine tensorrt-rtx"
    )
    if not Path("/dev/nvidiactl").exists():
        assert (
            stages["engine tensorrt-rtx"]["passed"],
            "on this machine" in stages["engine tensorrt-rtx"]["note"],
        ) == (None, True)


def put_base_weights_into_the_task(path: Path) -> None:
    """Undo the merge in the stored weights, and make the manifest agree."""
    bundle = open_bundle(path)
    task, base = bundle.task("first"), TensorFile(path / bundle.manifest.base.weights[0].path)
    part = task.parts[MODEL]
    weights = path / part.weights.path
    merged = load_file(weights)
    undone = {name: np.asarray(base[name]) if name in base else values for name, values in merged.items()}
    assert sum(name in base for name in merged) == 4
    _overwrite(weights, undone)
    part = msgspec.structs.replace(part, weights=_described(path, part.weights))
    bundle.manifest.tasks["first"] = msgspec.structs.replace(task, parts={MODEL: part})
    (path / "manifest.json").write_bytes(encode(bundle.manifest))


def put_an_adapter_without_effect_into_the_task(path: Path) -> None:
    """Set every lora_B of the adapter that the bundle keeps to zero, and make the manifest agree."""
    bundle = open_bundle(path)
    task = bundle.task("first")
    tensors = path / next(file.path for file in task.adapter if file.path.endswith(".safetensors"))
    save_file({name: values * (0 if "lora_B" in name else 1) for name, values in load_file(tensors).items()}, tensors)
    assert not any(change.b.any() for change in read_peft(tensors.parent).changes if isinstance(change, LowRank))
    bundle.manifest.tasks["first"] = msgspec.structs.replace(
        task, adapter=tuple(_described(path, file) for file in task.adapter)
    )
    (path / "manifest.json").write_bytes(encode(bundle.manifest))


def _overwrite(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """In place: the graph points at the offsets."""
    spans = TensorFile(path).spans
    with path.open("r+b") as file:
        for name, values in tensors.items():
            file.seek(spans[name].offset)
            file.write(values.tobytes())


def _described(root: Path, file: File) -> File:
    path = root / file.path
    return File(path=file.path, size=path.stat().st_size, sha256=file_sha256(path))


def test_verify_says_no_when_the_task_does_not_differ_from_its_base(tiny_copy: Path):
    put_base_weights_into_the_task(tiny_copy)
    put_an_adapter_without_effect_into_the_task(tiny_copy)
    done = lorafuse("verify", tiny_copy, "--task", "first")
    assert (done.returncode, done.stderr) == (NO, "")
    assert "the task moves the base's outputs by 0: NOT DIFFERENT from the base" in done.stdout
    assert "OUT OF BOUND" not in done.stdout  # every stage agrees with every other: that alone would have passed


def test_verify_says_no_when_the_merge_is_missing_from_the_stored_weights(
    tiny_copy: Path, in_process: Callable[..., tuple[int, str]]
):
    put_base_weights_into_the_task(tiny_copy)
    status, printed = in_process("verify", tiny_copy, "--task", "first", "--json")
    found = json.loads(printed)
    assert (status, found["passed"]) == (NO, False)
    assert {stage["name"]: stage["passed"] for stage in found["stages"]} == dict.fromkeys(
        ["stored weights", "merged torch", "ONNX graph", "engine onnxruntime"], False
    )
    assert found["stages"][0]["where"].startswith("bert.encoder.layer.")


# Bad input

# Each command that takes a bundle, after its path, with what else it must have.
REST = {
    "build": [],
    "verify": ["--task", "first"],
    "bench": ["--task", "first", "--length", "8"],
    "run": ["--task", "first", "--text", "x"],
}


@pytest.mark.parametrize("command", REST)
def test_folder_that_is_no_bundle_is_refused(command: str, tmp_path: Path):
    message = refusal(command, tmp_path, *REST[command])
    assert message == f"{tmp_path}: not a bundle (no manifest.json); create one with 'lorafuse export'"


@pytest.mark.parametrize("command", REST)
def test_unknown_task_is_refused_with_those_there_are(tiny_bundle: Bundle, command: str):
    message = refusal(command, tiny_bundle.path, *REST[command], "--task", "nope")
    assert message == f"{tiny_bundle.path}: no task 'nope' in this bundle; it holds: first"


@pytest.mark.parametrize("command", REST)
def test_truncated_manifest_is_refused(tiny_copy: Path, command: str):
    manifest = tiny_copy / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-100])
    assert f"{manifest}: not a bundle's manifest (" in refusal(command, tiny_copy, *REST[command])


@pytest.mark.parametrize("command", REST)
def test_damaged_weights_are_refused(tiny_copy: Path, command: str):
    weights = tiny_copy / open_bundle(tiny_copy).manifest.base.weights[0].path
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    assert (
        refusal(command, tiny_copy, *REST[command])
        == f"{weights}: content does not match the manifest's SHA-256; export the task again"
    )


@pytest.fixture
def export_refusal(tiny_base: Path, tiny_copy: Path) -> Callable[..., str]:
    """What ``export`` says of an adapter, and that the bundle stays as it was."""

    def refused(adapter: Path, *options: str, base: Path = tiny_base) -> str:
        before = {path: file_sha256(path) for path in tiny_copy.parent.rglob("*") if path.is_file()}
        message = refusal("export", base, adapter, *(options or ("--task", "second")), "--out", tiny_copy)
        assert {path: file_sha256(path) for path in tiny_copy.parent.rglob("*") if path.is_file()} == before
        return message

    return refused


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adapter_config.json", "give the folder that has adapter_config.json too"),
        ("adapter_model.safetensors", "adapter_model.safetensors: no such file"),
    ],
)
def test_export_refuses_an_adapter_with_a_missing_file(
    export_refusal: Callable[..., str], write_adapter, name: str, words: str
):
    adapter = write_adapter(seed=1)
    (adapter / name).unlink()
    assert words in export_refusal(adapter)


def test_export_refuses_a_missing_adapter(export_refusal: Callable[..., str], tmp_path: Path):
    assert f"{tmp_path / 'nope'}: no such file or folder" in export_refusal(tmp_path / "nope")


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_export_refuses_a_truncated_adapter(export_refusal: Callable[..., str], write_adapter, size: int):
    tensors = write_adapter(seed=1) / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:size])
    assert f"{tensors}: not a whole safetensors file (" in export_refusal(tensors.parent)


def test_export_refuses_an_adapter_whose_shapes_are_another_bases(export_refusal: Callable[..., str], write_adapter):
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
    message = export_refusal(write_adapter(seed=1, tensors={name: np.ones((4, 48))}))
    assert (
        "'bert.encoder.layer.0.attention.self.query' fits a base tensor of shape (32, 48), but the base has (32, 32)"
        in message
    )


def test_export_refuses_an_adapter_that_names_modules_of_another_base(
    export_refusal: Callable[..., str], write_adapter
):
    module = "base_model.model.bert.encoder.layer.7.attention.self.query"
    tensors = {f"{module}.lora_A.weight": np.ones((4, 32)), f"{module}.lora_B.weight": np.ones((32, 4))}
    assert "module 'bert.encoder.layer.7.attention.self.query' has no weight in the base" in export_refusal(
        write_adapter(seed=1, tensors=tensors)
    )


def test_export_refuses_an_adapter_that_records_another_base(export_refusal: Callable[..., str], write_adapter):
    message = export_refusal(write_adapter(seed=1, metadata={"base_sha256": "f" * 64}))
    assert "trained on the base with SHA-256 ffffffffffff…" in message


def test_export_refuses_a_tensor_that_it_would_drop(export_refusal: Callable[..., str], write_adapter):
    name = "base_model.model.bert.pooler.dense.weight"
    assert f"tensor '{name}' belongs to no layer that is understood here" in export_refusal(
        write_adapter(seed=1, tensors={name: np.ones((32, 32))})
    )


def test_export_refuses_an_adapter_that_changes_nothing(export_refusal: Callable[..., str], write_adapter):
    zeros = {
        f"base_model.model.bert.encoder.layer.{layer}.attention.self.{target}.lora_B.weight": np.zeros((32, 4))
        for layer in range(2)
        for target in ("query", "value")
    }
    assert "the result would be the base model" in export_refusal(write_adapter(seed=1, tensors=zeros))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--task", "Second!"], "task name 'Second!' can't be used"),
        (["--task", "second", "--labels", "a,b,c"], "the head has 2 outputs, but 3 labels were given"),
    ],
)
def test_export_refuses_names_that_do_not_fit(
    export_refusal: Callable[..., str], write_adapter, options: list[str], said: str
):
    assert said in export_refusal(write_adapter(seed=1), *options)


def test_export_refuses_another_base_for_the_same_bundle(
    export_refusal: Callable[..., str], write_adapter, real_base: Path
):
    assert "use a bundle of its own" in export_refusal(write_adapter(seed=1), base=real_base)


def test_export_refuses_a_base_that_is_not_there(export_refusal: Callable[..., str], write_adapter, tmp_path: Path):
    assert f"{tmp_path / 'nope'}: no such folder" in export_refusal(write_adapter(seed=1), base=tmp_path / "nope")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--backend", "tensorrt-rtx", "--compute-capability", "9.0"],
            "expected one of 7.5, 8.0, 8.6, 8.9, 12.0, 12.1",
        ),
        (["--backend", "onnxruntime", "--compute-capability", "8.9"], "compiles nothing ahead"),
    ],
)
def test_build_refuses_what_the_backend_cannot_target(tiny_bundle: Bundle, options: list[str], said: str):
    assert said in refusal("build", tiny_bundle.path, *options)


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="full TensorRT is installed here")
@pytest.mark.parametrize("command", ["build", "run"])
def test_backend_that_is_not_installed_names_its_extra(tiny_bundle: Bundle, command: str):
    assert "install lorafuse[tensorrt]" in refusal(command, tiny_bundle.path, *REST[command], "--backend", "tensorrt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (b"sound\nnot \xff\xfe sound\n", "can't decode byte 0xff"),
        (b"", "holds no text"),
        (b"\n  \n", "holds no text"),
    ],
    ids=["missing", "not UTF-8", "empty", "blank"],
)
def test_verify_refuses_texts_that_it_cannot_read(
    tiny_bundle: Bundle, tmp_path: Path, content: bytes | None, said: str
):
    texts = tmp_path / "texts"
    if content is not None:
        texts.write_bytes(content)
    message = refusal("verify", tiny_bundle.path, "--task", "first", "--texts", texts)
    assert message.startswith(f"{texts}: ")
    assert said in message


def test_verify_refuses_a_folder_of_texts(tiny_bundle: Bundle, tmp_path: Path):
    assert f"{tmp_path}: can't be read as UTF-8 text" in refusal(
        "verify", tiny_bundle.path, "--task", "first", "--texts", tmp_path
    )


def test_run_refuses_bytes_that_are_no_text(tiny_bundle: Bundle):
    assert "can't be read as UTF-8 text" in refusal("run", tiny_bundle.path, "--task", "first", "--text", b"\xff\xfe")


def test_run_names_the_command_that_builds_a_missing_engine_and_it_builds_it(tiny_copy: Path):
    pytest.importorskip("tensorrt_rtx")
    message = refusal("run", tiny_copy, "--task", "first", "--text", "x", "--backend", "tensorrt-rtx")
    command = shlex.split(message.split("'lorafuse ")[1].rstrip("'"))
    assert lorafuse(*command).returncode == DONE
    (engine,) = open_bundle(tiny_copy).task("first").parts[MODEL].engines
    assert engine.backend == "tensorrt-rtx"


@pytest.mark.usefixtures("no_device")
def test_run_of_an_engine_without_its_device_is_refused(rtx_bundle: Path):
    assert "on this machine" in refusal(
        "run", rtx_bundle, "--task", "first", "--text", "x", "--backend", "tensorrt-rtx"
    )

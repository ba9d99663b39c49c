"""Exporting tasks into a bundle: what a task costs, that it stays what it is, and that a failure changes nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import transformers
from float32_sums import engine_bound, engines_bound
from ml_dtypes import bfloat16
from onnx import TensorProto
from safetensors.numpy import load_file, save_file

from exporter.bundle.edits import with_task_engine
from exporter.bundle.layout import key, to_graph
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import MODEL, Engine, encode, task_files
from exporter.bundle.staging import describe
from exporter.bundle.task_part import task_part
from exporter.proof.reference import base_values, merged_values, streamed_runner, torch_runner
from exporter.task import Request, export_task
from lora.errors import AdapterError, BundleError, CheckpointError, ExportError, LorafuseError
from lora.files.tensorfile import Array, TensorFile
from scripts.support.demo_tasks import MOVIES, SUPERSENSE

HEAD = {"classifier.weight", "classifier.bias"}
MODULES = [
    f"base_model.model.bert.encoder.layer.{layer}.attention.self.{target}"
    for layer in (0, 1)
    for target in ("query", "value")
]
QUERY = MODULES[0]
NO_CHANGE = {f"{module}.lora_B.weight": np.zeros((32, 4)) for module in MODULES}


def model_path(bundle: Bundle, task: str) -> Path:
    return bundle.path / bundle.task(task).parts[MODEL].model.path


# --- What is in a bundle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [MOVIES, SUPERSENSE], ids=lambda task: task.name)
def test_weights_bear_the_names_of_the_torch_parameters(real_bundle: Bundle, real_base: Path, task):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(real_base, num_labels=len(task.labels))
    graph = onnx.load(model_path(real_bundle, task.name), load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer if tensor.data_location == TensorProto.EXTERNAL}
    assert stored == set(model.state_dict()) == set(task_part(real_bundle, task.name).graph.weights)
    assert all(tensor.ByteSize() < 8192 for tensor in graph.initializer if tensor.name not in stored)


def test_zero_biases_and_layer_norms_of_ones_are_no_less_stored(tiny_bundle: Bundle, tiny_base: Path):
    values = merged_values(task_part(tiny_bundle, "first"))
    parameters = load_file(tiny_base / "model.safetensors")
    assert values.keys() == {f"bert.{name}" for name in parameters} | HEAD
    zeros, ones = ([name for name, array in parameters.items() if (array == value).all()] for value in (0, 1))
    assert (len(zeros), len(ones)) == (
        18,
        5,
    )  # 2 layers: 6 dense and 2 norm biases each, 1 embedding norm, 1 pooler; 5 norms
    for name in zeros + ones:
        np.testing.assert_array_equal(values[f"bert.{name}"], parameters[name])


def test_the_weights_that_onnx_finds_are_the_merged_models(tiny_bundle: Bundle):
    part = task_part(tiny_bundle, "first")
    values = merged_values(part)
    loaded = {tensor.name: tensor for tensor in onnx.load(model_path(tiny_bundle, "first")).graph.initializer}
    for name, weight in part.graph.weights.items():
        found = onnx.numpy_helper.to_array(loaded[name])
        np.testing.assert_array_equal(found, to_graph(values[name], weight.order))
        assert (weight.shape, weight.dtype, weight.stored) == (found.shape, found.dtype.name, "plain")


def test_base_weights_are_stored_once_and_without_the_head(real_bundle: Bundle, real_base: Path):
    (file,) = real_bundle.manifest.base.weights
    stored = {name.split("@")[0] for name in TensorFile(real_bundle.checked(file))}
    assert stored == {f"bert.{name}" for name in load_file(real_base / "model.safetensors")} - {
        "bert.embeddings.position_ids"
    }


@pytest.mark.parametrize("task", ["movies", "supersense"])
def test_a_task_stores_only_what_it_changes(real_bundle: Bundle, task: str):
    part = real_bundle.task(task).parts[MODEL]
    adapted = {
        f"bert.encoder.layer.{layer}.attention.self.{target}.weight@1,0"
        for layer in range(6)
        for target in ("query", "value")
    }
    assert set(TensorFile(real_bundle.checked(part.weights))) == adapted | HEAD
    assert part.model.size < 100_000


def test_a_second_head_adds_a_graph_but_no_base_weights(real_bundle: Bundle):
    assert {graph.head.outputs for graph in real_bundle.manifest.graphs.values()} == {2, 12}
    assert len(real_bundle.manifest.base.weights) == 1
    base_file = real_bundle.manifest.base.weights[0].path
    for task in ("movies", "supersense"):
        graph = onnx.load(model_path(real_bundle, task), load_external_data=False).graph
        places = {
            entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"
        }
        assert places == {base_file, real_bundle.task(task).parts[MODEL].weights.path}


def test_second_task_with_the_same_head_adds_no_base_weights_and_needs_no_trace(
    tiny_copy: Path, tiny_base: Path, write_adapter, snapshot
):
    before = snapshot(tiny_copy)
    second = export_task(Request(tiny_base, write_adapter(seed=1), "second"), tiny_copy)
    assert (second.traced, second.base_bytes) == (False, 0)
    assert set(second.bundle.manifest.tasks) == {"first", "second"}
    assert len(second.bundle.manifest.base.weights) == 1
    added = snapshot(tiny_copy).keys() - before.keys()
    assert added == {file.path for file in task_files(second.bundle.task("second"))}
    assert (
        sum((tiny_copy / path).stat().st_size for path in added)
        == second.graph_bytes + second.changed_bytes + second.adapter_bytes
    )


def test_what_an_export_reports_is_what_lies_on_disk(tiny_copy: Path, tiny_base: Path, write_adapter):
    exported = export_task(Request(tiny_base, write_adapter(seed=1), "second"), tiny_copy)
    part = task_part(exported.bundle, "second")
    stored = TensorFile(tiny_copy / part.part.weights.path)
    assert {key(name, part.graph.weights[name].order) for name in exported.changed} == set(stored)
    assert open_bundle(tiny_copy) == exported.bundle


def test_a_task_whose_graph_is_known_needs_no_torch(tiny_copy: Path, tiny_base: Path, write_adapter):
    program = (
        "import sys; from pathlib import Path; from exporter.task import *; base, adapter, out = map(Path,"
        " sys.argv[1:])"
    )
    program += "; export_task(Request(base, adapter, 'second'), out); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program, tiny_base, write_adapter(), tiny_copy],
        check=True,
        capture_output=True,
        text=True,
    )
    assert {"torch", "transformers", "onnxscript"}.isdisjoint(done.stdout.split())
    assert set(open_bundle(tiny_copy).manifest.tasks) == {"first", "second"}


def test_labels_are_numbered_where_none_are_given(tiny_copy: Path, tiny_base: Path, write_adapter):
    assert export_task(Request(tiny_base, write_adapter(), "second"), tiny_copy).bundle.task("second").labels == (
        "LABEL_0",
        "LABEL_1",
    )


def test_a_bundle_holds_the_adapter_and_the_bases_side_files_unchanged(tiny_bundle: Bundle, tiny_base: Path):
    for file in tiny_bundle.manifest.base.files:
        assert tiny_bundle.checked(file).read_bytes() == (tiny_base / Path(file.path).name).read_bytes()
    for file in tiny_bundle.task("first").adapter:
        assert (
            tiny_bundle.checked(file).read_bytes()
            == (tiny_bundle.path.parent / "adapter" / Path(file.path).name).read_bytes()
        )


# --- Stock ONNX reads it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["movies", "supersense"])
def test_onnx_finds_the_model_valid_and_infers_every_shape(real_bundle: Bundle, task: str):
    path = model_path(real_bundle, task)
    onnx.checker.check_model(str(path), full_check=True)
    inferred = onnx.shape_inference.infer_shapes(
        onnx.load(path, load_external_data=False), check_type=True, strict_mode=True, data_prop=True
    ).graph
    known = {value.name: value for value in (*inferred.value_info, *inferred.output)}
    assert [
        output
        for node in inferred.node
        for output in node.output
        if not known[output].type.tensor_type.HasField("shape")
    ] == []


@pytest.mark.parametrize("task", ["movies", "supersense"])
def test_stock_onnxruntime_loads_the_model_by_path_and_equals_torch(
    real_bundle: Bundle, token_ids, task: str, shape: tuple[int, int]
):
    """Two engines with kernels of their own: each is held to the same weights in float64."""
    part = task_part(real_bundle, task)
    inputs, values = token_ids(shape), merged_values(part)
    exact = streamed_runner(part, values.__getitem__)(inputs)
    got = onnxruntime.InferenceSession(str(model_path(real_bundle, task))).run(None, inputs)[0]
    bound = engine_bound(model_path(real_bundle, task), shape[1]) * np.abs(exact).max()
    np.testing.assert_allclose(got, exact, rtol=0, atol=bound, err_msg="ONNX Runtime")
    np.testing.assert_allclose(torch_runner(part, values)(inputs), exact, rtol=0, atol=bound, err_msg="torch")


def planted(error: str, merged: dict[str, Array], base: dict[str, Array]) -> dict[str, Array]:
    """``merged`` with one error in it."""
    changed = [name for name in merged if not np.array_equal(merged[name], base[name])]
    first, last = changed[0], changed[-1]
    match error:
        case "the first weight unmerged":
            return merged | {first: base[first]}
        case "the last weight unmerged":
            return merged | {last: base[last]}
        case "one row of the last weight unmerged":
            return merged | {last: np.concatenate([base[last][:1], merged[last][1:]])}
        case "the first weight transposed":
            return merged | {first: merged[first].T}
        case "another scaling, by a thousandth":
            return merged | {
                name: base[name] + 1.001 * (merged[name].astype(np.float64) - base[name]) for name in changed
            }
    return merged | {name: merged[name].astype(bfloat16).astype(np.float64) for name in changed}


@pytest.mark.parametrize("task", ["movies", "supersense"])
@pytest.mark.parametrize(
    "error",
    [
        "the first weight unmerged",
        "the last weight unmerged",
        "one row of the last weight unmerged",
        "the first weight transposed",
        "another scaling, by a thousandth",
        "weights rounded to bfloat16",
    ],
)
def test_the_bound_on_engines_is_below_what_errors_of_a_merge_do(real_bundle: Bundle, token_ids, task: str, error: str):
    """In float64, which every processor computes alike at this size: an engine with the error is off by at least this
    much less its bound.
    """
    part = task_part(real_bundle, task)
    inputs, merged = token_ids((3, 7)), merged_values(part)
    wrong = planted(error, merged, base_values(part))
    exact, found = (streamed_runner(part, values.__getitem__)(inputs) for values in (merged, wrong))
    assert np.abs(found - exact).max() > engines_bound(model_path(real_bundle, task), 7) * np.abs(exact).max()


# --- Reproducible, and of no machine -------------------------------------------------------------------------------


def test_another_process_and_place_gives_the_same_bytes(tiny_bundle: Bundle, tiny_base: Path, tmp_path: Path, snapshot):
    shutil.copytree(tiny_base, tmp_path / "elsewhere" / "model")
    shutil.copytree(tiny_bundle.path.parent / "adapter", tmp_path / "elsewhere" / "tuned")
    program = (
        "from pathlib import Path; from exporter.task import *; export_task(Request(Path('model'), Path('tuned'),"
        " 'first', ('no', 'yes')), Path('out'))"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        cwd=tmp_path / "elsewhere",
        env=os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"},
    )
    assert snapshot(tmp_path / "elsewhere" / "out") == snapshot(tiny_bundle.path)


@pytest.mark.parametrize("bundle", ["tiny_bundle", "real_bundle"])
def test_no_path_of_this_machine_is_in_any_file(
    request: pytest.FixtureRequest, bundle: str, tiny_base: Path, real_base: Path
):
    folder = request.getfixturevalue(bundle).path
    paths = [
        tiny_base,
        real_base,
        folder,
        folder.parent,
        MOVIES.adapter,
        Path(onnx.__file__).parent,
        Path(sys.prefix),
        Path.cwd(),
    ]
    contents = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for word in [*(os.fsencode(path) for path in paths), b"site-packages"]:
        assert [path.name for path, content in contents.items() if word in content] == []
    assert [path.name for path, content in contents.items() if path.suffix == ".onnx" and b".py" in content] == []


def test_the_manifest_records_what_went_in_and_which_tools_did_it(tiny_bundle: Bundle, tiny_base: Path):
    assert tiny_bundle.manifest.base.sha256 == describe(tiny_base, "model.safetensors").sha256
    assert tiny_bundle.manifest.versions == {"lorafuse": "0.1.0", "onnx": onnx.__version__}


# --- Replacing a task ----------------------------------------------------------------------------------------------


def test_replacing_a_task_removes_its_former_files_and_leaves_foreign_ones(
    tiny_copy: Path, tiny_base: Path, write_adapter, check_files
):
    (tiny_copy / "notes.txt").write_text("mine")
    former = {file.path for file in task_files(open_bundle(tiny_copy).task("first"))}
    export_task(Request(tiny_base, write_adapter(seed=5), "first", ("a", "b")), tiny_copy)
    check_files(tiny_copy)
    assert [path for path in former if (tiny_copy / path).exists()] == []
    assert (tiny_copy / "notes.txt").read_text() == "mine"
    assert open_bundle(tiny_copy).task("first").labels == ("a", "b")


def with_engine(bundle: Path) -> Engine:
    """Give the task ``first`` a built engine."""
    (bundle / "engines").mkdir()
    (bundle / "engines" / "first.plan").write_bytes(b"plan")
    opened = open_bundle(bundle)
    model = opened.task("first").parts[MODEL].model
    engine = Engine("tensorrt", "10", "8.9", model.sha256, "0" * 64, describe(bundle, "engines/first.plan"))
    (bundle / "manifest.json").write_bytes(encode(with_task_engine(opened, "first", MODEL, engine)))
    return engine


def test_engines_survive_the_same_export_again(tiny_copy: Path, tiny_base: Path, check_files):
    engine = with_engine(tiny_copy)
    again = export_task(Request(tiny_base, tiny_adapter(tiny_copy), "first"), tiny_copy)
    assert again.bundle.task("first").parts[MODEL].engines == (engine,)
    check_files(tiny_copy)


def test_engines_of_another_adapter_go(tiny_copy: Path, tiny_base: Path, write_adapter):
    with_engine(tiny_copy)
    again = export_task(Request(tiny_base, write_adapter(seed=5), "first"), tiny_copy)
    assert again.bundle.task("first").parts[MODEL].engines == ()
    assert not (tiny_copy / "engines").exists()


def tiny_adapter(bundle: Path) -> Path:
    """The adapter of ``first``, out of the bundle."""
    return (bundle / open_bundle(bundle).task("first").adapter[0].path).parent


@pytest.mark.parametrize("damaged", ["model", "weights", "adapter", "base"])
def test_exporting_again_repairs_a_damaged_bundle_as_the_error_says(
    tiny_copy: Path, tiny_bundle: Bundle, tiny_base: Path, check_files, snapshot, damaged: str
):
    task, part = tiny_bundle.task("first"), tiny_bundle.task("first").parts[MODEL]
    base = tiny_bundle.manifest.base.weights[0]
    file = {"model": part.model, "weights": part.weights, "adapter": task.adapter[1], "base": base}[damaged]
    os.truncate(tiny_copy / file.path, file.size - 4)
    with pytest.raises(BundleError, match="export the task again"):
        check_files(tiny_copy)
    export_task(Request(tiny_base, tiny_bundle.path.parent / "adapter", "first", task.labels), tiny_copy)
    assert snapshot(tiny_copy) == snapshot(tiny_bundle.path)


@pytest.fixture
def headed_base(tiny_base: Path, tmp_path: Path) -> Path:
    """``tiny_base`` with a head of two classes of its own."""
    folder = tmp_path / "headed-base"
    transformers.BertForSequenceClassification.from_pretrained(tiny_base, num_labels=2).save_pretrained(folder)
    return folder


def test_a_base_with_a_head_of_its_own_takes_tasks_with_heads_of_any_size(
    headed_base: Path, tmp_path: Path, write_adapter, check_files
):
    adapters = {"two": write_adapter("two", outputs=2), "three": write_adapter("three", outputs=3)}
    made = [
        export_task(Request(headed_base, adapters[name], name), tmp_path / "bundle")
        for name in ("two", "three", "three")
    ]
    assert [(export.traced, export.base_bytes > 0) for export in made] == [(True, True), (True, False), (False, False)]
    assert {graph.head.outputs for graph in made[-1].bundle.manifest.graphs.values()} == {2, 3}
    assert len(made[-1].bundle.manifest.base.weights) == 1
    check_files(tmp_path / "bundle")


# --- Fail closed: the bundle is byte for byte as before, and nothing is left beside it ------------------------------


ADAPTERS: dict[str, tuple[dict, type[LorafuseError], tuple[str, ...]]] = {
    "of a base of another width": (
        {"tensors": {f"{QUERY}.lora_A.weight": np.ones((4, 48))}},
        AdapterError,
        (QUERY[17:], "(32, 48)", "(32, 32)"),
    ),
    "of a model with other modules": (
        {
            "tensors": {
                f"base_model.model.roberta.q.lora_{factor}.weight": np.ones((4, 32) if factor == "A" else (32, 4))
                for factor in "AB"
            }
        },
        AdapterError,
        ("module 'roberta.q' has no weight in the base",),
    ),
    "of a base with another fingerprint": (
        {"metadata": {"base_sha256": "f" * 64}},
        AdapterError,
        ("trained on the base with SHA-256 ffffffffffff…",),
    ),
    "with a tensor nobody consumes": (
        {"tensors": {f"{QUERY}.lora_magnitude_vector": np.ones(32)}},
        AdapterError,
        (f"{QUERY}.lora_magnitude_vector",),
    ),
    "with a module the graph lacks": (
        {"tensors": {"base_model.model.score.weight": np.ones((2, 32))}},
        ExportError,
        ("'score.weight' has no place",),
    ),
    "that changes nothing": (
        {"tensors": NO_CHANGE},
        AdapterError,
        ("changes none of the 4 target weights", "lora_B is zero"),
    ),
    "with half of a factor pair": (
        {"tensors": {f"{QUERY}.lora_B.weight": None}},
        AdapterError,
        (f"{QUERY}.lora_B.weight", "is missing"),
    ),
    "that holds NaN": (
        {"tensors": {f"{QUERY}.lora_A.weight": np.full((4, 32), np.nan)}},
        AdapterError,
        (f"{QUERY}.lora_A.weight", "NaN"),
    ),
    "without a head": (
        {"tensors": {f"base_model.model.{name}": None for name in HEAD}},
        ExportError,
        ("'classifier.", "neither in the base nor in the adapter"),
    ),
    "with half a head": (
        {"tensors": {"base_model.model.classifier.bias": None}},
        ExportError,
        ("'classifier.", "neither in the base nor in the adapter"),
    ),
    "of another task type": (
        {"config": {"task_type": "SEQ_2_SEQ_LM"}},
        ExportError,
        ("can't make a SEQ_2_SEQ_LM model of this base",),
    ),
    "of an unknown task type": ({"config": {"task_type": "NO_SUCH"}}, ExportError, ("task_type 'NO_SUCH'", "SEQ_CLS")),
    "with a field that can't be merged": (
        {"config": {"use_qalora": True}},
        AdapterError,
        ("adapter_config.json", "use_qalora"),
    ),
}


@pytest.mark.parametrize(("changes", "error", "words"), ADAPTERS.values(), ids=ADAPTERS)
def test_export_refuses_an_adapter(
    tiny_copy: Path,
    tiny_base: Path,
    write_adapter,
    refuses,
    changes: dict,
    error: type[LorafuseError],
    words: tuple[str, ...],
):
    adapter = write_adapter(**changes)
    with refuses(error, *words):
        export_task(Request(tiny_base, adapter, "second"), tiny_copy)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


@pytest.mark.parametrize(
    "damage", [Path.unlink, truncate, lambda path: path.write_bytes(b"")], ids=["missing", "truncated", "empty"]
)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_export_refuses_an_adapter_with_a_damaged_file(
    tiny_copy: Path, tiny_base: Path, write_adapter, refuses, name: str, damage: Callable[[Path], object]
):
    adapter = write_adapter()
    damage(adapter / name)
    with refuses(AdapterError, str(adapter), name):
        export_task(Request(tiny_base, adapter, "second"), tiny_copy)


def test_export_refuses_a_folder_that_is_no_adapter(tiny_copy: Path, tiny_base: Path, tmp_path: Path, refuses):
    with refuses(AdapterError, str(tmp_path / "nowhere"), "no such file"):
        export_task(Request(tiny_base, tmp_path / "nowhere", "second"), tiny_copy)


@pytest.mark.parametrize("labels", [("one",), ("one", "two", "three")])
def test_export_refuses_labels_that_do_not_match_the_head(
    tiny_copy: Path, tiny_base: Path, write_adapter, refuses, labels: tuple[str, ...]
):
    with refuses(ExportError, "the head has 2 outputs", f"{len(labels)} labels"):
        export_task(Request(tiny_base, write_adapter(), "second", labels), tiny_copy)


@pytest.mark.parametrize("name", ["../x", "base", "UPPER", ""])
def test_export_refuses_a_task_name_that_can_not_stand_in_a_file_name(
    tiny_copy: Path, tiny_base: Path, write_adapter, refuses, name: str
):
    with refuses(BundleError, repr(name), "lower-case letters"):
        export_task(Request(tiny_base, write_adapter(), name), tiny_copy)


def test_export_refuses_a_bundle_of_another_base(tiny_copy: Path, real_base: Path, refuses):
    with refuses(BundleError, str(tiny_copy), "holds tasks of the base", "use a bundle of its own"):
        export_task(Request(real_base, MOVIES.adapter, "movies"), tiny_copy)


def test_export_refuses_a_folder_that_is_no_bundle(tiny_copy: Path, tiny_base: Path, write_adapter, refuses):
    (tiny_copy / "manifest.json").unlink()
    with refuses(BundleError, str(tiny_copy), "not a bundle (no manifest.json)"):
        export_task(Request(tiny_base, write_adapter(), "second"), tiny_copy)


def test_export_neither_writes_nor_removes_through_a_folder_that_is_a_link(
    tiny_copy: Path, tiny_base: Path, write_adapter, refuses
):
    (tiny_copy / "adapters").rename(tiny_copy.parent / "outside")
    (tiny_copy / "adapters").symlink_to(tiny_copy.parent / "outside")
    with refuses(BundleError, "adapters: a link"):
        export_task(Request(tiny_base, write_adapter(seed=5), "first"), tiny_copy)
    assert len(list((tiny_copy.parent / "outside").rglob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    ("damage", "error"),
    [(shutil.rmtree, CheckpointError), (lambda base: (base / "model.safetensors").unlink(), CheckpointError)],
)
def test_export_refuses_a_base_without_weights(
    tiny_copy: Path, tiny_base: Path, tmp_path: Path, write_adapter, refuses, damage, error
):
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    damage(base)
    with refuses(error, str(base)):
        export_task(Request(base, write_adapter(), "second"), tiny_copy)


def test_export_refuses_a_base_that_lacks_a_weight_and_creates_nothing(tiny_base: Path, tmp_path: Path, write_adapter):
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    del tensors["pooler.dense.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ExportError, match=r"base: 'bert\.pooler\.dense\.weight' is neither in the base nor in the adapter"
    ):
        export_task(Request(base, write_adapter(), "first"), tmp_path / "out" / "bundle")
    assert list((tmp_path / "out").iterdir()) == []


# --- Interrupted, or the disk is full ------------------------------------------------------------------------------

EXPORT_WITH_FILES_LIMITED = """
import resource, sys
from pathlib import Path
from exporter.task import Request, export_task
from lora.errors import BundleError

base, adapter, out = map(Path, sys.argv[1:4])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)
try:
    export_task(Request(base, adapter, "second"), out, print)
except BundleError as error:
    sys.exit(str(error))
"""


def export_with_files_limited(base: Path, adapter: Path, out: Path, limit: int) -> tuple[str, str]:
    """What an export whose files can't grow beyond ``limit`` bytes says: its progress and its error."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", EXPORT_WITH_FILES_LIMITED, base, adapter, out, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1, done.stderr
    return done.stdout.splitlines()[-1], done.stderr.strip()


def test_a_disk_that_fills_up_in_the_base_weights_leaves_nothing(tiny_base: Path, tmp_path: Path, write_adapter):
    out = tmp_path / "out" / "bundle"
    step, error = export_with_files_limited(tiny_base, write_adapter(), out, 1_000_000)
    assert step == "writing the base's weights"
    assert error == f"{out}: can't be written (File too large); the bundle is as it was before"
    assert list(out.parent.iterdir()) == []


def test_a_disk_that_fills_up_in_a_tasks_tensors_leaves_the_former_bundle(
    tiny_copy: Path, tiny_base: Path, write_adapter, snapshot, check_files
):
    before = snapshot(tiny_copy)
    step, error = export_with_files_limited(tiny_base, write_adapter(seed=1), tiny_copy, 10_000)
    assert step == "merging"
    assert error == f"{tiny_copy}: can't be written (File too large); the bundle is as it was before"
    assert snapshot(tiny_copy) == before
    assert list(tiny_copy.parent.glob(".*staging*")) == []
    check_files(tiny_copy)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB in memory."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "lorafuse-tests", mounted], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"a small file system can't be mounted here: {mount.stderr.strip()}")
    yield mounted
    subprocess.run(["umount", mounted], check=True)


def leave_free(disk: Path, size: int) -> None:
    """Fill ``disk`` but for ``size`` bytes."""
    (disk / "filler").unlink(missing_ok=True)
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(bytes(max(0, free - size)))


def test_a_disk_that_is_full_at_any_step_leaves_the_former_bundle(
    small_disk: Path, tiny_bundle: Bundle, tiny_base: Path, write_adapter, snapshot
):
    bundle = Path(shutil.copytree(tiny_bundle.path, small_disk / "bundle"))
    before, request = snapshot(bundle), Request(tiny_base, write_adapter(seed=1), "second")
    errors = []
    for free in range(0, 400_000, 4096):
        leave_free(small_disk, free)
        errors.append(refusal(request, bundle))
        if errors[-1] is None:
            break
        assert snapshot(bundle) == before
        assert sorted(path.name for path in small_disk.iterdir()) == ["bundle", "filler"]
    assert set(errors) == {
        f"{bundle}: can't be written (No space left on device); the bundle is as it was before",
        None,
    }
    assert len(errors) > 10
    assert set(open_bundle(bundle).manifest.tasks) == {"first", "second"}


def refusal(request: Request, bundle: Path) -> str | None:
    """What an export that is refused says."""
    try:
        export_task(request, bundle)
    except BundleError as error:
        return str(error)
    return None


EXPORT = """
import os, shutil, sys
from pathlib import Path
from exporter.task import Request, export_task

base, adapter, source, own = map(Path, sys.argv[2:6])
sees_writes, stride = False, 3
# Linked to below. ONNX refuses a file with several links, so the session's own must not be one.
shutil.copytree(source, own)

def prepare(bundle):
    shutil.copytree(own, bundle, copy_function=os.link)

def change(bundle):
    export_task(Request(base, adapter, sys.argv[6]), bundle)
"""


@pytest.mark.parametrize("task", ["second", "first"], ids=["a further task", "a replaced task"])
def test_an_export_killed_at_any_step_leaves_the_old_or_the_new_bundle(
    tiny_bundle: Bundle, tiny_base: Path, tmp_path: Path, write_adapter, killed_at_every_step, check_files, task: str
):
    bundles = killed_at_every_step(EXPORT, tiny_base, write_adapter(seed=1), tiny_bundle.path, tmp_path / "own", task)
    manifests = [(bundle / "manifest.json").read_bytes() for bundle in bundles]
    old, new = encode(tiny_bundle.manifest), manifests[-1]
    assert len(bundles) > 20
    assert manifests == sorted(manifests, key=[old, new].index)
    assert set(manifests) == {old, new}
    for bundle in bundles:
        check_files(bundle)


def test_an_export_after_a_killed_one_gives_the_same_bundle(
    tiny_copy: Path, tiny_base: Path, write_adapter, snapshot, tmp_path: Path
):
    request = Request(tiny_base, write_adapter(seed=1), "second")
    whole = export_task(request, Path(shutil.copytree(tiny_copy, tmp_path / "whole"))).bundle
    for file in task_files(whole.task("second")):  # moved in, but the manifest that names them never came
        (tiny_copy / file.path).parent.mkdir(parents=True, exist_ok=True)
        (tiny_copy / file.path).write_bytes(b"half-written")
    export_task(request, tiny_copy)
    assert snapshot(tiny_copy) == snapshot(whole.path)


def test_every_step_is_announced(tiny_copy: Path, tiny_base: Path, write_adapter):
    steps: list[str] = []
    export_task(Request(tiny_base, write_adapter(), "second"), tiny_copy, steps.append)
    assert steps == ["reading the adapter", "merging", "writing the bundle"]

"""Adding a task without the base's checkpoint, tasks that are stored as factors, and the base itself as a task."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import pytest
import transformers
from float32_sums import engines_bound

from engines import load
from engines.serving.runtime import Mode, open_runtime
from exporter.bundle.changes import merged_at_load
from exporter.bundle.check import check_bundle
from exporter.bundle.edits import remove_task
from exporter.bundle.listing import listing
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import MODEL, Store
from exporter.bundle.task_part import task_part
from exporter.proof.verify import verify
from exporter.task import Request, add_task, export_task
from lora.errors import AdapterError, BundleError, ExportError
from lora.files.tensorfile import Array, TensorFile


def outputs(bundle: Path, task: str, inputs: dict[str, Array]) -> Array:
    with load(bundle, task, threads=1) as session:
        return session.run(inputs)["logits"]


def test_it_gives_the_files_that_an_export_from_the_base_gives(
    tiny_copy: Path, tiny_base: Path, write_adapter, tmp_path: Path
):
    adapter, other = write_adapter(seed=1), Path(shutil.copytree(tiny_copy, tmp_path / "other"))
    added = add_task(tiny_copy, adapter, "second", ("no", "yes"))
    assert not added.traced
    assert (
        added.bundle.manifest
        == export_task(Request(tiny_base, adapter, "second", ("no", "yes")), other).bundle.manifest
    )
    assert check_bundle(tiny_copy) == []


def test_it_needs_neither_torch_nor_the_base(tiny_copy: Path, write_adapter):
    program = """
import sys
from functools import partial
from pathlib import Path
from exporter.task import add_task
add_task(Path(sys.argv[1]), Path(sys.argv[2]), "second")
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tiny_copy, write_adapter(seed=1)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_labels_are_numbered_where_none_are_given(tiny_copy: Path, write_adapter):
    assert add_task(tiny_copy, write_adapter(seed=1), "second").bundle.task("second").labels == ("LABEL_0", "LABEL_1")


def test_an_adapter_with_a_head_that_no_task_has_is_sent_to_export(tiny_copy: Path, write_adapter, refuses):
    adapter = write_adapter(outputs=5)
    with refuses(BundleError, "no task has a SEQ_CLS head of 5 outputs yet", "lorafuse export"):
        add_task(tiny_copy, adapter, "second")


def test_an_adapter_of_another_base_is_refused(tiny_copy: Path, write_adapter, refuses):
    adapter = write_adapter(metadata={"base_sha256": "f" * 64})
    with refuses(AdapterError, "trained on the base with SHA-256 ffffffffffff"):
        add_task(tiny_copy, adapter, "second")


def flip_the_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (flip_the_last_byte, "SHA-256"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "bytes, but the manifest says"),
        (Path.unlink, "missing"),
    ],
    ids=["a flipped byte", "truncated", "missing"],
)
def test_damaged_base_weights_are_found_before_anything_changes(
    tiny_copy: Path, write_adapter, refuses, change, word: str
):
    adapter = write_adapter(seed=1)
    change(tiny_copy / open_bundle(tiny_copy).manifest.base.weights[0].path)
    with refuses(BundleError, "base-", word):
        add_task(tiny_copy, adapter, "second")


def test_a_graph_that_is_damaged_is_not_taken_for_another_task(tiny_copy: Path, write_adapter, refuses):
    adapter = write_adapter(seed=1)
    flip_the_last_byte(tiny_copy / open_bundle(tiny_copy).task("first").parts[MODEL].model.path)
    with refuses(BundleError, "no task has a SEQ_CLS head of 2 outputs yet"):
        add_task(tiny_copy, adapter, "second")


def test_killed_at_any_step_the_bundle_is_the_old_or_the_new_one(
    tiny_copy: Path, write_adapter, killed_at_every_step, check_files
):
    program = f"""
from shutil import copytree
from exporter.task import add_task
def prepare(bundle):
    copytree({str(tiny_copy)!r}, bundle)
def change(bundle):
    add_task(bundle, Path({str(write_adapter(seed=1))!r}), "second")
stride, sees_writes = 3, False
"""
    tasks = []
    for bundle in killed_at_every_step(program):
        check_files(bundle)
        tasks.append(sorted(open_bundle(bundle).manifest.tasks))
    assert {tuple(found) for found in tasks} == {("first",), ("first", "second")}


# --- Stored as factors ---------------------------------------------------------------------------------------------


def test_factors_hold_what_the_adapter_brings_whole_and_no_merged_tensor(stored_both_ways: Path):
    part = open_bundle(stored_both_ways).task("factors").parts[MODEL]
    assert set(TensorFile(stored_both_ways / part.weights.path)) == {"classifier.weight", "classifier.bias"}
    assert check_bundle(stored_both_ways) == []


def test_factors_are_merged_into_the_numbers_that_a_dense_task_has(stored_both_ways: Path, token_ids):
    bundle = open_bundle(stored_both_ways)
    dense = TensorFile(stored_both_ways / bundle.task("dense").parts[MODEL].weights.path)
    merged = merged_at_load(task_part(bundle, "factors"))
    assert len(merged) == 4
    assert all(np.array_equal(values, dense[f"{name}@1,0"].T) for name, values in merged.items())
    assert merged_at_load(task_part(bundle, "dense")) == {}
    np.testing.assert_array_equal(
        outputs(stored_both_ways, "factors", token_ids()), outputs(stored_both_ways, "dense", token_ids())
    )
    assert (
        np.abs(
            outputs(stored_both_ways, "factors", token_ids()) - outputs(stored_both_ways, "first", token_ids())
        ).max()
        > 0.01
    )


def test_a_task_stored_as_factors_is_verified_like_another(stored_both_ways: Path, token_ids):
    part = task_part(open_bundle(stored_both_ways), "factors")
    result = verify(part, [token_ids()], {"engine": lambda inputs: outputs(stored_both_ways, "factors", dict(inputs))})
    assert result.passed
    assert [stage.name for stage in result.stages if stage.passed] == ["stored weights", "merged torch", "engine"]


def test_an_engine_that_leaves_the_factors_out_is_not_within_the_bound(stored_both_ways: Path, token_ids):
    part = task_part(open_bundle(stored_both_ways), "factors")
    plain = onnxruntime.InferenceSession(stored_both_ways / part.part.model.path)
    assert not verify(part, [token_ids()], {"engine": lambda inputs: plain.run(None, dict(inputs))[0]}).passed


# --- The base itself, and graphs that tasks share --------------------------------------------------------------------


@pytest.fixture
def headed(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny base with a trained head of its own, and a bundle with it as the task ``unadapted``."""
    import transformers

    model = transformers.BertForSequenceClassification.from_pretrained(tiny_base, num_labels=2)
    model.save_pretrained(tmp_path / "headed")
    export_task(Request(tmp_path / "headed", None, "unadapted"), tmp_path / "headed-bundle")
    return tmp_path / "headed-bundle"


def test_the_base_as_a_task_is_the_base(headed: Path, token_ids):
    import torch
    import transformers

    bundle = open_bundle(headed)
    part = task_part(bundle, "unadapted")
    assert (part.task.adapter, part.part.weights) == ((), None)
    with torch.no_grad():
        model = transformers.BertForSequenceClassification.from_pretrained(headed.parent / "headed").eval()
        want = model(**{name: torch.from_numpy(values) for name, values in token_ids().items()}).logits.numpy()
    bound = engines_bound(headed / part.part.model.path, 7) * np.abs(want).max()
    np.testing.assert_allclose(outputs(headed, "unadapted", token_ids()), want, rtol=0, atol=bound)
    assert verify(part, [token_ids()], {}).passed


def test_the_bases_own_head_comes_with_the_first_task_that_needs_it(
    headed: Path, write_adapter, token_ids, tmp_path: Path
):
    """The first task brings a head, so that the bundle has none of the base's."""
    base, out = headed.parent / "headed", tmp_path / "late"
    first = export_task(Request(base, write_adapter("with-head"), "first"), out)
    with pytest.raises(
        ExportError,
        match=(
            r"weight 'classifier\.\w+' .* is neither in the base nor in the adapter; export the task from a checkpoint"
            r" that has it"
        ),
    ):
        add_task(out, without_head(write_adapter, "a", 0), "a")
    unadapted = export_task(Request(base, None, "unadapted"), out)
    assert 0 < unadapted.base_bytes < first.base_bytes // 1000
    assert not add_task(out, without_head(write_adapter, "b", 0), "b").traced
    assert not export_task(Request(base, write_adapter("again", seed=1), "second"), out).traced
    np.testing.assert_array_equal(outputs(out, "unadapted", token_ids()), outputs(headed, "unadapted", token_ids()))
    assert check_bundle(out) == []


def without_head(write_adapter, name: str, seed: int) -> Path:
    tensors = {"base_model.model.classifier.weight": None, "base_model.model.classifier.bias": None}
    return write_adapter(name, seed=seed, tensors=tensors, config={"modules_to_save": None})


def test_factors_without_a_head_share_one_graph_that_stock_runtimes_open(headed: Path, write_adapter, token_ids):
    for seed, name in enumerate(("a", "b")):
        add_task(headed, without_head(write_adapter, name, seed), name, store="factors")
    bundle = open_bundle(headed)
    shared = bundle.task("a").parts[MODEL].model
    assert shared == bundle.task("b").parts[MODEL].model == bundle.task("unadapted").parts[MODEL].model
    assert shared.path.startswith("base-")
    plain = onnxruntime.InferenceSession(headed / shared.path).run(None, token_ids())[0]
    np.testing.assert_array_equal(plain, outputs(headed, "unadapted", token_ids()))
    assert np.abs(outputs(headed, "a", token_ids()) - plain).max() > 1e-4
    remove_task(headed, "a")
    assert check_bundle(headed) == []
    assert np.abs(outputs(headed, "b", token_ids()) - plain).max() > 1e-4


def test_a_graph_that_several_tasks_share_counts_for_none_of_them(headed: Path, write_adapter):
    for seed, name in enumerate(("a", "b")):
        add_task(headed, without_head(write_adapter, name, seed), name, store="factors")
    manifest = open_bundle(headed).manifest
    sizes = {task.task: task.size for task in listing(manifest)}
    assert sizes == {"unadapted": 0} | {
        name: sum(file.size for file in manifest.tasks[name].adapter) for name in ("a", "b")
    }


def test_labels_for_a_model_without_classes_are_refused(tiny_base: Path, tmp_path: Path):
    with pytest.raises(
        ExportError, match=r"a FEATURE_EXTRACTION model has no classes, but labels were given; leave them out"
    ):
        export_task(Request(tiny_base, None, "embeddings", ("a", "b")), tmp_path / "bundle")


def test_a_manifest_says_how_a_task_is_stored(tiny_bundle: Bundle):
    assert msgspec.to_builtins(tiny_bundle.task("first"))["store"] == "dense"


# --- Language models whose two embeddings are one tensor, or not
# -------------------------------------------------------


def save_decoder(folder: Path, **saved: Array) -> Path:
    """A tiny GPT-2 with tied embeddings; its file also holds ``saved``."""
    import transformers
    from safetensors.numpy import load_file, save_file

    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=2, vocab_size=90, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    save_file(load_file(folder / "model.safetensors") | saved, folder / "model.safetensors", {"format": "pt"})
    return folder


def save_decoder_adapter(folder: Path, base: Path, *targets: str, **config) -> Path:
    import peft
    import transformers

    config |= {
        "task_type": "CAUSAL_LM",
        "r": 2,
        "target_modules": list(targets),
        "init_lora_weights": False,
        "fan_in_fan_out": "c_attn" in targets,
    }
    peft.get_peft_model(transformers.GPT2LMHeadModel.from_pretrained(base), peft.LoraConfig(**config)).save_pretrained(
        folder
    )
    return folder


def test_trained_tokens_never_join_a_task_that_has_untied_the_bases_embeddings(tmp_path: Path, snapshot):
    """They would reach the input alone, and the output would be another model's."""
    base = save_decoder(tmp_path / "base")
    output = save_decoder_adapter(tmp_path / "output", base, "lm_head")
    tokens = save_decoder_adapter(tmp_path / "tokens", base, "c_attn", trainable_token_indices={"wte": [3, 5]})
    bundle = export_task(Request(base, output, "output"), tmp_path / "bundle").bundle
    before = snapshot(bundle.path)
    with pytest.raises(
        BundleError, match="no task has a CAUSAL_LM head of 90 outputs yet; add the first with 'lorafuse export'"
    ):
        add_task(bundle.path, tokens, "tokens")
    assert snapshot(bundle.path) == before
    assert export_task(Request(base, tokens, "tokens"), bundle.path).traced
    assert not add_task(bundle.path, output, "again").traced


def test_a_base_with_embeddings_apart_whatever_its_config_says_takes_further_tasks(tmp_path: Path):
    base = save_decoder(
        tmp_path / "base", **{"lm_head.weight": np.random.default_rng(0).normal(size=(90, 32)).astype(np.float32)}
    )
    export_task(Request(base, None, "unadapted"), tmp_path / "bundle")
    adapter = save_decoder_adapter(tmp_path / "adapter", base, "c_attn")
    added = add_task(tmp_path / "bundle", adapter, "further")
    exported = export_task(
        Request(base, adapter, "further"), Path(shutil.copytree(tmp_path / "bundle", tmp_path / "other"))
    )
    assert not task_part(added.bundle, "further").graph.head.tied
    assert added.bundle.manifest == exported.bundle.manifest


# --- A base that has a head of its own, and adapters that bring one of another size ---------------------------------


def of_another_head(base: Path, adapter: Path, bundle: Path, store: Store) -> None:
    export_task(Request(base, adapter, "three", store=store), bundle)


def unadapted(base: Path, adapter: Path, bundle: Path, store: Store) -> None:
    export_task(Request(base, None, "unadapted"), bundle)


@pytest.fixture
def with_head(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny base with a trained head of two outputs."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "with-head"))
    transformers.BertForSequenceClassification.from_pretrained(base, num_labels=2).save_pretrained(base)
    return base


@pytest.mark.parametrize("store", ["dense", "factors"])
@pytest.mark.parametrize(
    "order", [(unadapted, of_another_head), (of_another_head, unadapted)], ids=["the base first", "the adapter first"]
)
def test_a_head_of_another_size_than_the_bases_own_stands_beside_it(
    with_head: Path, tmp_path: Path, write_adapter, token_ids, order, store: Store
):
    adapter, together, apart = write_adapter(seed=1, outputs=3), tmp_path / "together", tmp_path / "apart"
    for step in order:
        step(with_head, adapter, together, store)
        step(with_head, adapter, apart / step.__name__, store)
    add_task(together, write_adapter("added", seed=2, outputs=3), "added", store=store)
    export_task(Request(with_head, tmp_path / "added", "added", store=store), apart / "added")
    assert check_bundle(together) == []
    for task, alone in (("unadapted", "unadapted"), ("three", "of_another_head"), ("added", "added")):
        np.testing.assert_array_equal(outputs(together, task, token_ids()), outputs(apart / alone, task, token_ids()))
        part = task_part(open_bundle(together), task)
        assert verify(part, [token_ids()], {"ONNX graph": partial(outputs, together, task)}).passed


@pytest.mark.parametrize("mode", ["dedicated", "resident"])
def test_the_base_answers_under_a_head_of_another_size_than_its_own(
    with_head: Path, tmp_path: Path, write_adapter, token_ids, mode: Mode
):
    adapter, together, apart = write_adapter(seed=1, outputs=3), tmp_path / "together", tmp_path / "apart"
    unadapted(with_head, adapter, together, "dense")
    found = []
    for bundle in (together, apart):
        of_another_head(with_head, adapter, bundle, "dense")
        with open_runtime(bundle, mode, threads=1) as runtime:
            found.append(runtime.run("three", token_ids(), adapted=False)["logits"])
    np.testing.assert_array_equal(*found)

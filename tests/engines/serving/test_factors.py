"""Tasks that are stored as factors: loading merges them into what a dense task holds, bit for bit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from float32_sums import engines_bound
from onnx import TensorProto, helper
from torch import Tensor, nn

import engines
import exporter
from engines.backends import Model
from engines.backends.onnxruntime import OnnxRuntime
from engines.latency.arm_engines import OnnxRuntimeOpener
from engines.latency.arms import arms_of
from engines.latency.verdict import MERGED
from exporter.bundle import manifest
from exporter.bundle.changes import in_graph_order, merged_at_load
from exporter.bundle.manifest import Bundle, check_sha256, open_bundle
from exporter.bundle.records import MODEL
from exporter.bundle.task_part import task_part
from exporter.task import Request, add_task, export_task
from lora.errors import BundleError, EngineError
from lora.files.tensorfile import Array, TensorFile


def run(bundle: Path, task: str, inputs: dict[str, Array]) -> dict[str, Array]:
    with engines.load(bundle, task, threads=1) as session:
        return session.run(inputs)


def assert_equal_bits(one: dict[str, Array], other: dict[str, Array]) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert values.dtype == other[name].dtype
        np.testing.assert_array_equal(values.view(np.uint8), other[name].view(np.uint8), err_msg=name)


# --- The same numbers as a dense task ------------------------------------------------------------------------------


def test_outputs_are_those_of_the_dense_task(stored_both_ways: Path, tokens: dict[str, Array]):
    assert_equal_bits(run(stored_both_ways, "factors", tokens), run(stored_both_ways, "dense", tokens))
    assert (
        np.abs(
            run(stored_both_ways, "factors", tokens)["logits"] - run(stored_both_ways, "first", tokens)["logits"]
        ).max()
        > 0.01
    )


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_in_half_precision_too(tiny_base: Path, write_adapter, tmp_path: Path, tokens: dict[str, Array], precision):
    adapter = write_adapter(seed=1)
    export_task(Request(tiny_base, adapter, "dense", precision=precision), tmp_path / "bundle")
    bundle = add_task(tmp_path / "bundle", adapter, "factors", store="factors").bundle
    stored = TensorFile(bundle.path / bundle.task("dense").parts[MODEL].weights.path)
    factors = task_part(bundle, "factors")
    merged = in_graph_order(factors, merged_at_load(factors))
    assert {values.dtype.name for values in merged.values()} == {precision}
    assert_equal_bits(merged, {name: stored[f"{name}@1,0"] for name in merged})
    if precision == "float16":  # ONNX Runtime's CPU has no kernels for the other
        assert_equal_bits(run(bundle.path, "factors", tokens), run(bundle.path, "dense", tokens))
    else:
        assert refused(bundle.path, "factors", tokens) == refused(bundle.path, "dense", tokens)


def refused(bundle: Path, task: str, inputs: dict[str, Array]) -> str:
    with pytest.raises(EngineError, match=r"can't load the model \([^\n]+\)$") as refusal:
        run(bundle, task, inputs)
    return str(refusal.value)


def test_onnx_runtime_takes_merged_values_in_bfloat16_by_their_bits(tmp_path: Path):
    values = np.array([1.5, -2.0, 3.25], ml_dtypes.bfloat16)
    kept = TensorProto(name="kept", data_type=TensorProto.BFLOAT16, dims=(3,), data_location=TensorProto.EXTERNAL)
    kept.external_data.add(key="location", value="nowhere.safetensors")
    cast = helper.make_node("Cast", ["kept"], ["wide"], to=TensorProto.FLOAT)
    graph = helper.make_graph(
        [cast], "cast", [], [helper.make_tensor_value_info("wide", TensorProto.FLOAT, (3,))], [kept]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    with OnnxRuntime(threads=1).load(Model(model.SerializeToString(), tmp_path, {"kept": values}), None) as session:
        np.testing.assert_array_equal(session.run({})["wide"], values.astype(np.float32))


class Mixed(nn.Module):
    """Every kind of layer that factors fit: an embedding, two convolutions, a linear layer; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.label, self.image, self.row, self.out = (
            nn.Embedding(9, 8),
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv1d(8, 5, 3),
            nn.Linear(5, 4),
        )

    def forward(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.relu(self.image(image)).mean(dim=3) + self.label(label).unsqueeze(-1)
        return self.out(self.row(rows).mean(dim=2)), rows


def mixed_adapter(folder: Path) -> Path:
    wrapped = peft.get_peft_model(Mixed().eval(), peft.LoraConfig(r=2, target_modules=["label", "image", "row", "out"]))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.3
                )
    wrapped.save_pretrained(folder)
    return folder


def test_embeddings_and_convolutions_of_a_module_are_merged_as_peft_merges_them(tmp_path: Path):
    adapter, example = (
        mixed_adapter(tmp_path / "adapter"),
        {"image": torch.ones(2, 3, 6, 7), "label": torch.ones(2, dtype=torch.long)},
    )
    made = exporter.export(
        Mixed().eval(),
        example,
        tmp_path / "bundle",
        task="factors",
        adapter=adapter,
        outputs=("scores", "rows"),
        store="factors",
    )
    assert (made.bundle.task("factors").parts[MODEL].weights, made.changed_bytes, len(made.changed)) == (None, 0, 4)
    bundle = add_task(tmp_path / "bundle", adapter, "dense").bundle
    image, label = torch.randn(4, 3, 6, 7, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    found = run(tmp_path / "bundle", "factors", {"image": image.numpy(), "label": label.numpy()})
    assert_equal_bits(found, run(tmp_path / "bundle", "dense", {"image": image.numpy(), "label": label.numpy()}))
    with torch.no_grad():
        wanted = peft.PeftModel.from_pretrained(Mixed().eval(), adapter).merge_and_unload()(image, label)
    bound = engines_bound(bundle.path / bundle.task("dense").parts[MODEL].model.path, 7)
    for name, want in zip(("scores", "rows"), wanted, strict=True):
        np.testing.assert_allclose(found[name], want.numpy(), atol=bound * float(want.abs().max()), err_msg=name)


# --- Sessions ------------------------------------------------------------------------------------------------------


def test_sessions_of_two_tasks_with_one_graph_keep_their_own_weights(
    tiny_base: Path, write_adapter, tmp_path: Path, tokens: dict[str, Array]
):
    bundle = tmp_path / "bundle"
    export_task(Request(tiny_base, None, "unadapted"), bundle)
    for seed, name in enumerate(("a", "b")):
        adapter = write_adapter(
            name,
            seed=seed,
            tensors={"base_model.model.classifier.weight": None, "base_model.model.classifier.bias": None},
            config={"task_type": "FEATURE_EXTRACTION", "modules_to_save": None},
        )
        add_task(bundle, adapter, name, store="factors")
        add_task(bundle, adapter, f"{name}-dense")
    assert len({open_bundle(bundle).task(name).parts[MODEL].model for name in ("unadapted", "a", "b")}) == 1
    dense = {name: run(bundle, f"{name}-dense", tokens) for name in ("a", "b")}
    with (
        engines.load(bundle, "a", threads=1) as a,
        engines.load(bundle, "unadapted", threads=1) as unadapted,
        engines.load(bundle, "b", threads=1) as b,
    ):
        for session, want in ((a, dense["a"]), (b, dense["b"]), (a, dense["a"])):
            assert_equal_bits(session.run(tokens), want)
        plain = unadapted.run(tokens)["last_hidden_state"]
    assert min(np.abs(found["last_hidden_state"] - plain).max() for found in dense.values()) > 1e-3


def test_a_session_outlives_the_files_it_was_loaded_from(stored_both_ways: Path, tokens: dict[str, Array]):
    """The merged values are the session's own, not a view of the bundle's files."""
    want = run(stored_both_ways, "dense", tokens)
    with engines.load(stored_both_ways, "factors", threads=1) as session:
        shutil.rmtree(stored_both_ways)
        assert_equal_bits(session.run(tokens), want)


def test_loading_merges_with_numpy_alone(stored_both_ways: Path):
    program = "import sys, engines; engines.load(sys.argv[1], 'factors', threads=1); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, stored_both_ways], capture_output=True, text=True, check=True)
    assert {"torch", "transformers", "onnx", "typer", "peft", "rich"}.isdisjoint(done.stdout.split())


# --- Damage --------------------------------------------------------------------------------------------------------


def file_of(bundle: Bundle, kind: str) -> Path:
    task = bundle.task("factors")
    files = {
        "graph": task.parts[MODEL].model,
        "head": task.parts[MODEL].weights,
        "configuration": task.adapter[0],
        "factors": task.adapter[1],
    }
    return bundle.path / (files | {"base": bundle.manifest.base.weights[0]})[kind].path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [(flip, "content does not match the manifest's SHA-256"), (Path.unlink, "missing from the bundle")],
)
@pytest.mark.parametrize("kind", ["graph", "head", "configuration", "factors", "base"])
def test_every_file_that_is_merged_is_checked_first(
    stored_both_ways: Path, kind: str, damage: Callable[[Path], object], words: str
):
    damaged = file_of(open_bundle(stored_both_ways), kind)
    damage(damaged)
    with pytest.raises(BundleError) as error:
        engines.load(stored_both_ways, "factors")
    assert str(error.value) == f"{damaged}: {words}; export the task again"


def test_a_dense_task_does_not_need_its_adapter(stored_both_ways: Path, tokens: dict[str, Array]):
    want = run(stored_both_ways, "dense", tokens)
    for file in open_bundle(stored_both_ways).task("dense").adapter:
        (stored_both_ways / file.path).unlink()
    assert_equal_bits(run(stored_both_ways, "dense", tokens), want)


def test_the_base_as_it_is_has_no_factors_to_merge(tiny_base: Path, tmp_path: Path, tokens: dict[str, Array]):
    for store in ("dense", "factors"):
        export_task(Request(tiny_base, None, store, store=store), tmp_path / "bundle")
    assert_equal_bits(run(tmp_path / "bundle", "factors", tokens), run(tmp_path / "bundle", "dense", tokens))


def test_the_merged_arm_of_the_harness_is_merged(stored_both_ways: Path, tokens: dict[str, Array]):
    arms = arms_of(task_part(open_bundle(stored_both_ways), "factors"), OnnxRuntimeOpener(1)).arms
    with next(arm for arm in arms if arm.name == MERGED).open() as session:
        assert_equal_bits(session.run(tokens), run(stored_both_ways, "dense", tokens))


def test_the_bases_weights_are_hashed_once_a_load(stored_both_ways: Path, monkeypatch: pytest.MonkeyPatch):
    hashed: list[str] = []
    monkeypatch.setattr(
        manifest, "check_sha256", lambda path, *rest: hashed.append(path.name) or check_sha256(path, *rest)
    )
    with engines.load(stored_both_ways, "factors", threads=1):
        assert len([name for name in hashed if name.startswith("base-") and name.endswith(".safetensors")]) == 1

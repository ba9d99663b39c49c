"""A bundle of a model that is written by hand, made without torch in a second: for what is tried ten thousand times.

The model embeds tokens, multiplies by two square matrices, sums what the mask lets count, and ends in a head. Square
matrices fit in either axis order, so that a wrong order shows in the answer and not in a shape. Four tasks share its
graph: ``left`` changes the one matrix, ``right`` the other, ``both`` two, and ``merged`` is ``both`` stored as factors.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from exporter.base_graph import BaseGraph
from exporter.bundle.layout import key
from exporter.bundle.manifest import Bundle
from exporter.bundle.records import MODEL, Base, Graph, Head, Port, Store, Weight
from exporter.bundle.staging import describe, named_by_content, staging
from exporter.task import add_task, recipe_of
from exporter.writing import TaskDraft, write_task
from lora.files.tensorfile import Array, Lazy, TensorFile, write_tensors

VOCABULARY, WIDTH, OUTPUTS, LONGEST = 24, 8, 2, 16
LEFT, RIGHT, HEAD = "left.weight", "right.weight", "score.weight"
TASKS: dict[str, tuple[tuple[str, ...], Store]] = {
    "left": (("left",), "dense"),
    "right": (("right",), "dense"),
    "both": (("left", "right"), "dense"),
    "merged": (("left", "right"), "factors"),
}
WEIGHTS = {
    "embed.weight": Weight(None, (VOCABULARY, WIDTH), "float32"),
    LEFT: Weight((1, 0), (WIDTH, WIDTH), "float32"),
    RIGHT: Weight((1, 0), (WIDTH, WIDTH), "float32"),
    HEAD: Weight((1, 0), (WIDTH, OUTPUTS), "float32"),
}
PORTS = (Port("input_ids", "int64", ("batch", "sequence")), Port("attention_mask", "int64", ("batch", "sequence")))


def hand_made_bundle(path: Path) -> Bundle:
    """The bundle in the folder ``path``, which is made."""
    adapters = {task: _adapter(path.parent / f"{path.name}-adapter-{task}", task) for task in TASKS}
    with staging(path) as stage:
        write_tensors(stage / "base.safetensors", {key(name, WEIGHTS[name].order): _base(name) for name in _held()})
        file = named_by_content(stage / "base.safetensors", "base")
        (stage / "base").mkdir()
        (stage / "base" / "config.json").write_text("{}")
        base = Base("0" * 64, "float32", LONGEST, VOCABULARY, (file,), (describe(stage, "base/config.json"),))
        graph = BaseGraph(_graph(), _proto(), (TensorFile(stage / file.path),), added=(file,), traced=False)
        head, recipe = {MODEL: _graph().head}, recipe_of(adapters["left"])
        draft = TaskDraft("left", recipe, head, (), "dense")
        bundle = write_task(path, stage, draft, {MODEL: graph}, base, lambda step, share=None: None).bundle
    for task, (_, store) in list(TASKS.items())[1:]:
        bundle = add_task(path, adapters[task], task, store=store).bundle
    return bundle


def inputs(seed: int = 0) -> dict[str, Array]:
    """Two rows of tokens, the second one padded."""
    ids = np.random.default_rng(seed).integers(1, VOCABULARY, (2, 5))
    mask = np.ones_like(ids)
    mask[1, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _held() -> list[str]:
    return [name for name in WEIGHTS if name != HEAD]  # each task brings its own head


def _base(name: str) -> Lazy:
    shape = WEIGHTS[name].shape
    seed = sorted(WEIGHTS).index(name)
    return Lazy(np.dtype(np.float32), shape, lambda: _normal(seed, shape))


def _normal(seed: int, shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _adapter(folder: Path, task: str) -> Path:
    """PEFT's folder of a task; ``merged`` is ``both``'s."""
    modules, _ = TASKS[task]
    seed = 100 + 10 * list(TASKS).index("both" if task == "merged" else task)
    tensors = {"base_model.model.score.weight": _normal(seed, (OUTPUTS, WIDTH))}
    for number, module in enumerate(modules):
        tensors[f"base_model.model.{module}.lora_A.weight"] = _normal(seed + 2 * number + 1, (2, WIDTH))
        tensors[f"base_model.model.{module}.lora_B.weight"] = _normal(seed + 2 * number + 2, (WIDTH, 2))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": list(modules)}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["score"]}))
    return folder


def _graph() -> Graph:
    outputs = (Port("logits", "float32", ("batch", OUTPUTS)),)
    return Graph(MODEL, Head("MODULE", OUTPUTS), PORTS, outputs, dict(WEIGHTS))


def _proto() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Gather", ["embed.weight", "input_ids"], ["embedded"]),
        helper.make_node("MatMul", ["embedded", LEFT], ["first"]),
        helper.make_node("Tanh", ["first"], ["bent"]),
        helper.make_node("MatMul", ["bent", RIGHT], ["second"]),
        helper.make_node("Cast", ["attention_mask"], ["counts"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["counts", "last"], ["column"]),
        helper.make_node("Mul", ["second", "column"], ["counted"]),
        helper.make_node("ReduceSum", ["counted", "middle"], ["summed"], keepdims=0),
        helper.make_node("MatMul", ["summed", HEAD], ["logits"]),
    ]
    ports = [helper.make_tensor_value_info(port.name, TensorProto.INT64, port.shape) for port in PORTS]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ("batch", OUTPUTS))
    constants = [
        helper.make_tensor(name, TensorProto.INT64, (1,), [axis]) for name, axis in (("last", 2), ("middle", 1))
    ]
    weights = [
        TensorProto(name=name, data_type=TensorProto.FLOAT, dims=weight.shape, data_location=TensorProto.EXTERNAL)
        for name, weight in WEIGHTS.items()
    ]
    graph = helper.make_graph(nodes, "hand made", ports, [logits], [*constants, *weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)

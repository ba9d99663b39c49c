"""A language model and a model of images through the ``lorafuse`` command and the TensorRT-RTX builder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

from engines import load
from engines.backends import BuildOptions
from engines.building.build import Asked, build
from engines.feeds.generate import greedy, stop_tokens
from engines.feeds.inputs import empty_cache, random_inputs, sizes
from engines.feeds.text import TextEncoder
from exporter.bundle.manifest import Bundle
from exporter.bundle.task_part import task_part
from exporter.task import Request, export_task
from lora.errors import BundleError, EngineError

COMMAND = Path(sys.executable).with_name("lorafuse")
EXAMPLE = Path(__file__).resolve().parents[2] / "scripts" / "examples" / "serving.py"
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PROMPT = "a small wild cat is"


def lorafuse(*arguments: str | Path, status: int = 0) -> str:
    done = subprocess.run([COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


@pytest.fixture(scope="module")
def language(real_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny Llama with MiniLM's real tokenizer, and an adapter of it."""
    folder = tmp_path_factory.mktemp("language")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=30522, **SMALL, initializer_range=0.3, max_position_embeddings=128)
    )
    model.save_pretrained(folder / "base")
    shutil.copyfile(real_base / "tokenizer.json", folder / "base" / "tokenizer.json")
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)).save_pretrained(
        folder / "adapter"
    )
    return export_task(Request(folder / "base", folder / "adapter", "chat"), folder / "bundle").bundle


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("images")
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(**SMALL, image_size=32, patch_size=8, num_labels=3)
    )
    model.save_pretrained(folder / "base")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], init_lora_weights=False
    )
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")
    return export_task(
        Request(folder / "base", folder / "adapter", "shapes", ("circle", "square", "star")), folder / "bundle"
    ).bundle


def test_a_text_is_completed_within_what_the_base_takes(language: Bundle):
    """128 positions: a prompt that leaves room for some tokens gets those, one that leaves none is refused, as is one
    without tokens.
    """
    long = "a " * 120
    (made,) = json.loads(lorafuse("run", language.path, "--task", "chat", "--text", long, "--tokens", "64", "--json"))
    assert 0 < len(made["tokens"]) <= 6
    said = lorafuse("run", language.path, "--task", "chat", "--text", "a " * 300, status=3)
    assert "has 302 tokens, and the base takes 128 with what follows; give a shorter one" in said


def test_run_completes_a_text(language: Bundle):
    (made,) = json.loads(lorafuse("run", language.path, "--task", "chat", "--text", PROMPT, "--tokens", "5", "--json"))
    encoder = TextEncoder(language)
    with load(language.path, "chat", threads=1) as session:
        inputs = encoder.encode([PROMPT], task_part(language, "chat").graph)
        (tokens,) = greedy(session, inputs, 5, stop_tokens(language))
    completion = encoder.completion(inputs["input_ids"][0].tolist(), tokens)
    assert made == {"text": PROMPT, "completion": completion, "tokens": tokens}
    assert completion.startswith(" ")
    assert len(tokens) == 5
    assert (
        lorafuse("run", language.path, "--task", "chat", "--text", PROMPT, "--tokens", "5") == f"{PROMPT}{completion}\n"
    )


@pytest.mark.parametrize("mode", ["dedicated", "resident"])
def test_the_example_generates_what_the_command_does(language: Bundle, mode: str):
    (prompt,) = TextEncoder(language).encode([PROMPT], task_part(language, "chat").graph)["input_ids"].tolist()
    (made,) = json.loads(lorafuse("run", language.path, "--task", "chat", "--text", PROMPT, "--tokens", "5", "--json"))
    command = [
        sys.executable,
        EXAMPLE,
        language.path,
        "--task",
        "chat",
        "--ids",
        ",".join(map(str, prompt)),
        "--tokens",
        "5",
        "--mode",
        mode,
    ]
    assert subprocess.check_output(command, text=True) == ",".join(map(str, made["tokens"])) + "\n"


def test_a_batch_of_prompts_is_completed_as_each_alone(language: Bundle):
    encoder, graph = TextEncoder(language), task_part(language, "chat").graph
    texts = [PROMPT, "of", "the quick brown fox jumps over the lazy dog"]
    with load(language.path, "chat", threads=1) as session:
        together = greedy(session, encoder.encode(texts, graph), 6)
        assert together == [greedy(session, encoder.encode([text], graph), 6)[0] for text in texts]


@pytest.mark.parametrize("kind", ["language", "images"])
def test_verify_holds_the_task_to_its_formula(request: pytest.FixtureRequest, kind: str):
    bundle = request.getfixturevalue(kind)
    (task,) = bundle.manifest.tasks
    result = json.loads(lorafuse("verify", bundle.path, "--task", task, "--json"))
    assert result["passed"]
    assert [stage["name"] for stage in result["stages"]] == [
        "stored weights",
        "merged torch",
        "ONNX graph",
        "engine onnxruntime",
    ]


def test_a_model_of_images_takes_no_texts(images: Bundle, tmp_path: Path):
    (tmp_path / "texts").write_text("a text\n")
    assert "task 'shapes' takes no text; leave --texts out" in lorafuse(
        "verify", images.path, "--task", "shapes", "--texts", tmp_path / "texts", status=3
    )
    assert "task 'shapes' is of type IMAGE_CLS and generates no tokens" in lorafuse(
        "run", images.path, "--task", "shapes", "--text", "x", status=3
    )


def test_text_needs_the_bases_tokenizer(images: Bundle):
    with pytest.raises(BundleError, match=r"came without tokenizer\.json"):
        TextEncoder(images)


@pytest.mark.parametrize(
    ("kind", "task", "loads"),
    [("language", "chat", [(8, 0, 0), (1, 8, 0), (8, 0, 3)]), ("images", "shapes", [(8, 0, 0)])],
)
def test_bench_times_a_decoders_prompt_and_tokens_and_a_model_of_images(
    request: pytest.FixtureRequest, kind: str, task: str, loads: list[tuple[int, ...]]
):
    tokens = ["--tokens", "3"] if kind == "language" else []
    path = request.getfixturevalue(kind).path
    done = subprocess.run(
        [
            COMMAND,
            "bench",
            path,
            "--task",
            task,
            "--length",
            "8",
            *tokens,
            "--seconds",
            "0",
            "--margin",
            "900%",
            "--json",
        ],
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    points = json.loads(done.stdout)["points"]
    assert [(point["load"]["length"], point["load"]["past"], point["load"]["tokens"]) for point in points] == loads
    assert all(
        [reading["arm"] for reading in point["readings"]] == ["base", "base again", "merged", "unmerged"]
        for point in points
    )


@pytest.mark.parametrize("kind", ["language", "images"])
def test_the_tensorrt_rtx_builder_builds_it(request: pytest.FixtureRequest, kind: str):
    pytest.importorskip("tensorrt_rtx")
    bundle = request.getfixturevalue(kind)
    (task,) = bundle.manifest.tasks
    assert build(bundle.path, task, Asked("tensorrt-rtx", BuildOptions(("8.9",)))).size > 10_000


def test_random_inputs_of_a_decoder_go_together(language: Bundle):
    graph = task_part(language, "chat").graph
    inputs = random_inputs(graph, 30522, sizes(2, length=3, past=4), seed=0)
    assert inputs["attention_mask"].shape == (2, 7)
    np.testing.assert_array_equal(inputs["position_ids"], [[4, 5, 6]] * 2)
    assert {values.shape for name, values in inputs.items() if name.startswith("past_key_values")} == {(2, 4, 4, 8)}
    assert {values.shape for values in empty_cache(graph, 2).values()} == {(2, 4, 0, 8)}
    with load(language.path, "chat", threads=1) as session:
        assert session.run(inputs)["logits"].shape == (2, 3, 30522)


def test_a_cache_of_another_length_than_the_mask_says_is_refused(language: Bundle):
    inputs = random_inputs(task_part(language, "chat").graph, 30522, sizes(1, length=2, past=4), seed=0)
    with (
        load(language.path, "chat", threads=1) as session,
        pytest.raises(EngineError, match=r"'attention_mask' is of shape .* as long as 'input_ids' with the past"),
    ):
        session.run({**inputs, "attention_mask": np.ones((1, 5), np.int64)})

"""``lorafuse train`` as a user calls it."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

COMMAND = Path(sys.executable).with_name("lorafuse")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory, real_base: Path) -> list[str | Path]:
    folder = tmp_path_factory.mktemp("train")
    torch.manual_seed(0)
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 30522,
    }
    transformers.BertModel(transformers.BertConfig(**small)).save_pretrained(folder / "base")
    transformers.AutoTokenizer.from_pretrained(real_base).save_pretrained(folder / "base")
    with (folder / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["review", "stars"],
                *([f"a {'good' if number % 2 else 'bad'} film, {number}", number % 2] for number in range(30)),
            ]
        )
    return [
        "train",
        folder / "base",
        "--data",
        folder / "reviews.csv",
        "--kind",
        "classification",
        "--text",
        "review",
        "--target",
        "stars",
        "--epochs",
        "1",
    ]


def lorafuse(*arguments: str | Path, status: int = 0) -> str:
    done = subprocess.run([COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def test_it_prints_what_the_adapter_has_over_the_baselines(arguments: list[str | Path], tmp_path: Path):
    said = lorafuse(*arguments, "--out", tmp_path / "adapter", "--max-tokens", "4")
    for words in (
        "accuracy on 3 examples that were held out",
        "majority",
        "linear probe",
        "labels, in the order of the outputs: 0,1",
        "30 texts were cut to 4 tokens; --max",
    ):
        assert words in said
    assert (
        lorafuse(*arguments, "--out", tmp_path / "adapter", status=3)
        .splitlines()[-1]
        .endswith("exists already; choose another folder, or remove it")
    )


def test_it_says_when_a_base_takes_no_more_tokens(arguments: list[str | Path], tmp_path: Path):
    base = Path(shutil.copytree(arguments[1], tmp_path / "base"))
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 4}))
    assert "30 texts were cut to 4 tokens; the base takes no more\n" in lorafuse(
        "train", base, *arguments[2:], "--out", tmp_path / "adapter"
    )


def test_machines_get_json(arguments: list[str | Path], tmp_path: Path):
    found = json.loads(lorafuse(*arguments, "--out", tmp_path / "adapter", "--json"))
    assert set(found["scores"]) == {"majority", "linear probe", "adapter"}
    assert found["outcome"]["steps"] == found["outcome"]["planned"] == 1
    assert found["folder"] == str(tmp_path / "adapter")


def test_names_of_targets_may_have_spaces_around_them(arguments: list[str | Path], tmp_path: Path):
    lorafuse(*arguments, "--out", tmp_path / "adapter", "--targets", "query, key,", "--rank", "2")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"] == ["key", "query"]
    said = lorafuse(*arguments, "--out", tmp_path / "other", "--targets", " ,", status=3)
    assert (
        said.splitlines()[-1]
        == "lorafuse: --targets ' ,': names no module; expected names that module paths end in, such as query,value"
    )

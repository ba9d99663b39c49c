"""``lorafuse merge`` and ``lorafuse inspect``, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

LORAFUSE = [sys.executable, "-c", "from engines.commands.main import main; main()"]
A, B = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32), np.ones((4, 2), np.float32)


def lorafuse(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LORAFUSE, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    save_file(
        {"layer.weight": np.ones((4, 6), np.float32), "other.weight": np.zeros((2, 2), np.float32)},
        tmp_path / "base/model.safetensors",
    )
    (tmp_path / "base/config.json").write_text('{"model_type": "bert"}')
    return tmp_path / "base"


def adapter(folder: Path, scale: float = 1.0, **config: object) -> Path:
    folder.mkdir()
    save_file(
        {f"base_model.model.layer.lora_{name}.weight": values for name, values in (("A", A), ("B", B * scale))},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "peft_type": "LORA"} | config))
    return folder


def test_merge_writes_a_checkpoint_and_says_what_rounding_cost(base: Path, tmp_path: Path):
    done = lorafuse("merge", base, adapter(tmp_path / "a"), "--out", tmp_path / "out", "--json")
    report = json.loads(done.stdout)
    assert (report["changed"], report["formula"], report["survivals"][0]["parameter"]) == (
        ["layer.weight"],
        "W + ΔW",
        "layer.weight",
    )
    merged = load_file(tmp_path / "out/model.safetensors")
    np.testing.assert_allclose(merged["layer.weight"], 1 + 2 * B @ A, rtol=1e-6)
    assert (tmp_path / "out/config.json").read_text() == (base / "config.json").read_text()


def test_merge_combines_adapters_by_weight_in_any_order(base: Path, tmp_path: Path):
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two", scale=3.0)
    for out, order in (("x", (f"{one}=0.5", f"{two}=0.25")), ("y", (f"{two}=0.25", f"{one}=0.5"))):
        assert (
            lorafuse("merge", base, "--adapter", order[0], "--adapter", order[1], "--out", tmp_path / out).returncode
            == 0
        )
    x, y = (load_file(tmp_path / out / "model.safetensors")["layer.weight"] for out in "xy")
    np.testing.assert_allclose(x, 1 + 2 * (0.5 + 0.75) * B @ A, rtol=1e-5)
    assert x.tobytes() == y.tobytes()


def test_only_changed_and_dtype(base: Path, tmp_path: Path):
    assert (
        lorafuse(
            "merge", base, adapter(tmp_path / "a"), "--out", tmp_path / "out", "--only-changed", "--dtype", "float16"
        ).returncode
        == 0
    )
    assert {name: values.dtype for name, values in load_file(tmp_path / "out/changed.safetensors").items()} == {
        "layer.weight": np.float16
    }


def test_inspect_says_what_an_adapter_is_and_which_tensors_it_changes(base: Path, tmp_path: Path):
    done = lorafuse("inspect", adapter(tmp_path / "a", use_rslora=True), "--base", base, "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["format"], found["refused"]) == (0, "PEFT", None)
    assert found["rows"] == [
        {
            "module": "layer",
            "kind": "linear",
            "rank": 2,
            "scaling": pytest.approx(4 / 2**0.5),
            "shape": "4×2 · 2×6",
            "tensor": "layer.weight",
        }
    ]


@pytest.mark.parametrize("config", [{"use_qalora": True}, {"r": 3}])
def test_inspect_says_what_would_be_refused_with_status_1(config: dict, base: Path, tmp_path: Path):
    done = lorafuse("inspect", adapter(tmp_path / "a", **config), "--base", base)
    assert (done.returncode, "refused: " in done.stdout) == (1, True)


def test_inspect_says_when_the_base_is_another(base: Path, tmp_path: Path):
    save_file({"layer.weight": np.ones((5, 6), np.float32)}, base / "model.safetensors")
    done = lorafuse("inspect", adapter(tmp_path / "a"), "--base", base)
    assert (done.returncode, "the adapter was trained on another model" in done.stdout) == (1, True)


def kohya(path: Path) -> Path:
    tensors = {
        f"lora_{part}_layer.lora_{slot}.weight": values
        for part in ("unet", "te")
        for slot, values in (("down", A), ("up", B))
    }
    save_file(tensors, path)
    return path


def test_components_of_other_models_are_left_out_and_named(base: Path, tmp_path: Path):
    file = kohya(tmp_path / "kohya.safetensors")
    assert "say which component is to be merged" in lorafuse("merge", base, file, "--out", tmp_path / "out").stderr
    for command in (("merge", base, file, "--out", tmp_path / "out"), ("inspect", file, "--base", base)):
        done = lorafuse(*command, "--component", "unet")
        assert (done.returncode, "because they are for other models: te\n" in done.stdout) == (0, True), done.stderr
    np.testing.assert_allclose(load_file(tmp_path / "out/model.safetensors")["layer.weight"], 1 + B @ A, rtol=1e-5)


BAD = {
    "give one adapter as an argument, or several": ("{base}", "--out", "{tmp}/out"),
    "is not a number; expected ADAPTER=WEIGHT": ("{base}", "--adapter", "{a}=x", "--out", "{tmp}/out"),
    "exists already": ("{base}", "{a}", "--out", "{base}"),
    "no such file or folder; expected": ("{base}", "{tmp}/nothing", "--out", "{tmp}/out"),
    "no such folder": ("{tmp}/nothing", "{a}", "--out", "{tmp}/out"),
    "the option alpha is not for a PEFT adapter": ("{base}", "{a}", "--alpha", "3", "--out", "{tmp}/out"),
    "is not a share": ("{base}", "--adapter", "{a}=1", "--adapter", "{a}=2", "--density", "7", "--out", "{tmp}/out"),
    "Invalid value for '--dtype'": ("{base}", "{a}", "--dtype", "int8", "--out", "{tmp}/out"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line_and_status_3(message: str, base: Path, tmp_path: Path):
    places = {"base": base, "a": adapter(tmp_path / "a"), "tmp": tmp_path}
    done = lorafuse("merge", *(argument.format(**places) for argument in BAD[message]))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1), done.stderr
    assert message in done.stderr
    assert not (tmp_path / "out").exists()

"""Writing a merge: whole checkpoints that transformers loads, changed tensors only, and what a kill leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from lora.bases.opening import open_base
from lora.errors import AdapterError, CheckpointError
from lora.formats.peft import read_peft
from lora.merging.checkpoint import Storing, Written, write_merged
from lora.merging.delta import error_bound
from lora.merging.fit import changes_by_parameter
from lora.merging.merge import apply

LLAMA = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 16}


def llama(folder: Path, tied: bool = True, dtype: torch.dtype = torch.bfloat16, shard: str = "60KB") -> Path:
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied)).to(
        dtype
    ).save_pretrained(folder, max_shard_size=shard)
    return folder


def adapter(base: Path, folder: Path, scale: float = 0.2, **config) -> peft.PeftModel:
    """A random adapter of ``base``, saved by PEFT; returns the unmerged model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | config)
        )
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * scale)
        wrapped.save_pretrained(folder)
    return wrapped


def write(base: Path, adapter_folder: Path, out: Path, storing: Storing = Storing()) -> Written:
    opened = open_base(base)
    return write_merged(
        opened, changes_by_parameter(opened.tensors, read_peft(adapter_folder)), adapter_folder, out, storing
    )


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    return {
        name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in model.state_dict().items()
    }


def assert_merged_alike(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], base: Path, adapter_folder: Path
) -> None:
    """What no merge changes has the same bits; of the rest, each is the formula but for the rounding of float32 sums
    and of the dtype.

    numpy's products are not torch's: which of them has the same last bits depends on the processor.
    """
    assert ours.keys() == theirs.keys()
    tensors = open_base(base).tensors
    changes = changes_by_parameter(tensors, read_peft(adapter_folder))
    for name, values in ours.items():
        assert values.dtype == theirs[name].dtype
        if name not in changes:
            assert torch.equal(values.view(torch.uint8), theirs[name].view(torch.uint8)), name
            continue
        exact = apply(changes[name], tensors[name], np.float64)
        bound = sum(error_bound(change, tensors[name].astype(np.float64)) for change in changes[name])
        if values.dtype != torch.float32:
            bound += np.maximum(np.abs(exact), torch.finfo(values.dtype).tiny) * torch.finfo(values.dtype).eps
        for whose, found in (("ours", values), ("PEFT's", theirs[name])):
            assert (np.abs(found.double().numpy() - exact) <= bound).all(), f"{name}: {whose}"


def test_sharded_bfloat16_merge_loads_in_transformers_and_is_pefts_but_for_rounding(tmp_path: Path):
    base = llama(tmp_path / "base")
    assert len(list(base.glob("*.safetensors"))) > 2, "the base is not sharded"
    theirs = adapter(base, tmp_path / "adapter").merge_and_unload()
    written = write(base, tmp_path / "adapter", tmp_path / "out")
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert_merged_alike(ours.state_dict(), theirs.state_dict(), base, tmp_path / "adapter")
    assert len(written.changed) == 4


def test_gpt2_merge_is_pefts_but_for_rounding(tmp_path: Path):
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).save_pretrained(tmp_path / "base")
    theirs = adapter(
        tmp_path / "base", tmp_path / "adapter", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
    ).merge_and_unload()
    write(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert_merged_alike(ours.state_dict(), theirs.state_dict(), tmp_path / "base", tmp_path / "adapter")


def test_only_changed_holds_exactly_the_tensors_that_differ(tmp_path: Path):
    base = llama(tmp_path / "base")
    adapter(base, tmp_path / "adapter")
    write(base, tmp_path / "adapter", tmp_path / "whole")
    whole = bits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype="auto"))
    before = bits(transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto"))
    written = write(base, tmp_path / "adapter", tmp_path / "out", Storing(only_changed=True))

    from lora.files.tensorfile import TensorFile

    file = TensorFile(tmp_path / "out/changed.safetensors")
    assert tuple(sorted(file)) == written.changed
    assert {name: file[name].tobytes() for name in file} == {
        name: values for name, values in whole.items() if values != before[name]
    }


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_update_of_one_of_two_tied_embeddings_unties_them(target: str, tmp_path: Path):
    base = llama(tmp_path / "base", dtype=torch.float32)
    unmerged = adapter(base, tmp_path / "adapter", target_modules=[target]).eval()
    assert write(base, tmp_path / "adapter", tmp_path / "out").untied
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(12).reshape(2, 6)
    torch.testing.assert_close(merged(ids).logits, unmerged(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_trained_head_that_the_base_lacks_is_added(tmp_path: Path):
    base = llama(tmp_path / "base", dtype=torch.float32)
    head = np.ones((3, 64), np.float32)
    adapter(base, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors") | {"base_model.model.score.weight": head}
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text()) | {"modules_to_save": ["score"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    write(base, tmp_path / "adapter", tmp_path / "out")
    model = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=3)
    assert (model.score.weight.detach().numpy() == head).all()


def test_storing_in_another_dtype_rounds_once_from_float32(tmp_path: Path):
    base = llama(tmp_path / "base", dtype=torch.float32)
    adapter(base, tmp_path / "adapter")
    write(base, tmp_path / "adapter", tmp_path / "whole")
    exact = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    write(base, tmp_path / "adapter", tmp_path / "out", Storing(dtype=np.dtype(ml_dtypes.bfloat16)))
    stored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert all(torch.equal(stored[name], exact[name].to(torch.bfloat16)) for name in exact)


def test_overflow_of_float16_is_an_error_that_names_the_tensor(tmp_path: Path):
    base = llama(tmp_path / "base", dtype=torch.float16)
    adapter(base, tmp_path / "adapter", scale=300.0)
    with pytest.raises(AdapterError, match=r"q_proj.weight' overflows float16; store it in a wider dtype"):
        write(base, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rounding_that_loses_the_update_is_reported_and_keep_wide_saves_it(tmp_path: Path):
    base = llama(tmp_path / "base")
    adapter(base, tmp_path / "adapter", scale=0.002)
    narrow = write(base, tmp_path / "adapter", tmp_path / "narrow", Storing(only_changed=True))
    wide = write(base, tmp_path / "adapter", tmp_path / "wide", Storing(keep_wide=True))
    assert max(survival.lost for survival in narrow.survivals) > 0.5
    assert {survival.dtype for survival in wide.survivals} == {"float32"}
    assert all(survival.lost == 0 for survival in wide.survivals)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "wide") is not None


def test_an_adapter_lost_entirely_in_rounding_is_an_error(tmp_path: Path):
    base = llama(tmp_path / "base")
    adapter(base, tmp_path / "adapter", scale=1e-6)
    with pytest.raises(AdapterError, match="changes none of the 4 target weights"):
        write(base, tmp_path / "adapter", tmp_path / "out")


def test_a_folder_that_is_taken_is_not_touched(tmp_path: Path):
    base = llama(tmp_path / "base")
    adapter(base, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("kept")
    with pytest.raises(CheckpointError, match="exists already"):
        write(base, tmp_path / "adapter", tmp_path / "out")
    assert (tmp_path / "out/mine").read_text() == "kept"


@pytest.mark.parametrize("storing", ["Storing()", "Storing(only_changed=True)", "Storing(dtype=np.dtype('float32'))"])
def test_a_full_disk_leaves_nothing_behind(storing: str, tmp_path: Path):
    base = llama(tmp_path / "base")
    adapter(base, tmp_path / "adapter")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, storing, *map(str, (base, tmp_path / "adapter", tmp_path / "out"))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "can't be written (File too large); nothing was left there" in done.stdout, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path):
    base = llama(tmp_path / "base")
    adapter(base, tmp_path / "adapter")
    for out in ("one", "two"):
        write(base, tmp_path / "adapter", tmp_path / out)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("one", "two"))
    assert one == two


def test_memory_follows_the_largest_tensor_and_not_the_base(tmp_path: Path):
    base = llama(tmp_path / "base")
    adapter(base, tmp_path / "adapter")
    padding = {
        f"model.unused.{index}": np.zeros((4096, 4096), np.float32) for index in range(6)
    }  # 400 MB that the adapter leaves alone
    save_file(padding, base / "model-padding.safetensors")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(padding, "model-padding.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "Storing()", *map(str, (base, tmp_path / "adapter", tmp_path / "out"))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 200_000, "kB of resident memory"


@pytest.mark.parametrize("storing", ["Storing()", "Storing(only_changed=True)"])
def test_two_hundred_kills_never_leave_a_file_that_loads_and_is_wrong(storing: str, tmp_path: Path):
    base = llama(tmp_path / "base", shard="5GB")
    adapter(base, tmp_path / "adapter")
    arguments = [storing, *map(str, (base, tmp_path / "adapter", tmp_path / "outs"))]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=True)
    kills, whole, unreadable = map(int, done.stdout.split())
    assert kills == 100
    assert whole > 0 or unreadable > 0, "no kill fell into a write"


COMMON = """
import os, random, resource, shutil, signal, sys, time
from pathlib import Path
import numpy as np
from lora.bases.opening import open_base
from lora.errors import LorafuseError
from lora.merging.fit import changes_by_parameter
from lora.merging.merge import apply
from lora.merging.checkpoint import Storing, write_merged
from lora.formats.peft import read_peft
from lora.files.tensorfile import TensorFile
storing, base, adapter, out = eval(sys.argv[1]), *map(Path, sys.argv[2:])
def merge(out):
    opened = open_base(base)
    return write_merged(opened, changes_by_parameter(opened.tensors, read_peft(adapter)), adapter, out, storing)
"""
LIMITED = (
    COMMON
    + """
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    merge(out)
except LorafuseError as error:
    print(error)
"""
)
MEASURED = (
    COMMON
    + """
merge(out)
# Not ru_maxrss: that one keeps the parent's peak across exec.
print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))
"""
)
# Forks one merge after another and kills it at a random moment; then every file that loads must be the whole result.
KILLED = (
    COMMON
    + """
out.mkdir()
started = time.perf_counter()
merge(out / "expected")
whole_time = time.perf_counter() - started
expected = {path.name: path.read_bytes() for path in (out / "expected").glob("*.safetensors")}
chance, whole, unreadable = random.Random(0), 0, 0
for run in range(100):
    child = os.fork()
    if child == 0:
        merge(out / f"run-{run}")
        os._exit(0)
    time.sleep(chance.random() * whole_time * 1.5)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for path in (path for path in out.rglob("*.safetensors") if "expected" not in path.parts):
        try:
            TensorFile(path)
        except LorafuseError:
            assert path.parent.name.startswith("."), f"{path} is under the target's name and can't be read"
            unreadable += 1
        else:
            assert path.read_bytes() == expected[path.name], f"{path} loads and is wrong"
            whole += 1
    for left in out.iterdir():
        if left.name != "expected":
            shutil.rmtree(left)
print(100, whole, unreadable)
"""
)

"""Merging against PEFT's load + merge + save, side by side in one run; import time is left out on both sides.

    python -m scripts.benchmarks.merge [FOLDER]

Makes two random bases in FOLDER (default: a temporary one, about 9 GB): GPT-2 medium in float32, and a Llama of 1.2 B
parameters in bfloat16, in shards. Every variant runs in a process of its own, in turn, three times; medians of seconds,
the peak resident memory of the worst run, and whether the results are bit-identical.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
ROUNDS = 3

OURS = """
import sys, time
from pathlib import Path
from lora.merging.several import Blending
from lora.merging.to_folder import Sources, merge_folder
from lora.merging.checkpoint import Storing
from lora.formats.read import ReadOptions
base, adapter, out, only_changed = sys.argv[1:]
started = time.perf_counter()
sources = Sources(Path(base), ((Path(adapter), 1.0),), ReadOptions())
merge_folder(sources, Path(out), Storing(only_changed == "1"), Blending())
seconds = time.perf_counter() - started
print(seconds, next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
THEIRS = """
import sys, time
import peft, torch, transformers
base, adapter, out = sys.argv[1:4]
transformers.AutoModelForCausalLM, peft.PeftModel  # lazy imports happen here
from transformers.models.gpt2 import modeling_gpt2; from transformers.models.llama import modeling_llama
torch.set_num_threads(2)
started = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
seconds = time.perf_counter() - started
print(seconds, next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
COPY = """
import subprocess, sys, time
started = time.perf_counter()
subprocess.run(["cp", "-r", sys.argv[1], sys.argv[3]], check=True)
seconds = time.perf_counter() - started
print(seconds, next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@dataclass(frozen=True)
class Run:
    """One process: the seconds it printed, and its peak resident memory in MB."""

    seconds: float
    peak: float


def main() -> None:
    keep = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    folder = keep or Path(tempfile.mkdtemp(prefix="bench-merge-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, make in (("GPT-2 medium, float32", gpt2_medium), ("Llama 1.2 B, bfloat16, sharded", llama)):
            compare(name, *make(folder), folder / "out")
    finally:
        if keep is None:
            shutil.rmtree(folder)


def compare(name: str, base: Path, adapter: Path, out: Path) -> None:
    """Run every variant in turn and print its median beside PEFT's."""
    variants = {
        "PEFT load + merge + save": (THEIRS,),
        "changed tensors only": (OURS, "1"),
        "full checkpoint": (OURS, "0"),
        "cp -r": (COPY,),
    }
    runs: dict[str, list[Run]] = {variant: [] for variant in variants}
    results: dict[str, Path] = {}
    for round_ in range(ROUNDS):
        for variant, (code, *more) in variants.items():
            target = out / f"{variant.split()[0]}-{round_}"
            out.mkdir(exist_ok=True)
            runs[variant].append(run(code, base, adapter, target, *more))
            shutil.rmtree(results.get(variant, Path("/nonexistent")), ignore_errors=True)
            results[variant] = target
    identical = same_tensors(results["PEFT load + merge + save"], results["full checkpoint"])
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors")) / 1e6
    changed = sum(path.stat().st_size for path in results["changed tensors only"].glob("*.safetensors")) / 1e6
    print(
        f"\n{name}: base {weights:.0f} MB, {changed:.0f} MB changed; full checkpoint bit-identical to PEFT's:"
        f" {identical}"
    )
    print(f"{'':28}{'median s':>10}{'min':>8}{'max':>8}{'peak MB':>10}{'PEFT time / this':>18}{'time / cp':>11}")
    medians = {variant: statistics.median(run.seconds for run in done) for variant, done in runs.items()}
    for variant, done in runs.items():
        seconds = [run.seconds for run in done]
        peak = max(run.peak for run in done)
        ratio, of_copy = medians["PEFT load + merge + save"] / medians[variant], medians[variant] / medians["cp -r"]
        print(
            f"{variant:28}{medians[variant]:10.2f}{min(seconds):8.2f}{max(seconds):8.2f}{peak:10.0f}{ratio:18.1f}{of_copy:11.2f}"
        )
    shutil.rmtree(out)


def run(code: str, base: Path, adapter: Path, out: Path, *more: str) -> Run:
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, base, adapter, out, *more], stdout=printed
        )
        if process.wait():
            sys.exit(f"{out.name}: failed with status {process.returncode}")
        printed.seek(0)
        seconds, peak = printed.read().split()[-2:]
        return Run(float(seconds), float(peak) / 1e3)


def same_tensors(theirs: Path, ours: Path) -> bool:
    """Bit for bit, by name, across however many shards."""
    from lora.bases.checkpoint import Checkpoint

    left, right = Checkpoint(theirs), Checkpoint(ours)
    return set(left) <= set(right) and all((left[name].view("u1") == right[name].view("u1")).all() for name in left)


def gpt2_medium(folder: Path) -> tuple[Path, Path]:
    import transformers

    config = transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16)
    return made(folder / "gpt2-medium", lambda: transformers.GPT2LMHeadModel(config), ["c_attn"], fan_in_fan_out=True)


def llama(folder: Path) -> tuple[Path, Path]:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    )
    return made(folder / "llama-1.2b", lambda: transformers.LlamaForCausalLM(config).bfloat16(), ["q_proj", "v_proj"])


def made(folder: Path, make: Callable[[], Any], targets: list[str], **config: object) -> tuple[Path, Path]:
    """A random base and a random r = 8 adapter of it, once."""
    import peft
    import torch

    base, adapter = folder / "base", folder / "adapter"
    if not (adapter / "adapter_model.safetensors").exists():
        torch.manual_seed(0)
        model = make()
        model.save_pretrained(base, max_shard_size="1GB")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, **config))  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * 0.02)
        wrapped.save_pretrained(str(adapter))
        record = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(record | {"base_model_name_or_path": None}))
    return base, adapter


if __name__ == "__main__":
    main()

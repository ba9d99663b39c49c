"""The economics of a bundle, and a bundle above the 2 GB that a protobuf can hold.

    python -m scripts.benchmarks.bundle [--tasks 100] [--gigabytes 3] [--quick]

1. A random GPT-2 medium and 100 adapters of rank 4 on queries and values in one bundle, stored as factors: its bytes
against the base's and the adapters' own, beside what dense checkpoints would take; three of the tasks are loaded and
compared with PEFT's merged model. 2. A torch module of 3 GB, exported with an adapter: checked by onnx, run by stock
ONNX Runtime, compared with PEFT's merge.

Exit status 1 when a target is missed or an output differs. 6 GB of disk in a temporary folder, 10 GB of memory;
--quick, for 5 tasks and half a gigabyte, needs half of that.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import peft
import torch
import transformers
from safetensors.numpy import save_file
from torch import Tensor, nn

import engines
import exporter
from engines.feeds.inputs import random_inputs, sizes
from exporter.bundle.listing import base_size
from exporter.bundle.manifest import Bundle
from exporter.bundle.records import MODEL
from exporter.bundle.task_part import task_part
from exporter.task import Request, add_task, export_task
from scripts.support.gpt2_medium import base_and_adapters

BASE_SHARE, ADAPTER_SHARE = 1.02, 1.1  # the targets: what a bundle may take of each
BOUND = 1e-5  # of the largest output
WIDTH = 8192
COMPARED = (0, 37, 99)
PAPER = "the paper's GPT-3 175B, 100 tasks: 354 GB against 35 TB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--gigabytes", type=float, default=3)
    parser.add_argument("--quick", action="store_true", help="5 tasks and half a gigabyte.")
    arguments = parser.parse_args()
    tasks, gigabytes = (5, 0.5) if arguments.quick else (arguments.tasks, arguments.gigabytes)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        good = economics(Path(folder), tasks)
    with tempfile.TemporaryDirectory() as folder:
        good &= large(Path(folder), int(gigabytes * 1e9 / (4 * WIDTH * WIDTH)) + 1)
    sys.exit(0 if good else 1)


def economics(folder: Path, count: int) -> bool:
    names = [f"task-{number:02}" for number in range(count)]
    base, adapters = base_and_adapters(folder, names)
    bundle = export_task(Request(base, None, "unadapted"), folder / "bundle").bundle
    peak()
    started = time.perf_counter()
    for name, adapter in zip(names, adapters, strict=True):
        bundle = add_task(bundle.path, adapter, name, store="factors").bundle
    seconds, memory = (time.perf_counter() - started) / count, peak()
    whole, of_base, of_adapters = bytes_below(bundle.path), base_size(bundle.manifest), sum(map(bytes_below, adapters))
    limit = of_base * BASE_SHARE + of_adapters * ADAPTER_SHARE
    dense = count * of_base
    print(
        f"GPT-2 medium, float32, {count} tasks of rank 4 on queries and values, added as factors: {seconds:.2f} s each,"
        f" peak {memory:.2f} GB"
    )
    print(f"  {'base':44}{of_base / 1e6:12.1f} MB")
    print(f"  {'adapters, all files of their own':44}{of_adapters / 1e6:12.1f} MB")
    print(f"  {'bundle':44}{whole / 1e6:12.1f} MB")
    print(
        f"  {f'target: {BASE_SHARE} base + {ADAPTER_SHARE} adapters':44}{limit / 1e6:12.1f} MB "
        f" {'met' if whole <= limit else 'MISSED'}"
    )
    print(f"  {f'{count} dense checkpoints':44}{dense / 1e6:12.1f} MB  {dense / whole:.0f} times the bundle; {PAPER}")
    apart = {
        names[number]: difference(bundle, names[number], base, adapters[number])
        for number in sorted({min(number, count - 1) for number in COMPARED})
    }
    print(
        "  outputs against PEFT's merged model:",
        ", ".join(f"{name} {value:.1e}" for name, value in apart.items()),
        f"of the largest (bound {BOUND:.0e})",
    )
    return whole <= limit and max(apart.values()) <= BOUND


def difference(bundle: Bundle, task: str, base: Path, adapter: Path) -> float:
    inputs = random_inputs(
        task_part(bundle, task).graph, bundle.manifest.base.vocabulary, sizes(batch=1, length=16), seed=0
    )
    with engines.load(bundle.path, task, threads=1) as session:
        found = session.run(inputs)["logits"]
    model = (
        peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter)
        .merge_and_unload()
        .eval()
    )
    with torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(inputs["input_ids"])).logits.numpy()
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


class Large(nn.Module):
    """Square matrices, one after the other."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def large(folder: Path, layers: int) -> bool:
    module, adapter = Large(layers), large_adapter(folder / "adapter")
    peak()
    started = time.perf_counter()
    exported = exporter.export(module, {"x": torch.ones(2, WIDTH)}, folder / "bundle", task="large", adapter=adapter)
    seconds, memory = time.perf_counter() - started, peak()
    model = exported.bundle.path / exported.bundle.task("large").parts[MODEL].model.path
    onnx.checker.check_model(model, full_check=True)
    x = torch.randn(3, WIDTH)
    found = onnxruntime.InferenceSession(model).run(None, {"x": x.numpy()})[0]
    running = peak()
    with torch.no_grad():
        unadapted = module(x).numpy()
        wanted = peft.PeftModel.from_pretrained(module, adapter).merge_and_unload()(x).numpy()
    apart, moved = (float(np.abs(values - wanted).max() / np.abs(wanted).max()) for values in (found, unadapted))
    print(
        f"A module of {exported.base_bytes / 1e9:.2f} GB, {layers} matrices of {WIDTH} × {WIDTH} in float32, with an"
        " adapter on one"
    )
    print(
        f"  {'bundle':44}{bytes_below(exported.bundle.path) / 1e9:12.2f} GB  of which the graph takes"
        f" {exported.graph_bytes / 1e3:.1f} kB"
    )
    print(f"  {'export':44}{seconds:12.1f} s")
    print(
        f"  {'peak memory of the export':44}{memory:12.2f} GB  the module itself included; of checking and running"
        f" afterwards: {running:.2f} GB"
    )
    print(
        f"  onnx.checker passes; ONNX Runtime against PEFT's merge: {apart:.1e} of the largest output (bound"
        f" {BOUND:.0e}; the adapter: {moved:.1e})"
    )
    return apart <= BOUND < moved


def large_adapter(folder: Path) -> Path:
    """Rank 4, on the first matrix."""
    random = np.random.default_rng(0)
    folder.mkdir()
    factors = {"A": random.normal(size=(4, WIDTH)), "B": random.normal(size=(WIDTH, 4))}
    tensors = {
        f"base_model.model.layers.0.lora_{name}.weight": (value / 64).astype(np.float32)
        for name, value in factors.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["layers.0"]})
    )
    return folder


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def peak() -> float:
    """This process's peak resident memory in GB (VmHWM) since it was last asked for."""
    found = next(
        line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    Path("/proc/self/clear_refs").write_text("5")  # starts it anew
    return int(found) * 1024 / 1e9


if __name__ == "__main__":
    main()

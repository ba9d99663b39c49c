"""The demo: three real adapters on one real base, from the adapter's folder to verified engines.

Every figure in the table is measured here. The unmerged adapter is run by PEFT itself, an implementation that this
project shares no code with; all stages see the same token ids.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch

from engines.building.verify_runners import runners
from engines.commands.terminal import print_table
from engines.feeds.text import TextEncoder
from engines.latency.clocks import NAMES
from engines.latency.environment import machine
from engines.latency.report import Report, read_report
from engines.latency.words import interval
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.task_part import task_part
from exporter.proof.reference import merged_values, torch_runner
from lora.files.tensorfile import Array
from lora.wording import megabytes
from scripts.support.demo_tasks import ROOT, TASKS, Example, Task, held_out
from scripts.support.packaged_files import minilm

LORAFUSE = Path(sys.executable).with_name("lorafuse")
OUT = ROOT / "demo-out"
BUNDLE = OUT / "bundle"
STAGES = ("adapter", "merged", "ONNX", "engine")
# Two implementations of one model in float32: their outputs differ by rounding only.
CLOSE = 1e-4

Runner = Callable[[Mapping[str, Array]], Array]


@dataclass(frozen=True)
class Evaluation:
    """Each stage's score on the held-out examples, and how far its outputs are from the unmerged adapter's."""

    examples: int
    scores: dict[str, float]
    differing_predictions: int
    worst_difference: float


def main() -> int:
    """Run everything; the exit status says whether the tasks were verified and their predictions are the adapter's."""
    parser = argparse.ArgumentParser(description="Three real adapters become verified engines, on the CPU.")
    parser.add_argument("--seconds", type=float, default=60, help="latency budget of each task")
    seconds = parser.parse_args().seconds
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    rows, sound = [], True
    for task in TASKS:
        row, ok = demonstrate(task, seconds)
        rows.append(row)
        sound = sound and ok
    columns = (
        "task",
        "examples",
        "metric",
        "probe",
        *STAGES,
        "predictions changed",
        "worst difference",
        "adapter",
        "bytes added",
        "latency",
        "graphs",
    )
    print()
    print_table("Three adapters of all-MiniLM-L6-v2, from adapter to engine", columns, rows)
    print(
        "graphs: whether merged and unadapted graph have one digest, and so the same nodes on the same shapes. That"
        " proof needs no clock.\nlatency: CPU time decides where waiting for a processor is too much noise for the wall"
        " clock, and the verdict names it."
    )
    taken_on = machine(threads=1)
    print(f"  latency and worst difference are of this machine: {taken_on['processor']}; cores: {taken_on['cores']}")
    sentence = "It was the best film I have seen in years, and I cried."
    for task in TASKS:
        lorafuse("run", BUNDLE, "--task", task.name, "--text", sentence)
    print(f"\nThe bundle is in {BUNDLE.relative_to(ROOT)}. Next: .venv/bin/lorafuse --help")
    return 0 if sound else 1


def demonstrate(task: Task, seconds: float) -> tuple[tuple[str, ...], bool]:
    """Export, build, verify, evaluate and time one task; return its row of the table and whether it is sound."""
    print(f"\n== {task.name} ==", flush=True)
    labels = ["--labels", ",".join(task.labels)] if task.labels else []
    added = lorafuse_json("export", minilm(), task.adapter, "--task", task.name, *labels, "--out", BUNDLE)[
        "bytes_added"
    ]
    print(f"   added to the bundle: {', '.join(f'{what} {megabytes(size)}' for what, size in added.items())}")
    lorafuse_json("build", BUNDLE, "--task", task.name, "--backend", "onnxruntime")
    lorafuse_json("build", BUNDLE, "--task", task.name, "--backend", "tensorrt-rtx", "--compute-capability", "8.9")
    examples = held_out(task, task.test_size)
    texts = OUT / f"{task.name}.txt"
    texts.write_text("\n".join(" ".join(e.text.split()) for e in examples[:64]) + "\n", encoding="utf-8")
    verified = lorafuse("verify", BUNDLE, "--task", task.name, "--texts", texts) == 0
    evaluation = evaluate(open_bundle(BUNDLE), task, examples)
    report = OUT / f"{task.name}.latency.json"
    lorafuse("bench", BUNDLE, "--task", task.name, "--seconds", str(seconds), "--clock", "auto", "--out", report)
    row = table_row(task, evaluation, sum(added.values()), added["base weights"], read_report(report))
    return row, verified and evaluation.differing_predictions == 0 and evaluation.worst_difference <= CLOSE


def table_row(task: Task, evaluation: Evaluation, added: int, of_base: int, report: Report) -> tuple[str, ...]:
    probe = json.loads((task.adapter.parent.parent / "training_record.json").read_text())[task.name]["linear_probe"]
    [point] = report.points
    return (
        task.name,
        str(evaluation.examples),
        "accuracy" if task.labels else "Pearson r",
        f"{probe:.4f}",
        *(f"{evaluation.scores[stage]:.4f}" for stage in STAGES),
        str(evaluation.differing_predictions),
        f"{evaluation.worst_difference:.1e}",
        megabytes(sum(path.stat().st_size for path in task.adapter.iterdir())),
        megabytes(added - of_base) + (f" + base {megabytes(of_base)}" if of_base else ""),
        f"{report.verdict}: {interval(point.reading('merged', point.clock).ratio)} by {NAMES[point.clock]}",
        "same" if report.digests["merged"] == report.digests["base"] else "DIFFER",
    )


def evaluate(bundle: Bundle, task: Task, examples: list[Example]) -> Evaluation:
    """Run every held-out example through all stages."""
    torch.set_num_threads(os.cpu_count() or 1)
    part = task_part(bundle, task.name)
    encoder, graph = TextEncoder(bundle), part.graph
    ordered = sorted(examples, key=lambda example: len(example.text))  # batches of like lengths need little padding
    batches = [
        encoder.encode([e.text for e in ordered[start : start + 32]], graph) for start in range(0, len(ordered), 32)
    ]
    engines = runners(part, threads=os.cpu_count() or 1)
    merged = torch_runner(part, merged_values(part))
    stages: dict[str, Runner] = {
        "adapter": peft_runner(task),
        "merged": merged,
        "ONNX": engines["ONNX graph"],
        "engine": engines["engine onnxruntime"],
    }
    outputs = {stage: np.concatenate([run(batch) for batch in batches]) for stage, run in stages.items()}
    targets = np.array([example.target for example in ordered])
    return Evaluation(
        examples=len(ordered),
        scores={stage: score(task, values, targets) for stage, values in outputs.items()},
        differing_predictions=int(
            np.any([differs(task, outputs["adapter"], values) for values in outputs.values()], axis=0).sum()
        ),
        worst_difference=max(float(np.abs(values - outputs["adapter"]).max()) for values in outputs.values()),
    )


def score(task: Task, outputs: Array, targets: Array) -> float:
    """Accuracy for classes, Pearson's r for a regression."""
    return (
        float((outputs.argmax(-1) == targets).mean())
        if task.labels
        else float(np.corrcoef(outputs[:, 0], targets)[0, 1])
    )


def differs(task: Task, adapter: Array, stage: Array) -> Array:
    """Where a stage predicts another class than the adapter, or a value that rounding does not explain."""
    changed: Array = adapter.argmax(-1) != stage.argmax(-1) if task.labels else np.abs(adapter - stage)[:, 0] > CLOSE
    return changed


def peft_runner(task: Task) -> Runner:
    """The adapter on its base, unmerged, in PEFT."""
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    base = transformers.AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=len(task.labels) or 1)
    model = peft.PeftModel.from_pretrained(base, task.adapter).eval()

    def run(inputs: Mapping[str, Array]) -> Array:
        with torch.no_grad():
            logits: Array = model(**{name: torch.from_numpy(values) for name, values in inputs.items()}).logits.numpy()
        return logits

    return run


def lorafuse(*arguments: str | Path) -> int:
    """Run the command as a user would, and show it."""
    print(f"$ lorafuse {' '.join(str(argument).replace(str(ROOT) + '/', '') for argument in arguments)}", flush=True)
    return subprocess.run([LORAFUSE, *map(str, arguments)], check=False).returncode


def lorafuse_json(*arguments: str | Path) -> Any:
    """Run the command as a program would; a failure ends the demo."""
    shown = " ".join(argument if isinstance(argument, str) else argument.name for argument in arguments)
    print(f"$ lorafuse {shown}", flush=True)
    done = subprocess.run([LORAFUSE, *map(str, arguments), "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


if __name__ == "__main__":
    sys.exit(main())

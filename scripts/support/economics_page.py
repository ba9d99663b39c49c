"""docs/economics.md and its plot, out of the record that scripts/benchmarks/economics.py keeps."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from lora.wording import megabytes
from scripts.support.demo_tasks import DATA, MOVIES, SUPERSENSE, TASKS, TWEETS
from scripts.support.finetuning import BATCH, EPOCHS, MAX_TOKENS, TEST, TRAIN, VALIDATION
from scripts.support.training_cost import BATCH as COST_BATCH
from scripts.support.training_cost import LENGTH as COST_LENGTH

PAGE, PLOT = "economics.md", "economics.svg"
NAMES = {
    "full": "full fine-tuning",
    "lora": "LoRA, rank 8",
    "adapter-h": "AdapterH",
    "adapter-l": "AdapterL",
    "probe": "linear probe",
}
METRICS = {MOVIES.name: "accuracy", SUPERSENSE.name: "accuracy", TWEETS.name: "Pearson r"}
Record = Mapping[str, Any]


def write_page(record: Record, docs: Path) -> None:
    """Write the page and the plot into ``docs``."""
    draw(record, docs / PLOT)
    parts = (INTRODUCTION.format(machine=machine()), *cost(record), *quality(record), *ranks(record))
    (docs / PAGE).write_text("\n".join(parts), encoding="utf-8")


INTRODUCTION = """# The economics of LoRA, measured

`scripts/benchmarks/economics.py` made this page. The figures of the paper
([Hu et al. 2021](https://arxiv.org/abs/2106.09685)) stand beside ours
where it has them; [`lorafuse plan`](training.md#before-training) has its arithmetic.

Machine: {machine}. One thread a process; other work ran on the same machine.
"""


def machine() -> str:
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 1e6
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    return (
        f"{os.cpu_count()} cores of {models[0] if models else platform.processor()}, {memory:.0f} GB, no GPU; Python"
        f" {platform.python_version()}, {versions}"
    )


def cost(record: Record) -> Iterable[str]:
    """What a training step of GPT-2 medium takes."""
    arms = {
        arm: [values for name, values in record.items() if name.startswith(f"cost/{arm}/")] for arm in ("full", "lora")
    }
    if not all(arms.values()):
        return
    full, lora = ({key: float(np.median([turn[key] for turn in turns])) for key in turns[0]} for turns in arms.values())
    faster = [
        one["tokens_per_second"] / other["tokens_per_second"]
        for one, other in zip(arms["lora"], arms["full"], strict=False)
    ]
    papers = {
        "peak": "÷ 3 (GPT-3: 1.2 TB to 350 GB)",
        "checkpoint": "÷ 10,000 (GPT-3: 350 GB to 35 MB, in 16 bits)",
        "tokens_per_second": "× 1.25 (GPT-3)",
    }
    rows = {
        "trainable": "trainable parameters",
        "gradients": "gradients",
        "optimizer": "Adam's moments",
        "peak": "peak memory of the process",
        "checkpoint": "checkpoint, float32",
    }
    yield "## What training costs\n"
    yield (
        f"GPT-2 medium, float32, batch {COST_BATCH} × {COST_LENGTH} tokens, Adam; LoRA of rank 4 on queries and values."
        f" Medians of {len(faster)} processes an arm, in turn.\n"
    )
    yield "| | full fine-tuning | LoRA | ratio | the paper's |"
    yield "|---|---|---|---|---|"
    for key, name in rows.items():
        shown = (lambda value: f"{value:,.0f}") if key == "trainable" else (lambda value: megabytes(int(value)))
        yield (
            f"| {name} | {shown(full[key])} | {shown(lora[key])} | ÷ {full[key] / lora[key]:,.1f} |"
            f" {papers.get(key, '')} |"
        )
    key = "tokens_per_second"
    yield (
        f"| tokens a second | {full[key]:.1f} | {lora[key]:.1f} | × {np.median(faster):.2f} ({min(faster):.2f} to"
        f" {max(faster):.2f}) | {papers[key]} |"
    )
    yield (
        "\nLoRA still carries every activation and most of the backward pass; it saves W0's gradients, and the moments."
        " The peak here holds float32 weights once and the activations of a small batch, so the paper's ÷ 3 of weights"
        " and moments shows in part. The checkpoint is in PEFT's format, which has no fused parts: half of its numbers"
        " are the zeros between the two blocks of B.\n"
    )


def scores(record: Record, task: str, kind: str) -> list[float]:
    return [values for name, values in record.items() if name.startswith(f"quality/{task}/{kind}/")]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half the width of its 95 % interval (Student's t)."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    return float(np.mean(values)), float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))


def shown(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean, half = interval(values)
    return f"{mean:.3f} ± {half:.3f}" if len(values) > 1 else f"{mean:.3f}"


def quality(record: Record) -> Iterable[str]:
    """The ways of adapting MiniLM to the demo's tasks."""
    tasks = [task for task in TASKS if scores(record, task.name, "lora")]
    if not tasks:
        return
    seeds = {len(scores(record, task.name, kind)) for task in tasks for kind in NAMES}
    runs = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    yield "## How good it is\n"
    yield (
        f"all-MiniLM-L6-v2 on the demo's tasks, with few examples: {TRAIN} to train on, drawn anew for each of {runs}"
        f" runs, {EPOCHS} epochs of batches of {BATCH}, texts cut at {MAX_TOKENS} tokens; the same {TEST} test"
        " examples. Adapters have as many parameters as LoRA (74 thousand, of 22.7 million). Each way's rate is the"
        f" better of two on {VALIDATION} validation examples of a further draw. Mean ± half the 95 % interval over the"
        " runs.\n"
    )
    yield "| | " + " | ".join(f"{task.name}, {METRICS[task.name]}" for task in tasks) + " |"
    yield "|---" * (1 + len(tasks)) + "|"
    for kind, name in NAMES.items():
        yield f"| {name} | " + " | ".join(shown(scores(record, task.name, kind)) for task in tasks) + " |"
    yield "\n" + " ".join(against_full(record, task.name) for task in tasks)
    yield "\n" + with_all_examples()
    yield (
        "\nThe paper: RoBERTa-base on GLUE, 87.2 with LoRA and 86.4 fully fine-tuned, on thousands to hundreds of"
        " thousands of examples a task.\n"
    )


def with_all_examples() -> str:
    """What the demo's own adapters reach, from the record of their training."""
    record = json.loads((DATA / "training_record.json").read_text())
    reached = ", ".join(
        f"{task.name} {record[task.name]['lora']:.3f} (probe {record[task.name]['linear_probe']:.3f})" for task in TASKS
    )
    return (
        f"With all of their training examples, {TWEETS.train_size} to {MOVIES.train_size}, LoRA of rank 8 reaches:"
        f" {reached}."
    )


def against_full(record: Record, task: str) -> str:
    """LoRA minus full fine-tuning, seed by seed: both train on the same draw."""
    pairs = [
        (record[name], record[name.replace("/lora/", "/full/")])
        for name in record
        if name.startswith(f"quality/{task}/lora/")
    ]
    mean, half = interval([lora - full for lora, full in pairs])
    said = "within the interval" if abs(mean) <= half else "better" if mean > 0 else "worse"
    return f"{task}: LoRA − full = {mean:+.3f} ± {half:.3f}, {said}."


def sweep(record: Record) -> dict[int, list[float]]:
    """The scores by rank; rank 8 is LoRA's of the table above."""
    found: dict[int, list[float]] = {8: scores(record, SUPERSENSE.name, "lora")}
    for name, value in record.items():
        if name.startswith("rank/"):
            found.setdefault(int(name.split("/")[2]), []).append(value)
    return dict(sorted(found.items()))


def ranks(record: Record) -> Iterable[str]:
    found = sweep(record)
    if len(found) < 2:
        return
    yield "## Which rank\n"
    yield (
        f"The same on {SUPERSENSE.name} (paper, section 7: a rank of one to eight does as well as 64), alpha twice the"
        " rank."
    )
    yield "The rate was chosen for rank 8 and not anew for the others.\n"
    yield "| rank | accuracy |"
    yield "|---|---|"
    for rank, values in found.items():
        yield f"| {rank} | {shown(values)} |"
    yield f"\n![Accuracy by way and by rank]({PLOT})\n"


def draw(record: Record, path: Path) -> None:
    """The table and the sweep as dots with their intervals."""
    tasks = [task.name for task in TASKS if scores(record, task.name, "lora")]
    figure: Any = Figure(figsize=(9, 3.6), layout="constrained")
    ways, by_rank = figure.subplots(1, 2, width_ratios=(2, 1))
    for place, kind in enumerate(NAMES):
        drawn = [
            (number, interval(scores(record, task, kind)))
            for number, task in enumerate(tasks)
            if scores(record, task, kind)
        ]
        ways.errorbar(
            [number + (place - 2) * 0.12 for number, _ in drawn],
            [mean for _, (mean, _) in drawn],
            [half for _, (_, half) in drawn],
            fmt="o",
            label=NAMES[kind],
        )
    ways.set(xticks=range(len(tasks)), xticklabels=[f"{task}\n{METRICS[task]}" for task in tasks])
    ways.legend(fontsize=8)
    found = {rank: interval(values) for rank, values in sweep(record).items() if values}
    by_rank.errorbar([*found], [mean for mean, _ in found.values()], [half for _, half in found.values()], fmt="o-")
    by_rank.set(
        xscale="log",
        xticks=[*found],
        xticklabels=[*map(str, found)],
        xlabel="rank",
        title=f"{SUPERSENSE.name}, accuracy",
    )
    by_rank.minorticks_off()
    for axes in (ways, by_rank):
        axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})

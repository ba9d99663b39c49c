"""The LoRA paper's economics, measured: the cost of training, the bytes of a task, the quality.

Writes docs/economics.md.

    python -m scripts.benchmarks.economics [--record FILE] [--report]

1. GPT-2 medium, one process an arm, in turn: full fine-tuning and LoRA (rank 4 on queries and values) by Adam;
trainable parameters, optimizer's and peak memory, tokens a second, checkpoint. 2. The demo's three tasks on MiniLM:
full fine-tuning, LoRA, adapters with as many parameters as LoRA, a linear probe; five draws of the training examples
each, the rate of each way chosen on validation examples of one more draw. 3. Ranks 1, 2, 4, 8 and 64 on one task.

About an hour on one core, most of it for 2. What is done is kept in the record, and an interrupted run goes on;
--report only writes the page. Needs the extras ``train`` and ``demo``, and npm for WordNet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scripts.support.demo_tasks import ROOT, TASKS
from scripts.support.economics_page import write_page

RECORD = ROOT / "docs" / "economics.json"
RATES = {"full": (1e-4, 2e-4), "lora": (2e-3, 4e-3), "adapter-h": (1e-3, 2e-3), "adapter-l": (1e-3, 2e-3)}
SEEDS, CHOOSING_SEED = range(5), 99
RANKS = (1, 2, 4, 64)  # and 8, which is LoRA's everywhere else
SWEPT = "supersense"
ARMS, TURNS = ("full", "lora"), 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--report", action="store_true", help="only write the page from the record")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        from scripts.support.training_cost import measured

        print(json.dumps(measured(arguments.arm)))
        return
    record = json.loads(arguments.record.read_text()) if arguments.record.exists() else {}
    if not arguments.report:
        for name, cell in cells(record):
            if name not in record:
                started = time.perf_counter()
                record[name] = cell()
                kept(arguments.record, record)
                print(f"{name}: {record[name]} ({time.perf_counter() - started:.0f} s)", flush=True)
    write_page(record, ROOT / "docs")


def kept(path: Path, record: dict[str, Any]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(json.dumps(record, indent=1) + "\n")
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def cells(record: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every measurement by its name, in the order of their making; a later one may need an earlier one's result."""
    for kind, rates in RATES.items():
        for rate in rates:
            for task in TASKS:
                choosing = partial(quality, task.name, kind, rate, CHOOSING_SEED, validation=True)
                yield f"rate/{task.name}/{kind}/{rate}", choosing
    for turn in range(TURNS):
        for arm in ARMS:
            yield f"cost/{arm}/{turn}", partial(cost, arm)
    for seed in SEEDS:
        for task in TASKS:
            yield f"quality/{task.name}/probe/{seed}", partial(quality, task.name, "probe", 0, seed)
            for kind in RATES:
                yield f"quality/{task.name}/{kind}/{seed}", partial(at_best_rate, record, task.name, kind, seed)
        for rank in RANKS:
            yield f"rank/{SWEPT}/{rank}/{seed}", partial(at_best_rate, record, SWEPT, "lora", seed, rank=rank)


def at_best_rate(record: dict[str, Any], task: str, kind: str, seed: int, **given: Any) -> Any:
    return quality(task, kind, best_rate(record, task, kind), seed, **given)


def cost(arm: str) -> Any:
    return json.loads(
        subprocess.check_output(
            [sys.executable, "-W", "ignore", "-m", "scripts.benchmarks.economics", "--arm", arm], text=True
        ).splitlines()[-1]
    )


def best_rate(record: dict[str, Any], task: str, kind: str) -> float:
    return max(RATES[kind], key=lambda rate: record[f"rate/{task}/{kind}/{rate}"])


def quality(name: str, kind: str, rate: float, seed: int, validation: bool = False, rank: int = 8) -> float:
    import torch

    from scripts.support.finetuning import Way, probe_score, sample, score, trained

    torch.set_num_threads(1)
    task = next(task for task in TASKS if task.name == name)
    data = sample(task, seed)
    if kind == "probe":
        return round(probe_score(task, data), 4)
    model, tokenizer = trained(task, Way(kind, rank), rate, data, seed)
    found = score(model, tokenizer, task, data.validation if validation else data.test)
    return round(found if np.isfinite(found) else 0.0, 4)


if __name__ == "__main__":
    main()

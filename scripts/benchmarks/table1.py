"""The LoRA paper's Table 1, measured here: one forward pass of GPT-2 medium, with every way to adapt it.

    python -m scripts.benchmarks.table1 [FOLDER] [--seconds 900] [--few 3] [--shapes 1x128,16x256,32x512]
        [--out FOLDER] [--json]

Makes a random GPT-2 medium and an adapter of rank 4 on queries and values in FOLDER (default: a temporary one, 4 GB).
The paper's shapes, its two bottleneck adapters of 11 M parameters, and what it left out: merged against unadapted. The
first shape gets the harness's full protocol within --seconds; the others, which take minutes a pass on a CPU and
gigabytes an engine, --few rounds with one engine in memory at a time: ratios without an interval, and the table says
so. The paper's figures are a Quadro RTX8000's, where the cost of an adapter is the launch of its kernels; a processor's
are its arithmetic.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from engines.commands.terminal import print_json, print_table, progress
from engines.latency.arm_engines import OnnxRuntimeOpener
from engines.latency.arms import EXTRAS, Arms, arms_of
from engines.latency.harness import Arm, Protocol, Work, timed
from engines.latency.markdown import markdown
from engines.latency.page import page
from engines.latency.report import Load, Report, write_report, write_text
from engines.latency.run import run
from engines.latency.verdict import AGAIN, BASE, MERGED, UNMERGED
from engines.latency.workloads import work_of
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.task_part import task_part
from exporter.task import Request, export_task
from scripts.support.gpt2_medium import base_and_adapters

# ms on a Quadro RTX8000, mean of 100 trials: (batch, length) → Fine-Tune/LoRA, AdapterL, AdapterH
PAPER = {(32, 512): (1449.4, 1482.0, 1492.2), (16, 256): (338.0, 354.8, 366.3), (1, 128): (19.8, 23.9, 25.8)}
PAPER_ARMS = (BASE, "adapter-l", "adapter-h")
ORDER = (BASE, AGAIN, MERGED, "resident", UNMERGED, "adapter-l", "adapter-h")


@dataclass(frozen=True)
class Cell:
    """One arm at one shape: ms, its ratio to the base with an interval, and the paper's ratio, where there are any."""

    batch: int
    length: int
    arm: str
    milliseconds: float
    ratio: float
    low: float | None
    high: float | None
    paper: float | None
    rounds: int


def main() -> int:
    arguments = parsed()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="table1-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        cells, report = measured(folder, arguments.shapes, arguments.seconds, arguments.few)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_report(arguments.out / "table1.json", report)
        write_text(arguments.out / "table1.html", page(report))
        write_text(arguments.out / "table1.md", markdown(report))
    if arguments.json:
        print_json({"cells": [asdict(cell) for cell in cells], "verdict": report.verdict, "machine": report.machine})
    else:
        show(cells, report)
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        help="Where the model and the bundle are made and kept. Default: a temporary folder.",
    )
    parser.add_argument("--seconds", type=float, default=900.0, help="Budget of the first shape. Default: 900.")
    parser.add_argument("--few", type=int, default=3, help="Rounds of the other shapes. Default: 3.")
    parser.add_argument(
        "--shapes",
        type=shapes,
        default=shapes("1x128,16x256,32x512"),
        help="Batch x length, the fully measured one first.",
    )
    parser.add_argument("--out", type=Path, help="Folder for the first shape's report: JSON, HTML, Markdown.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    return parser.parse_args()


def shapes(text: str) -> list[Load]:
    return [Load(*(int(size) for size in shape.split("x"))) for shape in text.split(",")]


def measured(folder: Path, loads: Sequence[Load], seconds: float, few: int) -> tuple[list[Cell], Report]:
    """All cells, and the report of the first shape."""
    base, [adapter] = base_and_adapters(folder, ["first"])
    with progress("table 1") as step:
        path = folder / "table1"
        bundle = open_bundle(path) if path.exists() else export_task(Request(base, adapter, "first"), path, step).bundle
        step("making the arms")
        arms = arms_of(task_part(bundle, "first"), OnnxRuntimeOpener(1), EXTRAS)
        [report] = run(task_part(bundle, "first"), arms, loads[:1], Protocol(seconds), 1, step)
        cells = cells_of(report)
        for load in loads[1:]:
            step(f"{load}, {few} rounds")
            cells += few_cells(bundle, arms, load, few)
    return cells, report


def cells_of(report: Report) -> list[Cell]:
    [point] = report.points
    readings = {reading.arm: reading for reading in point.readings}
    rounds = len(point.samples.runs) * len(point.samples.runs[0])
    return [
        cell(
            point.load,
            name,
            readings[name].p50,
            (readings[name].ratio.median, readings[name].ratio.low, readings[name].ratio.high),
            rounds,
        )
        for name in ORDER
        if name in readings
    ]


def few_cells(bundle: Bundle, arms: Arms, load: Load, rounds: int) -> list[Cell]:
    """Medians of a few rounds: nothing is known of how they differ, so there is no interval."""
    work = work_of(task_part(bundle, "first").graph, bundle.manifest.base.vocabulary, load)
    times = np.array(one_at_a_time(arms.arms, work, rounds), float)
    ratios = np.median(times / times[:, :1], axis=0)
    by_arm: Mapping[str, int] = {arm.name: index for index, arm in enumerate(arms.arms)}
    return [
        cell(
            load,
            name,
            float(np.median(times[:, by_arm[name]])) / 1e6,
            (float(ratios[by_arm[name]]), None, None),
            rounds,
        )
        for name in ORDER
        if name in by_arm
    ]


def one_at_a_time(arms: Sequence[Arm], work: Work, rounds: int) -> list[list[int]]:
    """Times of shape (rounds, arms), arms in shuffled order: the second run of a fresh session, alone in memory."""
    random, times = np.random.default_rng(0), [[0] * len(arms) for _ in range(rounds)]
    for row in times:
        for index in random.permutation(len(arms)).tolist():
            with arms[index].open() as session:
                work(session)
                row[index] = timed(work, session)
    return times


def cell(
    load: Load, arm: str, milliseconds: float, ratio: tuple[float, float | None, float | None], rounds: int
) -> Cell:
    paper = PAPER.get((load.batch, load.length))
    paper_ratio = paper[PAPER_ARMS.index(arm)] / paper[0] if paper and arm in PAPER_ARMS else None
    return Cell(load.batch, load.length, arm, milliseconds, *ratio, paper_ratio, rounds)


def show(cells: Sequence[Cell], report: Report) -> None:
    rows = [
        (
            f"{cell.batch} × {cell.length}",
            cell.arm,
            f"{cell.milliseconds:.1f}",
            f"{cell.ratio:.4f}",
            "too few rounds" if cell.low is None else f"[{cell.low:.4f}, {cell.high:.4f}]",
            str(cell.rounds),
            "-" if cell.paper is None else f"{cell.paper:.3f}",
        )
        for cell in cells
    ]
    print_table(
        "GPT-2 medium, one forward pass",
        ("batch × length", "arm", "median ms", "ratio to base", "interval", "rounds", "paper, on its GPU"),
        rows,
    )
    print(f"{report.verdict.upper()}: {report.points[0].reason}")
    print(", ".join(f"{name}: {value}" for name, value in report.machine.items()))


if __name__ == "__main__":
    raise SystemExit(main())

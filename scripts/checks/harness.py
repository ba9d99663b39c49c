"""Is the harness right on real engines? What it says of a planted delay, of nothing planted, and beside other work.

    python -m scripts.checks.harness [--seconds 120] [--length 128] [--clock cpu] [--repeat 1] [--json]

On all-MiniLM-L6-v2, batch 1, one thread. The planted delay is a small product of matrices in every block, about 2.5 %.
What both clocks say is shown; --clock is the one that a run goes by. A wrong verdict of either (equivalent where a
delay was planted, slower where none was) is status 1; beside a process on every core the harness may only fail to
decide, or be right. Then what the harness itself adds to a sample, on a model of about 1 ms.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
from onnx import helper, numpy_helper

from engines.backends import Model
from engines.backends.onnxruntime import OnnxRuntime
from engines.commands.terminal import print_json, print_table
from engines.feeds.inputs import random_inputs, sizes
from engines.latency.clocks import NAMES, Clock, ClockChoice
from engines.latency.equivalence import Ratio
from engines.latency.harness import Arm, Protocol, Work, measure, timed
from engines.latency.report import Load, Verdict
from engines.latency.verdict import AGAIN, BASE, MERGED
from engines.latency.words import interval
from engines.latency.workloads import work_of
from exporter.bundle.task_part import task_part
from exporter.graph.external_data import load_graph
from exporter.task import Request, export_task
from lora.files.tensorfile import Array
from scripts.support.packaged_files import minilm

RANK = 48  # of 384: two products with it are a fortieth of a block's
WRONG: dict[str, Verdict] = {"nothing": "slower", "about 2.5 %": "equivalent"}


@dataclass(frozen=True)
class Case:
    """What was planted, whether every core was busy with something else, and what each clock said of merged."""

    planted: str
    busy: bool
    verdicts: Mapping[Clock, Verdict]
    ratios: Mapping[Clock, Ratio]
    sets: int
    seconds: float

    @property
    def is_wrong(self) -> bool:
        return WRONG[self.planted] in self.verdicts.values()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="Budget of each case. Default: 120.")
    parser.add_argument("--length", type=int, default=128, help="Tokens. Default: 128.")
    parser.add_argument("--clock", choices=get_args(ClockChoice), default="wall", help="Default: wall.")
    parser.add_argument("--repeat", type=int, default=1, help="Runs of each case. Default: 1.")
    parser.add_argument("--busy", action="store_true", help="Only beside a process on every core.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        protocol = Protocol(arguments.seconds, clock=arguments.clock, on_thread=True)
        loads = (True,) if arguments.busy else (False, True)
        cases, overhead = check(Path(folder) / "bundle", arguments.length, protocol, loads * arguments.repeat)
    if arguments.json:
        print_json({"cases": [asdict(case) for case in cases], "overhead_us": overhead})
    else:
        show(cases, overhead)
    return 1 if any(case.is_wrong for case in cases) else 0


def check(bundle: Path, length: int, protocol: Protocol, loads: Sequence[bool]) -> tuple[list[Case], float]:
    """Every case, with every core busy or not as ``loads`` say, and the harness's own µs a sample."""
    opened = export_task(Request(minilm(), None, "plain"), bundle).bundle
    plain = load_graph(bundle / task_part(opened, "plain").part.model.path)
    graphs = {"nothing": plain, "about 2.5 %": with_delay(plain)}
    load = Load(1, length)
    work = work_of(task_part(opened, "plain").graph, opened.manifest.base.vocabulary, load)
    cases = []
    for number, busy in enumerate(loads):
        for planted, graph in graphs.items():
            arms = [arm_of(BASE, plain, bundle), arm_of(AGAIN, plain, bundle), arm_of(MERGED, graph, bundle)]
            start = time.monotonic()
            with other_work(os.cpu_count() or 1 if busy else 0):
                point = measure(arms, load, work, replace(protocol, seed=number))
            cases.append(
                Case(
                    planted,
                    busy,
                    {said.clock: said.verdict for said in point.said},
                    {said.clock: point.reading(MERGED, said.clock).ratio for said in point.said},
                    len(point.samples.runs),
                    time.monotonic() - start,
                )
            )
    short = random_inputs(
        task_part(opened, "plain").graph, opened.manifest.base.vocabulary, sizes(1, 2), seed=0
    )  # about a millisecond
    return cases, harness_overhead(plain, bundle, short)


def arm_of(name: str, graph: onnx.ModelProto, folder: Path) -> Arm:
    model = Model(graph.SerializeToString(), folder)
    return Arm(name, lambda: OnnxRuntime(threads=1).load(model, None))


def with_delay(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with a product of two small matrices added to the output of every block's last normalization."""
    delayed = onnx.ModelProto()
    delayed.CopyFrom(graph)
    random = np.random.default_rng(0)
    nodes = delayed.graph.node
    ends = [
        node
        for node in nodes
        if node.op_type == "LayerNormalization"
        and ".output.LayerNorm" in node.input[1]
        and "attention" not in node.input[1]
    ]
    for number, end in enumerate(ends):
        width = next(tensor for tensor in delayed.graph.initializer if tensor.name == end.input[1]).dims[0]
        output, plain = end.output[0], f"{end.output[0]}.plain"
        end.output[0] = plain
        for name, shape in (("down", (width, RANK)), ("up", (RANK, width))):
            delayed.graph.initializer.append(
                numpy_helper.from_array(random.normal(0, 1e-4, shape).astype(np.float32), f"planted.{number}.{name}")
            )
        planted = (
            helper.make_node("MatMul", [plain, f"planted.{number}.down"], [f"{output}.down"]),
            helper.make_node("MatMul", [f"{output}.down", f"planted.{number}.up"], [f"{output}.up"]),
            helper.make_node("Add", [plain, f"{output}.up"], [output]),
        )
        position = next(index for index, node in enumerate(nodes) if node is end or node.output[0] == plain) + 1
        for offset, node in enumerate(planted):
            nodes.insert(position + offset, node)
    return delayed


@contextmanager
def other_work(processes: int) -> Iterator[None]:
    """Processes that never rest."""
    workers = [multiprocessing.Process(target=never_rest, daemon=True) for _ in range(processes)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def never_rest() -> None:
    while True:
        pass


def harness_overhead(graph: onnx.ModelProto, folder: Path, inputs: Mapping[str, Array]) -> float:
    """The harness's own cost, in µs a sample: its timing against ONNX Runtime's own call, in turns on one session.

    The median of differences.
    """
    session = OnnxRuntime(threads=1).load(Model(graph.SerializeToString(), folder), None)
    raw, feed = session._session, dict(inputs)
    outputs = [port.name for port in raw.get_outputs()]
    calls: tuple[Work, Work] = (lambda _: raw.run(outputs, feed), lambda session: session.run(inputs))
    times = np.zeros((3000, 2))
    for number, row in enumerate(times):
        for index in (0, 1) if number % 2 else (1, 0):
            row[index] = timed(calls[index], session)
    return float(np.median(times[:, 1] - times[:, 0])) / 1e3


def show(cases: Sequence[Case], overhead: float) -> None:
    rows = [
        (
            case.planted,
            "every core" if case.busy else "-",
            *(
                f"{verdict}: {interval(case.ratios[clock])}" + (" (WRONG)" if verdict == WRONG[case.planted] else "")
                for clock, verdict in case.verdicts.items()
            ),
            str(case.sets),
            f"{case.seconds:.0f}",
        )
        for case in cases
    ]
    print_table(
        "the harness on MiniLM, batch 1, one thread, margin 1 %",
        ("planted", "other work", *(f"by {NAMES[clock]}" for clock in cases[0].verdicts), "sets", "s"),
        rows,
    )
    print(f"the harness adds {overhead:.1f} µs to a sample")


if __name__ == "__main__":
    raise SystemExit(main())

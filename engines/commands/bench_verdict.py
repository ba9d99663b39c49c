"""``lorafuse bench BUNDLE``: the verdict on a task's latency."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engines.commands.options import (
    MODEL,
    AsJson,
    Backend,
    BackendChoice,
    BundlePath,
    Digest,
    Margin,
    PartName,
    TaskName,
    Threads,
    per_cent,
)
from engines.commands.terminal import DONE, NO, UNDECIDED, print_json, print_table, progress
from lora.errors import LorafuseError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engines.latency.report import Point, Report

STATUS = {"equivalent": DONE, "slower": NO, "undecided": UNDECIDED}


class ExtraArm(StrEnum):
    """Further forms of a task's model."""

    resident = "resident"
    adapter_h = "adapter-h"
    adapter_l = "adapter-l"


class ClockOption(StrEnum):
    """What a verdict is reached by."""

    wall = "wall"
    cpu = "cpu"
    auto = "auto"


Batches = Annotated[list[int], typer.Option(min=1, help="Batch size; repeatable, for a grid.")]
Lengths = Annotated[list[int], typer.Option(min=1, help="Sequence length, in tokens; repeatable.")]


def verdict(
    bundle: BundlePath,
    task: TaskName,
    part: PartName = MODEL,
    batch: Batches = [1],  # noqa: B006  # typer copies it
    length: Lengths = [128],  # noqa: B006
    tokens: Annotated[
        int, typer.Option(min=0, help="A decoder: also time prompts of each length with so many tokens generated.")
    ] = 0,
    margin: Margin = "1%",
    gate: Annotated[
        Any, typer.Option(parser=per_cent, metavar="SHARE", help="For CI: the margin, and one line of output.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0, max=1e6, help="Budget for each load; it ends earlier when the question is decided.")
    ] = 120.0,
    backend: Backend = BackendChoice.onnxruntime,
    threads: Threads = 1,
    clock: Annotated[
        ClockOption,
        typer.Option(help="What decides. cpu: the thread's CPU time (one thread, CPU); auto: what can decide here."),
    ] = ClockOption.wall,
    extra: Annotated[
        list[ExtraArm] | None,
        typer.Option("--with", help="A further arm; repeatable. adapter-h and adapter-l are the paper's."),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="An .onnx file of yours as an arm, of TensorRT a plan too; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order in which arms take turns.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write a JSON report with every sample.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one self-contained page.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the report as Markdown.")] = None,
    digest: Digest = None,
    as_json: AsJson = False,
) -> None:
    """Time base, base again, merged and unmerged, interleaved, and say whether merging cost latency.

    Where the engine runs on the calling thread its CPU time is taken beside the wall clock.

    Exit status 0: equivalent within the margin; 1: slower; 2: undecided, or this machine is too noisy.

    Example: lorafuse bench bundle --task movies --seconds 120 --out report.json
    """
    from engines.latency.arm_engines import opener
    from engines.latency.arms import arms_of
    from engines.latency.clocks import check_clock
    from engines.latency.harness import Protocol
    from engines.latency.report import check_writable
    from engines.latency.run import run
    from engines.latency.workloads import loads_of
    from exporter.bundle.manifest import open_bundle
    from exporter.bundle.task_part import task_part

    check_writable([path for path in (out, html, markdown) if path is not None])
    bench_part = task_part(open_bundle(bundle, digest), task, part)
    loads = loads_of(bench_part, batch, length, tokens)
    with progress(f"bench {task}") as step, opener(backend.value, threads, step) as engines:
        check_clock(clock.value, engines.on_thread)
        arms = arms_of(bench_part, engines, [choice.value for choice in extra or []], _brought(arm or []))
        protocol = Protocol(seconds, margin if gate is None else gate, seed, clock=clock.value)
        for report in run(bench_part, arms, loads, protocol, threads, step):
            _write(report, out, html, markdown)
    if as_json:
        print_json(_without_samples(report))
    elif gate is not None:
        print(_line(report))
    else:
        _print(report)
    raise typer.Exit(STATUS[report.verdict])


def _brought(given: Sequence[str]) -> dict[str, Path]:
    arms = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise LorafuseError(f"--arm {text!r}: expected NAME=FILE, such as pruned=pruned.onnx")
        if name in arms or not name.isprintable():
            raise LorafuseError(
                f"--arm {text!r}: the name is {'given twice' if name in arms else 'no text that can be printed'};"
                " choose another"
            )
        arms[name] = Path(path)
    return arms


def _write(report: Report, out: Path | None, html: Path | None, markdown: Path | None) -> None:
    from engines.latency.report import write_report, write_text

    if out is not None:
        write_report(out, report)
    if html is not None:
        from engines.latency.page import page

        write_text(html, page(report))
    if markdown is not None:
        from engines.latency.markdown import markdown as as_markdown

        write_text(markdown, as_markdown(report))


def _print(report: Report) -> None:
    from engines.latency import words

    for point in report.points:
        _print_readings(report, point)
        if point.device:
            stages = [(d.arm, f"{d.copies_there:.3f}", f"{d.engine:.3f}", f"{d.copies_back:.3f}") for d in point.device]
            print_table(
                "on the device, by its own clock", ("arm", "copies there ms", "engine ms", "copies back ms"), stages
            )
        if point.instructions:
            counted = [(a, f"{n:,}", words.counted(point.instructions, a)) for a, n in point.instructions.items()]
            print_table("one run, by valgrind's callgrind", ("arm", "instructions", "beside the base"), counted)
        if words.beside(point):
            print(words.beside(point))
        if point.help:
            print(f"What would help: {point.help}")
        print(f"{point.verdict.upper()}: {point.reason}")
    for name, reason in report.left_out.items():
        print(f"no arm '{name}': {reason}")
    print(words.proof(report.digests))


def _print_readings(report: Report, point: Point) -> None:
    from engines.latency.words import interval

    columns = ["arm", "median ms", "p90 ms", "rows/s", "opening ms", "first ms", "ratio to base"]
    columns += [f"at {report.margin:.3g}"]
    rows = [
        [
            r.arm,
            f"{r.p50:.3f}",
            f"{r.p90:.3f}",
            f"{r.rate:.1f}",
            f"{r.opening:.0f}",
            f"{r.first:.2f}",
            interval(r.ratio),
            r.decision,
        ]
        for r in point.readings
    ]
    if point.by_cpu:
        columns += ["CPU ms", "CPU ratio to base", f"at {report.margin:.3g}"]
        rows = [
            [*row, f"{r.p50:.3f}", interval(r.ratio), r.decision] for row, r in zip(rows, point.by_cpu, strict=True)
        ]
    print_table(f"{report.subject}: {point.load}, {point.samples.shape}", tuple(columns), [tuple(row) for row in rows])


def _line(report: Report) -> str:
    """The verdict, with the reason of the load that decided it."""
    from engines.latency.words import interval

    point = next(point for point in report.points if point.verdict == report.verdict)
    merged = point.reading("merged", point.clock)
    figure = "" if merged.decision == "not said" else f"{interval(merged.ratio)}; "
    help_ = f"; {point.help}" if point.help else ""
    return f"{report.verdict.upper()}: {report.subject}, {point.load}: {figure}{point.reason}{help_}"


def _without_samples(report: Report) -> dict[str, Any]:
    import msgspec

    content: dict[str, Any] = msgspec.to_builtins(report)
    for point in content["points"]:
        del point["samples"]
    return content

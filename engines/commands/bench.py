"""``lorafuse bench``: the verdict on a task's latency, a service under load, and two reports compared."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from engines.commands.options import MODEL, AsJson, Backend, BackendChoice, BundlePath, PartName, TaskName, Threads
from engines.commands.terminal import DONE, NO, UNDECIDED, print_json, print_table, progress
from lora.errors import LorafuseError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engines.latency.report import Point, Report
    from engines.latency.service import Service

STATUS = {"equivalent": DONE, "slower": NO, "undecided": UNDECIDED}
VERDICT = "verdict"


class _VerdictUnlessNamed(TyperGroup):
    """``lorafuse bench BUNDLE`` is ``lorafuse bench verdict BUNDLE``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = bool(args) and (args[0] in self.commands or args[0] == "--help")
        return list(super().parse_args(ctx, args if named else [VERDICT, *args]))


app = typer.Typer(cls=_VerdictUnlessNamed)


class ExtraArm(StrEnum):
    """Further forms of a task's model."""

    resident = "resident"
    adapter_h = "adapter-h"
    adapter_l = "adapter-l"


def per_cent(text: str) -> float:
    """ "1%" or 0.01. Raises BadParameter when it is neither, or not between nothing and ten times as much."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0.0001 <= value <= 10:
        raise typer.BadParameter(f"'{text}' is no share between 0.01% and 1000%, such as 1% or 0.01")
    return value


class ClockOption(StrEnum):
    """What a verdict is reached by."""

    wall = "wall"
    cpu = "cpu"
    auto = "auto"


Margin = Annotated[Any, typer.Option(parser=per_cent, metavar="SHARE", help="What counts as equal, such as 1%.")]
Batches = Annotated[list[int], typer.Option(min=1, help="Batch size; repeatable, for a grid.")]
Lengths = Annotated[list[int], typer.Option(min=1, help="Sequence length, in tokens; repeatable.")]


@app.callback()
def bench() -> None:
    """Time a task's engine: ``lorafuse bench BUNDLE --task TASK`` says whether merging cost latency.

    Example: lorafuse bench bundle --task movies
    """


@app.command(VERDICT)
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
    count_instructions: Annotated[
        bool, typer.Option(help="Also count each arm's instructions of one run, with valgrind: minutes an arm.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the order in which arms take turns.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write a JSON report with every sample.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one self-contained page.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the report as Markdown.")] = None,
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
    from engines.latency.instructions import check_countable
    from engines.latency.report import check_writable
    from engines.latency.run import run
    from engines.latency.workloads import loads_of
    from exporter.bundle.manifest import open_bundle
    from exporter.bundle.task_part import task_part

    check_writable([path for path in (out, html, markdown) if path is not None])
    bench_part = task_part(open_bundle(bundle), task, part)
    loads = loads_of(bench_part, batch, length, tokens)
    with progress(f"bench {task}") as step, opener(backend.value, threads, step) as engines:
        check_clock(clock.value, engines.on_thread)
        if count_instructions:
            check_countable(engines.on_thread)
        arms = arms_of(bench_part, engines, [choice.value for choice in extra or []], _brought(arm or []))
        protocol = Protocol(
            seconds, margin if gate is None else gate, seed, clock=clock.value, count=count_instructions
        )
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


@app.command()
def serve(
    bundle: BundlePath,
    task: TaskName,
    part: PartName = MODEL,
    rate: Annotated[
        float | None,
        typer.Option(min=0.001, max=1e6, help="Open loop: requests a second, by chance. Default: closed loop."),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, max=1024, help="Threads that answer; in a closed loop, clients that ask.")
    ] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Rows in a request.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Sequence length, in tokens.")] = 128,
    seconds: Annotated[float, typer.Option(min=0.1, max=1e6, help="How long each arm is under traffic.")] = 30.0,
    threads: Threads = 1,
    seed: Annotated[int, typer.Option(help="Seed of when requests arrive.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Put base and merged engine under traffic: requests a second, and p50 to p99.9 of their times, queueing included.

    Exit status 2: more requests came than could be answered.

    Example: lorafuse bench serve bundle --task movies --rate 40
    """
    from dataclasses import asdict

    from engines.latency.arm_engines import OnnxRuntimeOpener
    from engines.latency.arms import arms_of
    from engines.latency.service import Traffic
    from engines.latency.service import serve as put_under_traffic
    from engines.latency.verdict import BASE, MERGED
    from engines.latency.workloads import loads_of, work_of
    from exporter.bundle.manifest import open_bundle
    from exporter.bundle.task_part import task_part

    served = task_part(open_bundle(bundle), task, part)
    load = loads_of(served, [batch], [length])[0]
    work = work_of(served.graph, served.bundle.manifest.base.vocabulary, load)
    with progress(f"serve {task}") as step:
        arms = [arm for arm in arms_of(served, OnnxRuntimeOpener(threads)).arms if arm.name in (BASE, MERGED)]
        services = put_under_traffic(arms, work, Traffic(rate, workers, seconds, seed), step)
    if as_json:
        print_json([asdict(service) for service in services])
    else:
        _print_services(f"{task}: {load}", services, rate, workers)
    raise typer.Exit(UNDECIDED if any(service.overloaded for service in services) else DONE)


def _print_services(title: str, services: Sequence[Service], rate: float | None, workers: int) -> None:
    from engines.latency.service import PERCENTILES
    from engines.latency.words import interval

    names = [f"p{percentile:g}" for percentile in PERCENTILES]
    rows = [
        (
            s.arm,
            str(s.requests),
            f"{s.rate:.1f}",
            *(f"{s.percentiles[name]:.3f}" if name in s.percentiles else "-" for name in names),
            "-" if s.ratio is None else interval(s.ratio),
        )
        for s in services
    ]
    waiting, chance = (
        f"{workers} client(s) that wait",
        f"{rate or 0:g} requests a second by chance, {workers} worker(s)",
    )
    columns = ("arm", "answered", "a second", *(f"{name} ms" for name in names), "median beside base")
    print_table(f"{title}, {waiting if rate is None else chance}", columns, rows)
    if any(not service.percentiles.keys() >= set(names) and not service.overloaded for service in services):
        print("A percentile with too few requests beyond it is not told; more --seconds carry more of them.")
    for service in services:
        for sentence in _said_of(service, rate):
            print(sentence)


def _said_of(service: Service, rate: float | None) -> list[str]:
    """What the percentiles don't tell: an overload, a queue that was carried over, requests left without an answer."""
    if service.overloaded:
        return [
            f"OVERLOADED: {rate:g} requests a second come and {service.arm} answers {service.rate:.1f};"
            f" {service.waiting} of {service.arrived} were waiting after {service.seconds:.1f} s. Their times would say"
            " how long it was measured; choose a lower --rate or more --workers"
        ]
    said = []
    if any(service.queues[:-1]):
        said.append(f"{service.arm}: up to {max(service.queues[:-1])} requests were carried over from slice to slice")
    if service.waiting:
        said.append(
            f"{service.arm}: {service.waiting} of {service.arrived} requests were not answered in time; they count with"
            " the time that they had waited"
        )
    return said


@app.command("compare")
def compare_reports(
    first: Annotated[Path, typer.Argument(help="A report that --out wrote.")],
    second: Annotated[Path, typer.Argument(help="Another, of another machine or version.")],
    margin: Margin = "1%",
    as_json: AsJson = False,
) -> None:
    """Compare two reports, arm by arm: times, and what each arm costs beside its own base.

    Exit status 0: no arm is slower; 1: one is slower by more than the margin; 2: undecided.

    Example: lorafuse bench compare before.json after.json
    """
    from dataclasses import asdict

    from engines.latency.compare import compare
    from engines.latency.report import read_report
    from engines.latency.words import interval

    compared = compare(read_report(first), read_report(second), margin)
    if as_json:
        print_json([asdict(one) for one in compared])
    else:
        rows = [
            (
                one.arm,
                str(one.load),
                f"{one.before:.3f}",
                f"{one.after:.3f}",
                interval(one.time),
                interval(one.cost) if one.cost else "-",
                one.decision,
            )
            for one in compared
        ]
        print_table(
            f"{second} against {first}",
            ("arm", "load", "ms before", "ms after", "time", "cost beside its base", f"at {margin:.1%}"),
            rows,
        )
    decisions = {one.decision for one in compared}
    raise typer.Exit(NO if "slower" in decisions else UNDECIDED if "inconclusive" in decisions else DONE)

"""``lorafuse bench``: the verdict on a task's latency, a service under load, and two reports compared."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from engines.commands.options import (
    MODEL,
    AsJson,
    Backend,
    BackendChoice,
    BundlePath,
    Digest,
    PartName,
    TaskName,
    Threads,
)
from engines.commands.terminal import DONE, NO, UNDECIDED, print_json, print_table, progress
from lora.errors import LorafuseError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engines.latency.equivalence import Ratio
    from engines.latency.report import Report

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

    Exit status 0: equivalent within the margin; 1: slower; 2: undecided, or this machine is too noisy.

    Example: lorafuse bench bundle --task movies --seconds 120 --out report.json
    """
    from engines.latency.arm_engines import opener
    from engines.latency.arms import arms_of
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
        arms = arms_of(bench_part, engines, [choice.value for choice in extra or []], _brought(arm or []))
        protocol = Protocol(seconds, margin if gate is None else gate, seed)
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
    columns = (
        "arm",
        "median ms",
        "p90 ms",
        "rows/s",
        "opening ms",
        "first ms",
        "ratio to base",
        f"at {report.margin:.3g}",
    )
    for point in report.points:
        rows = [
            (
                r.arm,
                f"{r.p50:.3f}",
                f"{r.p90:.3f}",
                f"{r.rate:.1f}",
                f"{r.opening:.0f}",
                f"{r.first:.2f}",
                _interval(r.ratio),
                r.decision,
            )
            for r in point.readings
        ]
        print_table(
            f"{report.subject}: {point.load}, {len(point.samples.runs)} sets × {len(point.samples.runs[0])} rounds",
            columns,
            rows,
        )
        if point.device:
            stages = [(d.arm, f"{d.copies_there:.3f}", f"{d.engine:.3f}", f"{d.copies_back:.3f}") for d in point.device]
            print_table(
                "on the device, by its own clock", ("arm", "copies there ms", "engine ms", "copies back ms"), stages
            )
        print(f"{point.verdict.upper()}: {point.reason}")
    for name, reason in report.left_out.items():
        print(f"no arm '{name}': {reason}")


def _line(report: Report) -> str:
    """The verdict, with the reason of the load that decided it."""
    point = next(point for point in report.points if point.verdict == report.verdict)
    ratio = point.reading("merged").ratio
    return f"{report.verdict.upper()}: {report.subject}, {point.load}: {_interval(ratio)}; {point.reason}"


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
    digest: Digest = None,
    as_json: AsJson = False,
) -> None:
    """Put base and merged engine under traffic: requests a second, and p50 to p99.9 of their times, queueing included.

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

    served = task_part(open_bundle(bundle, digest), task, part)
    load = loads_of(served, [batch], [length])[0]
    work = work_of(served.graph, served.bundle.manifest.base.vocabulary, load)
    with progress(f"serve {task}") as step:
        arms = [arm for arm in arms_of(served, OnnxRuntimeOpener(threads)).arms if arm.name in (BASE, MERGED)]
        services = put_under_traffic(arms, work, Traffic(rate, workers, seconds, seed), step)
    if as_json:
        print_json([asdict(service) for service in services])
        return
    columns = ("arm", "requests", "a second", *(f"{name} ms" for name in services[0].percentiles))
    rows = [
        (s.arm, str(s.requests), f"{s.rate:.1f}", *(f"{value:.3f}" for value in s.percentiles.values()))
        for s in services
    ]
    loop = (
        f"{workers} client(s) that wait"
        if rate is None
        else f"{rate:g} requests a second by chance, {workers} worker(s)"
    )
    print_table(f"{task}: {load}, {loop}", columns, rows)


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
                _interval(one.time),
                _interval(one.cost) if one.cost else "-",
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


def _interval(ratio: Ratio) -> str:
    return f"{ratio.median:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]"

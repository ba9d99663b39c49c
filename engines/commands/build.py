"""``lorafuse build``: engines for the tasks of a bundle."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from engines.commands.options import AsJson, Backend, BackendChoice, BundlePath, Digest
from engines.commands.terminal import print_json, print_table, progress
from lora.errors import BundleError, EngineError
from lora.wording import megabytes

if TYPE_CHECKING:
    from engines.building.build import Asked, Built
    from exporter.bundle.manifest import Bundle


class ModeChoice(StrEnum):
    """How a TensorRT engine gets a task's weights, as the command line takes it."""

    rebuild = "rebuild"
    refit = "refit"
    stripped = "stripped"


Profile = Annotated[
    list[str] | None,
    typer.Option(help="Sizes of an input, smallest, typical and largest: input_ids=1x16,1x128,8x512; repeatable."),
]
Capabilities = Annotated[
    list[str] | None,
    typer.Option(help="tensorrt-rtx: a GPU generation, such as 8.9; repeatable. Default: any from Ampere on."),
]


def build(
    bundle: BundlePath,
    task: Annotated[list[str] | None, typer.Option(help="Task to build; repeatable. Default: all.")] = None,
    backend: Backend = BackendChoice.onnxruntime,
    mode: Annotated[
        ModeChoice,
        typer.Option(
            help=(
                "An engine for each task, or one for all whose weights are exchanged at load, with or without weights"
                " in it."
            )
        ),
    ] = ModeChoice.rebuild,
    unadapted: Annotated[
        bool, typer.Option("--unadapted", help="Build the unadapted base's engine beside the tasks'.")
    ] = False,
    profile: Profile = None,
    compute_capability: Capabilities = None,
    compatible: Annotated[
        bool, typer.Option("--compatible", help="tensorrt: for any GPU from Ampere on, not for this one alone.")
    ] = False,
    workspace: Annotated[
        int | None, typer.Option(min=1, help="Most memory that a tactic may take, in MB. Default: the device's.")
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="How long the builder looks for tactics. Default: TensorRT's.")
    ] = None,
    price: Annotated[
        bool,
        typer.Option("--price", help="Build nothing into the bundle; measure what each way to get an engine costs."),
    ] = False,
    digest: Digest = None,
    as_json: AsJson = False,
) -> None:
    """Build an engine for each task.

    Example: lorafuse build bundle --backend tensorrt-rtx --compute-capability 8.9
    """
    from engines.backends import BuildOptions
    from engines.building.build import Asked
    from exporter.bundle.manifest import open_bundle

    opened = open_bundle(bundle, digest)
    options = BuildOptions(
        compute_capabilities=tuple(compute_capability or ()),
        compatible=compatible,
        workspace=workspace * 10**6 if workspace else None,
        optimization_level=optimization_level,
        mode=mode.value,
    )
    asked = Asked(backend.value, options, profile or ())
    tasks = task or sorted(opened.manifest.tasks)
    if price:
        if not tasks:
            raise BundleError(f"{bundle}: holds no task whose engine could be priced; add one with 'lorafuse export'")
        _price(opened, tasks[0], asked, as_json)
        return
    built = _built(opened, tasks, asked, unadapted)
    if as_json:
        print_json([_record(one) for one in built])
        return
    rows = [
        (
            one.task,
            f"{one.engine.backend} {one.engine.version}",
            one.engine.target,
            one.engine.mode,
            *_size(one),
            f"{one.seconds:.1f} s",
            megabytes(one.memory),
        )
        for one in built
    ]
    print_table("engines", ("task", "backend", "target", "mode", "plan", "built in", "peak memory"), rows)


def _built(opened: Bundle, tasks: list[str], asked: Asked, unadapted: bool) -> list[Built]:
    """Build, or prove, what is asked for: every part of every task, after the graphs that they share."""
    from engines.backends import backend
    from engines.building.build import build as build_engine
    from engines.building.build import build_unadapted
    from engines.building.refit_proof import prove
    from exporter.bundle.task_part import task_parts

    parts = [part for name in tasks for part in task_parts(opened, name)]
    graphs = {part.part.graph: part for part in reversed(parts)}  # the first task of each graph
    shared = asked.options.mode != "rebuild"
    if shared and not backend(asked.backend).has_plans:
        raise EngineError(
            f"--mode {asked.options.mode}: {asked.backend} exchanges no weights in an engine; choose a TensorRT backend"
        )
    built = []
    for part in graphs.values() if shared or unadapted else ():
        with progress("build the unadapted base") as step:
            built.append(build_unadapted(opened.path, part.name, asked, part.role, step))
    for part in parts:
        with progress(f"{'prove' if shared else 'build'} {part.name}") as step:
            if shared:
                prove(opened.path, part.name, asked, part.role, step)
            else:
                built.append(build_engine(opened.path, part.name, asked, part.role, step))
    return built


def _price(opened: Bundle, task: str, asked: Asked, as_json: bool) -> None:
    from dataclasses import asdict

    from engines.latency.price import price
    from exporter.bundle.task_part import task_part

    with progress(f"price {task}") as step:
        priced = price(task_part(opened, task), asked, step)
    if as_json:
        print_json([asdict(one) for one in priced])
        return
    rows = [
        (
            one.way,
            "-" if one.seconds is None else f"{one.seconds:.2f} s",
            "-" if one.size is None else megabytes(one.size),
            one.note or "",
        )
        for one in priced
    ]
    print_table(f"{task} on {asked.backend}", ("way", "time", "plan", "note"), rows)


def _record(one: Built) -> dict[str, object]:
    engine = one.engine
    return {
        "task": one.task,
        "backend": engine.backend,
        "version": engine.version,
        "target": engine.target,
        "mode": engine.mode,
        "bytes": one.size,
        "seconds": one.seconds,
        "memory": one.memory,
    }


def _size(one: Built) -> tuple[str]:
    return (megabytes(one.size) if one.size else "runs the ONNX model",)

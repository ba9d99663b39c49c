"""``lorafuse export`` and ``lorafuse bundle``."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora.cli import AsJson, FloatDtype
from lora.terminal import DONE, NO, megabytes, print_json, print_table, progress

if TYPE_CHECKING:
    from exporter.task import Exported

app = typer.Typer()
bundle_app = typer.Typer(no_args_is_help=True, help="Look into a bundle, check and pack it, add and remove tasks.")
app.add_typer(bundle_app, name="bundle")

BundlePath = Annotated[Path, typer.Argument(help="The bundle's folder.")]


class StoreChoice(StrEnum):
    """How a task's changed tensors are kept."""

    dense = "dense"
    factors = "factors"


TaskName = Annotated[str, typer.Option(help="Name of the task in the bundle.")]
Labels = Annotated[str, typer.Option(help="Class labels, comma-separated, in the order of the head's outputs.")]
Store = Annotated[StoreChoice, typer.Option(help="dense: merged tensors, for any runtime. factors: the adapter alone, merged when the task is loaded.")]


@app.command()
def export(
    base: Annotated[Path, typer.Argument(help="Folder of the base model: config.json, model.safetensors, tokenizer.json.")],
    adapter: Annotated[Path | None, typer.Argument(help="Folder of the adapter, in PEFT's format. Without one, the task is the base as it is.")] = None,
    *,
    task: TaskName,
    out: Annotated[Path, typer.Option(help="The bundle; created if there is none, else the task is added to it.")],
    labels: Labels = "",
    task_type: Annotated[str | None, typer.Option(help="SEQ_CLS, TOKEN_CLS, CAUSAL_LM … Default: the adapter's, or the base's architecture.")] = None,
    precision: Annotated[FloatDtype | None, typer.Option(help="Of weights and products. Default: the bundle's, or float32 in a new one.")] = None,
    store: Store = StoreChoice.dense,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base and write the task into a bundle.

    The base is traced once per distinct head; a further task adds its changed tensors and its graph.

    Example: lorafuse export MiniLM adapters/movies --task movies --labels negative,positive --out bundle
    """
    from exporter.task import Request, export_task

    request = Request(base, adapter, task, _split(labels), task_type, precision.value if precision else None, store.value)
    with progress(f"export {task}") as step:
        exported = export_task(request, out, step)
    _print_exported(exported, out, as_json)


@bundle_app.command()
def add(
    bundle: BundlePath,
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter, in PEFT's format.")],
    task: TaskName,
    labels: Labels = "",
    store: Store = StoreChoice.dense,
    as_json: AsJson = False,
) -> None:
    """Add a task to a bundle, without the base's checkpoint: a task with the same kind of head must be in it.

    Example: lorafuse bundle add bundle adapters/books --task books --labels negative,positive
    """
    from exporter.task import add_task

    with progress(f"add {task}") as step:
        exported = add_task(bundle, adapter, task, _split(labels), store.value, step)
    _print_exported(exported, bundle, as_json)


def _split(labels: str) -> tuple[str, ...]:
    return tuple(filter(None, labels.split(",")))


def _print_exported(exported: Exported, out: Path, as_json: bool) -> None:
    added = {
        "base weights": exported.base_bytes,
        "graph": exported.graph_bytes,
        "changed tensors": exported.changed_bytes,
        "adapter (kept for verification)": exported.adapter_bytes,
    }
    if as_json:
        print_json({"task": exported.task, "bundle": str(out), "traced": exported.traced, "changed": exported.changed, "bytes_added": added})
        return
    traced = "base traced" if exported.traced else "graph reused"
    rows = [(what, megabytes(size)) for what, size in added.items()]
    print_table(f"{exported.task} → {out}: {len(exported.changed)} tensors changed, {traced}", ("added to the bundle", "size"), rows)


@bundle_app.command("ls")
def list_tasks(bundle: BundlePath, as_json: AsJson = False) -> None:
    """List the tasks of a bundle, what each adds to it, and its engines.

    Example: lorafuse bundle ls bundle
    """
    from exporter.bundle.listing import base_size, listing
    from exporter.bundle.manifest import open_bundle

    manifest = open_bundle(bundle).manifest
    tasks = listing(manifest)
    if as_json:
        print_json({"base": {"sha256": manifest.base.sha256, "size": base_size(manifest)}, "tasks": [asdict(task) for task in tasks]})
        return
    rows = [(task.task, task.head, task.store, task.graph[:12], megabytes(task.size), ", ".join(task.engines) or "-") for task in tasks]
    print_table(f"{bundle}: base {manifest.base.sha256[:12]}…, {megabytes(base_size(manifest))}", ("task", "head", "stored", "graph", "files", "engines"), rows)


@bundle_app.command()
def remove(bundle: BundlePath, task: Annotated[str, typer.Option(help="The task to remove, with its engines.")], as_json: AsJson = False) -> None:
    """Remove a task from a bundle; the base's weights stay.

    Example: lorafuse bundle remove bundle --task movies
    """
    from exporter.bundle.remove import remove_task

    left = sorted(remove_task(bundle, task).manifest.tasks)
    if as_json:
        print_json({"removed": task, "tasks": left})
    else:
        print(f"removed {task}; {bundle} holds: {', '.join(left) or 'no tasks'}")


@bundle_app.command()
def pack(
    bundle: BundlePath,
    out: Annotated[Path, typer.Argument(help="The tar file to write.")],
    task: Annotated[list[str] | None, typer.Option(help="Task to pack; repeatable. Default: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Pack a bundle, or some of its tasks, into one file for shipping; 'tar xf' makes a bundle of it again.

    Example: lorafuse bundle pack bundle movies.tar --task movies
    """
    from exporter.bundle.pack import pack_bundle

    with progress("pack") as step:
        size = pack_bundle(bundle, out, task or (), step)
    if as_json:
        print_json({"packed": str(out), "bytes": size})
    else:
        print(f"{out}: {megabytes(size)}; 'tar xf' unpacks it to {out.stem}/")


@bundle_app.command()
def check(bundle: BundlePath, as_json: AsJson = False) -> None:
    """Compare every file of a bundle with its manifest, and name those that no manifest names.

    Exit status 1 when something is wrong.

    Example: lorafuse bundle check bundle
    """
    from exporter.bundle.check import check_bundle

    with progress("check") as step:
        findings = check_bundle(bundle, step)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        print("\n".join(finding.problem for finding in findings) or f"{bundle}: every file is as its manifest says, and there is no other")
    raise typer.Exit(NO if findings else DONE)

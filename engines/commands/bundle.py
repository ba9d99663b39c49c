"""``lorafuse bundle``: look into a bundle, check and pack it, add and remove tasks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engines.commands.export import Labels, Store, StoreChoice, given_adapters, labels_in, print_exported
from engines.commands.options import (
    AdaptersOption,
    Alpha,
    AsJson,
    BundlePath,
    Component,
    Density,
    Digest,
    EnableLora,
    RuleChoice,
    RuleOption,
    Seed,
    TaskName,
    weighted,
)
from engines.commands.terminal import DONE, NO, print_json, print_note, print_table, progress
from lora.wording import megabytes

if TYPE_CHECKING:
    from exporter.bundle.listing import Listed

app = typer.Typer(no_args_is_help=True, help="Look into a bundle, check, pack and upgrade it, add and remove tasks.")


@app.command()
def add(
    bundle: BundlePath,
    adapter: Annotated[
        Path | None, typer.Argument(help="The adapter: a PEFT folder, or a loralib, kohya or diffusers file.")
    ] = None,
    *,
    task: TaskName,
    adapters: AdaptersOption = None,
    rule: RuleOption = RuleChoice.linear,
    density: Density = 0.5,
    seed: Seed = 0,
    alpha: Alpha = None,
    component: Component = None,
    enable_lora: EnableLora = None,
    labels: Labels = "",
    store: Store = StoreChoice.dense,
    digest: Digest = None,
    as_json: AsJson = False,
) -> None:
    """Add a task to a bundle, without the base's checkpoint: a task with the same kind of head must be in it.

    Example: lorafuse bundle add bundle adapters/books --task books --labels negative,positive
    """
    from exporter.bundle.manifest import check_pinned
    from exporter.task import add_task

    check_pinned(bundle, digest)
    given = given_adapters(weighted(adapter, adapters), alpha, component, enable_lora, rule, density, seed)
    with progress(f"add {task}") as step:
        exported = add_task(bundle, given, task, labels_in(labels), store.value, step)
    print_exported(exported, bundle, as_json)


@app.command("ls")
def list_tasks(bundle: BundlePath, digest: Digest = None, as_json: AsJson = False) -> None:
    """List the tasks of a bundle, what each adds to it, and its engines; and the digest, by which it can be pinned.

    Example: lorafuse bundle ls bundle
    """
    from exporter.bundle.listing import base_size, listing
    from exporter.bundle.manifest import open_bundle

    opened = open_bundle(bundle, digest)
    manifest = opened.manifest
    tasks = listing(manifest)
    if as_json:
        print_json(
            {
                "digest": opened.digest,
                "base": {"sha256": manifest.base.sha256, "size": base_size(manifest)},
                "tasks": [asdict(task) for task in tasks],
            }
        )
        return
    rows = [_row(task) for task in tasks]
    print_table(
        f"{bundle}: {opened.digest}, base {manifest.base.sha256[:12]}…, {megabytes(base_size(manifest))}",
        ("task", "head", "stored", "graph", "files", "engines"),
        rows,
    )


def _row(task: Listed) -> tuple[str, ...]:
    graphs = ", ".join(digest[:12] for digest in task.graph.split(", "))
    return task.task, task.head, task.store, graphs, megabytes(task.size), ", ".join(task.engines) or "-"


@app.command()
def remove(
    bundle: BundlePath,
    task: Annotated[str, typer.Option(help="The task to remove, with its engines.")],
    digest: Digest = None,
    as_json: AsJson = False,
) -> None:
    """Remove a task from a bundle; the base's weights stay.

    Example: lorafuse bundle remove bundle --task movies
    """
    from exporter.bundle.edits import remove_task
    from exporter.bundle.manifest import check_pinned

    check_pinned(bundle, digest)
    left = sorted(remove_task(bundle, task).manifest.tasks)
    if as_json:
        print_json({"removed": task, "tasks": left})
    else:
        print(f"removed {task}; {bundle} holds: {', '.join(left) or 'no tasks'}")


@app.command()
def pack(
    bundle: BundlePath,
    out: Annotated[Path, typer.Argument(help="The tar file to write.")],
    task: Annotated[list[str] | None, typer.Option(help="Task to pack; repeatable. Default: all.")] = None,
    digest: Digest = None,
    as_json: AsJson = False,
) -> None:
    """Pack a bundle, or some of its tasks, into one file for shipping; 'tar xf' makes a bundle of it again.

    Example: lorafuse bundle pack bundle movies.tar --task movies
    """
    from exporter.bundle.manifest import check_pinned
    from exporter.bundle.pack import pack_bundle

    check_pinned(bundle, digest)
    with progress("pack") as step:
        size = pack_bundle(bundle, out, task or (), step)
    if as_json:
        print_json({"packed": str(out), "bytes": size})
    else:
        print(f"{out}: {megabytes(size)}; 'tar xf' unpacks it to {out.stem}/")


@app.command()
def upgrade(bundle: BundlePath, digest: Digest = None, as_json: AsJson = False) -> None:
    """Upgrade a bundle that an earlier lorafuse wrote, in place and without the base.

    Example: lorafuse bundle upgrade bundle
    """
    from exporter.bundle.manifest import check_pinned
    from exporter.upgrade import upgrade as upgrade_bundle

    check_pinned(bundle, digest)
    manifest = upgrade_bundle(bundle).manifest
    if as_json:
        print_json({"bundle": str(bundle), "schema": manifest.schema, "tasks": sorted(manifest.tasks)})
    else:
        print(f"{bundle}: schema {manifest.schema}; {len(manifest.tasks)} tasks, their files as they were")


@app.command()
def check(
    bundle: BundlePath,
    repair: Annotated[
        bool, typer.Option("--repair", help="First remove the staging folders that killed changes have left.")
    ] = False,
    digest: Digest = None,
    as_json: AsJson = False,
) -> None:
    """Compare every file of a bundle with its manifest, and name those that no manifest names.

    Exit status 1 when something is wrong.

    Example: lorafuse bundle check bundle
    """
    from exporter.bundle.check import check_bundle
    from exporter.bundle.check import repair as remove_left_over
    from exporter.bundle.manifest import check_pinned

    check_pinned(bundle, digest)
    for folder in remove_left_over(bundle) if repair else ():
        print_note(f"removed {folder}")
    with progress("check") as step:
        findings = check_bundle(bundle, step)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        print(
            "\n".join(finding.problem for finding in findings)
            or f"{bundle}: every file is as its manifest says, and there is no other"
        )
    raise typer.Exit(NO if findings else DONE)

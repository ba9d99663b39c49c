"""``lorafuse export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora.terminal import megabytes, print_json, print_table, progress

app = typer.Typer()


@app.command()
def export(
    base: Annotated[Path, typer.Argument(help="Folder of the base model: config.json, model.safetensors, tokenizer.json.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter, in PEFT's format.")],
    task: Annotated[str, typer.Option(help="Name of the task in the bundle.")],
    out: Annotated[Path, typer.Option(help="The bundle; created if there is none, else the task is added to it.")],
    labels: Annotated[str, typer.Option(help="Class labels, comma-separated, in the order of the head's outputs.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Merge an adapter into its base and write the task into a bundle.

    The base is traced once per distinct head; a further task adds its changed tensors and its graph.

    Example: lorafuse export MiniLM adapters/movies --task movies --labels negative,positive --out bundle
    """
    from exporter.task import Request, export_task

    request = Request(base, adapter, task, tuple(filter(None, labels.split(","))))
    with progress(f"export {task}") as step:
        exported = export_task(request, out, step)
    added = {
        "base weights": exported.base_bytes,
        "graph": exported.graph_bytes,
        "changed tensors": exported.changed_bytes,
        "adapter (kept for verification)": exported.adapter_bytes,
    }
    if as_json:
        print_json({"task": task, "bundle": str(out), "traced": exported.traced, "changed": exported.changed, "bytes_added": added})
        return
    traced = "base traced" if exported.traced else "graph reused"
    rows = [(what, megabytes(size)) for what, size in added.items()]
    print_table(f"{task} → {out}: {len(exported.changed)} tensors changed, {traced}", ("added to the bundle", "size"), rows)

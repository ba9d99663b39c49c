"""Exporting a torch module from Python: traced under its parameters' names, merged, written into a bundle."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from exporter.bundle.manifest_file import check_task_name
from exporter.bundle.records import MODEL, Head, Precision, Store
from exporter.bundle.staging import current_bundle
from exporter.bundle.task_types import MODULE
from exporter.graph.precision import torch_dtype
from exporter.graph.signature import Called, Signature
from exporter.source import Source
from exporter.task import check_same_base, export_traced, precision_of, recipe_of
from exporter.writing import Exported, TaskDraft
from lora.progress import Progress, unheard


def export(
    module: nn.Module,
    example_inputs: Mapping[str, Tensor],
    out: str | Path,
    *,
    task: str,
    adapter: str | Path | None = None,
    axes: Mapping[str, Mapping[int, str]] | None = None,
    outputs: tuple[str, ...] = ("output",),
    precision: Precision | None = None,
    store: Store = "dense",
    progress: Progress = unheard,
) -> Exported:
    """Export ``module(**example_inputs)``, with ``adapter`` merged in, as a task of the bundle ``out``.

    ``axes`` names the dynamic axes of each input; without it, axis 0 of every input is "batch". Example sizes of a
    dynamic axis should be above 1 and differ from those of other axes. ``outputs`` names the tensors that the module
    returns, one or a tuple. ``precision`` None is the bundle's, or float32 in a new one; floating-point inputs and
    outputs stay float32 in any. The module is not changed.
    Raises a LorafuseError as ``export_task`` does, ExportError when torch can't trace the module.

    >>> export(net, {"x": torch.ones(2, 8)}, "bundle", task="digits", adapter="adapters/digits")  # doctest: +SKIP
    """
    check_task_name(task)
    recipe = recipe_of(Path(adapter) if adapter is not None else None)
    dynamic = {name: dict(axes.get(name, {})) if axes is not None else {0: "batch"} for name in example_inputs}

    def traced(role: str, head: Head, asked: Precision) -> Signature:
        model = copy.deepcopy(module).to(torch_dtype(asked))
        return Signature(Called(model, torch_dtype(asked)), dict(example_inputs), dynamic, outputs)

    state = {
        name: tensor.detach().float().numpy()
        for name, tensor in module.state_dict().items()
        if tensor.is_floating_point()
    }
    sha256 = _fingerprint(module)
    source = Source(
        name=type(module).__name__,
        fingerprint=lambda: sha256,
        signature=traced,
        weights=lambda role, head, replaced: state,
        tied=lambda head: (),
        structure=lambda role, head: None,
        files=(),
        longest=0,
        vocabulary=0,
    )
    existing = current_bundle(Path(out))
    check_same_base(existing, sha256)
    draft = TaskDraft(task, recipe, {MODEL: Head(MODULE, len(outputs))}, labels=(), store=store)
    # Traced each time: weights have a fingerprint, a module's code has none.
    return export_traced(source, draft, precision_of(existing, precision), existing, Path(out), progress)


def _fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the state."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

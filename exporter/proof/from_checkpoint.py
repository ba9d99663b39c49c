"""The reference that shares nothing with the exporter's reading: transformers loads the base, and the class of each of
its layers says how an update is added.

The checkpoint is held as it is stored, and one layer at a time is computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from exporter.bundle.structure import of_parameters
from exporter.bundle.task_part import TaskPart
from exporter.dense_base import dense_folder, write_dense
from exporter.graph.precision import torch_dtype
from exporter.graph.signature import signature
from exporter.proof.formula import changed
from exporter.proof.reference import Reference, Runner, caller
from exporter.proof.streaming import Streamed
from exporter.transformers_base import loaded
from lora.adapter import Change, Replacement, Rows
from lora.bases.checkpoint import Checkpoint
from lora.bases.opening import open_base
from lora.errors import ExportError
from lora.files.tensorfile import Array
from lora.modules.base_structure import structure_of_model

Changes = Mapping[str, Sequence[Change]]


@contextmanager
def of_checkpoint(part: TaskPart, base: Path) -> Iterator[Reference]:
    """The reference of a task over the checkpoint in ``base``; a quantized one is dequantized.

    Raises ExportError where it is not the bundle's base, or transformers can't load it.
    """
    opened = open_base(base, dequantize=True)
    held = part.bundle.manifest.base.sha256
    if opened.fingerprint() != held:
        raise ExportError(
            f"{base}: is not the base of {part.bundle.path}, whose SHA-256 is {held[:12]}…; give the base that it was"
            " exported from"
        )
    with dense_folder(opened) as folder:
        write_dense(opened, folder)
        yield _reference(part, folder, base)


def _reference(part: TaskPart, folder: Path, base: Path) -> Reference:
    model, absent = loaded(folder, part.graph.head, part.role)
    structure = of_parameters(structure_of_model(model, Checkpoint(folder)))
    changes = _of_tied(model, part.recipe.targets({}, structure))
    values = _Values(part, model, changes, absent)
    words = f"transformers' own model of {base}, changed by the formula of each layer's class"
    module = signature(model, part.graph.head, part.role).module
    streamed = Streamed(model, lambda names: values.of(names))
    return Reference(
        words,
        exact=lambda name: values.exact(name).numpy(),
        base=lambda name: values.base(name).numpy(),
        adapted=values.run(caller(module, streamed.run), adapted=True),
        unadapted=values.run(caller(module, streamed.run), adapted=False),
        release=values.release,
    )


class _Values:
    """The parameters of the loaded model, with and without the changes, each computed when it is asked for."""

    def __init__(self, part: TaskPart, model: nn.Module, changes: Changes, absent: frozenset[str]) -> None:
        named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        self._held = {name: tensor.detach() for name, tensor in named}
        self._owners = {
            f"{path}.{name}" if path else name: module
            for path, module in model.named_modules(remove_duplicate=False)
            for name in (*module._parameters, *module._buffers)
        }
        self._changes, self._absent, self._adapted = changes, absent, True
        self._dtypes = {name: getattr(torch, weight.dtype) for name, weight in part.graph.weights.items()}
        self._precision = torch_dtype(part.bundle.manifest.base.precision)
        untrained = sorted(name for name in absent if name in self._dtypes and not self._brought(name))
        if untrained:
            raise ExportError(
                f"{part.bundle.path}: '{untrained[0]}' of task '{part.name}' is neither in the base nor in the adapter;"
                " give the base that it was exported from"
            )

    def base(self, name: str) -> Tensor:
        """The unadapted value; what the base does not have is the adapter's."""
        if name in self._absent and self._brought(name):
            return self._rounded(name, changed(self._owners[name], name, self._held[name], self._brought(name)))
        return self._rounded(name, self._held[name])

    def exact(self, name: str) -> Tensor:
        """The value by the formula; tensors that are brought whole are stored, and so rounded once."""
        changes = self._changes.get(name, ())
        if self._brought(name) and len(self._brought(name)) == len(changes):
            return self._rounded(name, changed(self._owners[name], name, self._held[name], changes))
        base = self._held[name].to(self._dtypes.get(name, self._precision))
        return changed(self._owners[name], name, base, changes)

    def of(self, names: tuple[str, ...]) -> Tensor:
        """The value of a parameter of the model that is running; of a module in several places, the changed one."""
        if not self._adapted:
            return self.base(names[0])
        return self.exact(next((name for name in names if name in self._changes), names[0]))

    def run(self, runner: Runner, adapted: bool) -> Runner:
        """The runner, on the values of the one model or the other."""

        def switched(inputs: Mapping[str, Array]) -> Array:
            self._adapted = adapted
            return runner(inputs)

        return switched

    def release(self) -> None:
        """Forget the checkpoint."""
        self._held.clear()

    def _brought(self, name: str) -> list[Change]:
        return [change for change in self._changes.get(name, ()) if isinstance(change, Replacement)]

    def _rounded(self, name: str, value: Tensor) -> Tensor:
        return value.to(self._dtypes.get(name, self._precision)).double()


def _of_tied(model: nn.Module, targets: Changes) -> Changes:
    """Trained tokens stay tied, as they were trained: they are for every name of the tensor."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {name: list(changes) for name, changes in targets.items()}
    for name, changes in targets.items():
        rows = [change for change in changes if isinstance(change, Rows)]
        for other, parameter in parameters.items():
            if rows and other != name and parameter is parameters.get(name) and other not in targets:
                found[other] = list(rows)
    return found

"""What a task's adapter changes, out of the bundle, and the merge that a task stored as factors is loaded with.

No torch, no onnx.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from exporter.bundle.layout import ModelWeights, to_graph
from exporter.bundle.manifest import Bundle
from lora.adapter import Change, Replacement
from lora.files.tensorfile import Array, TensorFile
from lora.formats.peft import read_peft
from lora.merging.fit import changes_by_parameter
from lora.merging.merge import merge


def bundled_changes(bundle: Bundle, task: str, base: ModelWeights | None = None) -> dict[str, list[Change]]:
    """{parameter: its changes} of the adapter that the task was made of; none where the task is the unadapted base.

    ``base`` is ``base_stored``'s, where the caller has it: opening it hashes all the base's weights.
    """
    record = bundle.task(task)
    if not record.adapter:
        return {}
    paths = [bundle.checked(file) for file in record.adapter]
    return changes_by_parameter(base_stored(bundle, task) if base is None else base, read_peft(paths[0].parent))


def base_stored(bundle: Bundle, task: str) -> ModelWeights:
    """The base's weights that the task's graph can read, by parameter name, after their hashes were compared.

    A base's own head is not among them where the task brought one of another size.
    """
    base = [TensorFile(bundle.checked(file)) for file in bundle.manifest.base.weights]
    own = [TensorFile(bundle.checked(file)) for file in bundle.task(task).own_weights]
    shapes = {stored: file.shape(stored) for file in own for stored in file}
    return ModelWeights(base, bundle.graph(bundle.task(task)).weights, shapes)


def own_stored(bundle: Bundle, task: str) -> ModelWeights:
    """The tensors that the bundle stores for the task, by parameter name, after their hashes were compared."""
    files = [TensorFile(bundle.checked(file)) for file in bundle.task(task).own_weights]
    return ModelWeights(files, bundle.graph(bundle.task(task)).weights)


def own_names(bundle: Bundle, task: str) -> frozenset[str]:
    """The names of ``own_stored``, from the file's header alone: nothing is hashed, for no value is read."""
    files = [TensorFile(bundle.present(file)) for file in bundle.task(task).own_weights]
    return frozenset(ModelWeights(files, bundle.graph(bundle.task(task)).weights))


def brought_whole(changes: Sequence[Change]) -> bool:
    """Whether the adapter brings the tensor itself, so that there is nothing to merge."""
    return all(isinstance(change, Replacement) for change in changes)


def merged_at_load(bundle: Bundle, task: str, base: ModelWeights | None = None) -> dict[str, Array]:
    """The tensors that loading the task must merge, by parameter name and in the model's axis order; none for a dense
    task.

    The same numbers as a dense export stores: W + ΔW in float32, rounded once. Raises AdapterError as the merge does.
    ``base`` as for ``bundled_changes``.
    """
    record = bundle.task(task)
    if record.store == "dense" or not record.adapter:
        return {}
    base = base_stored(bundle, task) if base is None else base
    targets = {
        name: changes for name, changes in bundled_changes(bundle, task, base).items() if not brought_whole(changes)
    }
    return {merged.parameter: merged.stored for merged in merge(base, targets, bundle.path / record.adapter[0].path)}


def in_graph_order(bundle: Bundle, task: str, values: Mapping[str, Array]) -> dict[str, Array]:
    """``values`` as the graph's initializers of those names have them."""
    weights = bundle.graph(bundle.task(task)).weights
    return {name: to_graph(tensor, weights[name]) for name, tensor in values.items()}

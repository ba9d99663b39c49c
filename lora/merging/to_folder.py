"""From paths to a merged folder: open the base, read the adapters, combine, write."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lora.bases.knowing import Ask, known
from lora.bases.opening import open_base
from lora.formats.model_class import model_class
from lora.formats.read import ReadOptions, read_adapter
from lora.merging.checkpoint import Storing, Written, write_merged
from lora.merging.merge import check_base
from lora.merging.several import Blending, Weighted, combined
from lora.progress import Progress, unheard


@dataclass(frozen=True)
class Sources:
    """The base and the adapters with their weights; how to read what the files leave open; leave to dequantize the
    base.
    """

    base: Path
    adapters: tuple[tuple[Path, float], ...]
    options: ReadOptions
    dequantize: bool = False


def merge_folder(
    sources: Sources,
    out: Path,
    storing: Storing,
    blending: Blending,
    progress: Progress = unheard,
    ask: Ask | None = None,
) -> Written:
    """Merge and write to the new folder ``out``; returns what was written.

    ``ask`` asks transformers what a base is that is not written down here.
    Raises a LorafuseError, and leaves nothing under ``out``, when an input can't be read, does not fit or is refused.
    """
    progress("reading")
    opened = open_base(sources.base, sources.dequantize)
    adapters = [Weighted(read_adapter(path, sources.options), weight) for path, weight in sources.adapters]
    for weighted in adapters:
        if weighted.adapter.base_sha256 is not None:
            check_base(weighted.adapter, opened.fingerprint())
    bases = {wanted: known(opened, wanted, ask) for wanted in {model_class(each.adapter) for each in adapters}}
    targets = combined(opened.tensors, adapters, blending, lambda adapter: bases[model_class(adapter)].structure)
    base = bases[model_class(adapters[0].adapter)]
    progress("merging")
    written = write_merged(base, targets, ", ".join(str(path) for path, _ in sources.adapters), out, storing)
    return replace(written, skipped=tuple(sorted({name for weighted in adapters for name in weighted.adapter.skipped})))

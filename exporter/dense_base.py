"""A quantized base as a checkpoint folder with dense weights, which is what transformers is asked to trace.

The weights are what the quantized ones stand for, by their own formula; the merge says so.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from exporter.source import SIDE_FILES
from lora.bases.checkpoint import CONFIG, SINGLE
from lora.bases.opening import DENSE, Base
from lora.bases.tensors import BaseTensors
from lora.errors import CheckpointError
from lora.files.tensorfile import Lazy, write_tensors


@contextmanager
def dense_folder(base: Base) -> Iterator[Path]:
    """The base's folder; of a quantized base a temporary one with its side files, to which ``write_dense`` adds the
    weights. Raises CheckpointError where nothing says the configuration.
    """
    if base.formula == DENSE and base.folder is not None:
        yield base.folder
        return
    with tempfile.TemporaryDirectory(prefix="lorafuse-dense-") as made:
        folder = Path(made)
        if base.folder is None:
            _write_gguf_config(base.path, folder)
        else:
            for name in SIDE_FILES:
                if (base.folder / name).is_file():
                    shutil.copyfile(base.folder / name, folder / name)
            (folder / CONFIG).write_text(json.dumps(base.config), encoding="utf-8")
        yield folder


def write_dense(base: Base, folder: Path) -> None:
    """Write the weights into what ``dense_folder`` gave, one at a time, in float32; of a dense base they are there."""
    if folder == base.folder:
        return
    tensors = {name: _dense(base.tensors, name) for name in base.tensors}
    write_tensors(folder / SINGLE, tensors, {"format": "pt"})


def _dense(tensors: BaseTensors, name: str) -> Lazy:
    return Lazy(np.dtype(np.float32), tensors.shape(name), lambda: np.asarray(tensors[name], np.float32))


def _write_gguf_config(path: Path, folder: Path) -> None:
    """The configuration that the file's metadata say, and its tokenizer where it has one, as transformers reads it."""
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(f"{path}: exporting needs transformers; run: pip install 'lorafuse[export]'") from error
    source: dict[str, Any] = {"gguf_file": path.name}
    try:
        transformers.AutoConfig.from_pretrained(path.parent, **source).save_pretrained(folder)
    except Exception as error:  # what transformers raises on a stranger's metadata is no short list
        first_line = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{path}: transformers {transformers.__version__} can't read its configuration ({first_line}); give the"
            " base as safetensors"
        ) from error
    try:
        transformers.AutoTokenizer.from_pretrained(path.parent, **source).save_pretrained(folder)
    except Exception:  # a model without a tokenizer takes token ids
        return

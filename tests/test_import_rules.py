"""The rules of import are seen to hold the house: an import that must not be there is found in every wing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLANTED = {
    "lora/formats/kohya.py": "import torch",
    "lora/bases/bnb4.py": "import transformers",
    "lora/merging/fit.py": "import onnx",
    "lora/files/durable.py": "import typer",
    "lora/planning/economics.py": "import exporter.heads",
    "exporter/bundle/edits.py": "import onnx",
    "exporter/graph/digest.py": "import engines.backends",
    "exporter/proof/verify.py": "import engines.serving.load",
    "engines/backends/providers.py": "import engines.feeds.inputs",
    "engines/feeds/text.py": "import exporter.proof.verify",
    "engines/serving/pool.py": "import scipy",
    "engines/building/profiles.py": "import engines.latency.verdict",
    "engines/latency/verdict.py": "import engines.commands.terminal",
}


def broken_by(planted: dict[str, str], folder: Path) -> bool:
    """Whether the rules are broken in a copy of the packages with these imports."""
    for package in ("lora", "exporter", "engines"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("cpp", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for file, line in planted.items():
        with (folder / file).open("a") as module:
            module.write(f"\n{line}\n")
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert "Contracts:" in done.stdout, done.stdout + done.stderr
    return done.returncode != 0


def test_the_house_as_it_stands_keeps_its_rules(tmp_path: Path):
    assert not broken_by({}, tmp_path)


@pytest.mark.parametrize("file", PLANTED)
def test_a_planted_import_is_found(file: str, tmp_path: Path):
    assert broken_by({file: PLANTED[file]}, tmp_path)

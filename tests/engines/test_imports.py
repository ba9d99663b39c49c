"""What a process pays for: imports, seen from a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from exporter.bundle.manifest import Bundle, open_bundle

HEAVY = ("torch", "transformers", "typer", "polygraphy", "onnx")
RUN = """
import engines
import numpy
ids = numpy.ones((1, 4), numpy.int64)
with engines.load(sys.argv[1], "first") as session:
    assert session.run({"input_ids": ids, "attention_mask": ids, "token_type_ids": ids})["logits"].shape == (1, 2)
"""
EXPORT = """
from pathlib import Path
from exporter.task import Request, export_task
exported = export_task(Request(Path(sys.argv[1]), Path(sys.argv[2]), "second"), Path(sys.argv[3]))
assert not exported.traced
"""
HELP = """
from engines.commands.main import app
app(["--help"], standalone_mode=False)
"""


def loaded(code: str, *arguments: str | Path) -> set[str]:
    """The top-level modules that a fresh interpreter holds after running ``code``."""
    report = "\nimport json\nprint('\\n' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    command = [sys.executable, "-c", f"import sys\n{code}{report}", *map(str, arguments)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_engines_alone_imports_none_of_the_heavy_packages():
    modules = loaded("import engines")
    assert "engines" in modules
    assert modules.isdisjoint({*HEAVY, "onnxruntime", "rich", "numpy"})


def test_loading_and_running_imports_numpy_and_onnxruntime_only(tiny_bundle: Bundle):
    modules = loaded(RUN, tiny_bundle.path)
    assert {"numpy", "onnxruntime"} <= modules
    assert modules.isdisjoint({*HEAVY, "rich", "tokenizers", "scipy", "tensorrt_rtx"})


def test_help_starts_without_numpy_or_any_framework():
    modules = loaded(HELP)
    assert "typer" in modules
    assert modules.isdisjoint({"numpy", "torch", "onnx", "transformers", "onnxruntime", "tokenizers"})


def test_further_export_with_a_known_head_imports_no_torch(tiny_copy: Path, tiny_base: Path, write_adapter):
    modules = loaded(EXPORT, tiny_base, write_adapter(seed=1), tiny_copy)
    assert "second" in open_bundle(tiny_copy).manifest.tasks
    assert modules.isdisjoint({"torch", "transformers", "onnxscript", "onnx_ir"})

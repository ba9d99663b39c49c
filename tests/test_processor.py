"""scripts/processor, whose lines stand at the top of a test run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

PROCESSOR = Path(__file__).parents[1] / "scripts" / "processor"
FLAGS = "flags\t\t: fpu sse2 fma avx2 avx512f avx512_vnni avx_vnni amx_tile\n"
SERVER = f"model name\t: Xeon 8480\n{FLAGS}model name\t: Xeon 8480\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd sve\nCPU part\t: 0xd40\n"


def said(file: Path, **environment: str) -> list[str]:
    plain = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    done = subprocess.run([PROCESSOR, file], env=plain | environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [line.strip() for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("cpuinfo", "model", "features"),
    [
        (SERVER, "Xeon 8480", "amx_tile avx2 avx512_vnni avx512f avx_vnni fma"),
        ("model name\t: Old One\nflags\t\t: fpu sse2\n", "Old One", "none of avx2, fma, avx512, vnni, amx"),
        (ARM, "0xd40", "asimd sve"),
        ("", "unknown", "unknown"),
    ],
    ids=["server", "no vectors", "ARM", "empty"],
)
def test_it_says_the_model_and_the_features_that_decide_rounding(
    tmp_path: Path, cpuinfo: str, model: str, features: str
):
    file = tmp_path / "cpuinfo"
    file.write_text(cpuinfo)
    lines = said(file)
    assert lines[0].startswith(f"processor: {model} (")
    assert lines[1] == f"features: {features}"


def test_it_says_unknown_where_the_system_has_no_such_file(tmp_path: Path):
    assert said(tmp_path / "absent")[1] == "features: unknown"


def test_it_says_what_libraries_are_told_to_imitate(tmp_path: Path):
    assert (
        said(tmp_path / "absent", OPENBLAS_CORETYPE="Haswell")[-1]
        == "told to imitate another: OPENBLAS_CORETYPE=Haswell"
    )

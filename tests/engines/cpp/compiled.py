"""The C++ runtime, compiled for the tests."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import onnxruntime

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent


def run(*command: str | Path, status: int = 0, text: str | None = None) -> str:
    """What a program says: on stdout when it is done, else on stderr."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, input=text, timeout=600)
    assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
    return done.stderr if status else done.stdout


@dataclass(frozen=True)
class Built:
    """The runtime, compiled: the shared library as a user builds it, and programs under AddressSanitizer and UBSan."""

    shared: Path
    sanitized: Path

    def ask(self, *arguments: str | Path, status: int = 0) -> str:
        """The example program, under the sanitizers."""
        return run(self.sanitized / "lorafuse-ask", *arguments, status=status)

    def probe(self, *arguments: str | Path) -> str:
        return run(self.sanitized / "probe", *arguments)


def configured(folder: Path, *options: str) -> Path:
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    headers = distribution("nlohmann-json").locate_file("nlohmann_json/include")  # importing the package needs more than its headers do
    given = ("-DCMAKE_CXX_FLAGS=-Werror", f"-DONNXRUNTIME_LIBRARY={library}", f"-DNLOHMANN_JSON_INCLUDE_DIR={headers}", *options)
    run("cmake", "-S", ROOT / "engines" / "cpp", "-B", folder, "-G", "Ninja", *given)
    run("ninja", "-C", folder)
    return folder

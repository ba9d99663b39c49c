"""The C++ runtime, compiled for the tests."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import onnxruntime

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "engines" / "cpp"
BY_C = Path(__file__).with_name("by_c.py")  # a program


def run(*command: str | Path, status: int = 0, text: str | None = None) -> str:
    """What a program says: on stdout when it is done, else on stderr."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, input=text, timeout=600
    )
    assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
    return done.stderr if status else done.stdout


@dataclass(frozen=True)
class Built:
    """The runtime, compiled: the shared library as a user builds it, programs under AddressSanitizer and UBSan, and one
    with TensorRT.
    """

    shared: Path
    sanitized: Path
    tensorrt: Path

    def ask(self, *arguments: str | Path, status: int = 0) -> str:
        """The example program, under the sanitizers."""
        return run(self.sanitized / "lorafuse-ask", *arguments, status=status)

    def probe(self, *arguments: str | Path) -> str:
        return run(self.sanitized / "probe", *arguments)


def tensorrt_root(folder: Path) -> tuple[str, str]:
    """Options for a build with TensorRT: the RTX wheel's library with the declarations of this folder, and CUDA's own
    wheels.
    """
    tensorrt = distribution("tensorrt-rtx-cu12-libs").locate_file("tensorrt_rtx_libs/libtensorrt_rtx.so.1")
    cuda = distribution("nvidia-cuda-runtime").locate_file("nvidia/cu13")
    cudart = cuda / "lib" / "libcudart.so.13"
    for link, target in {
        "tensorrt/include": HERE / "declared",
        "tensorrt/lib/libtensorrt_rtx.so": tensorrt,
        "tensorrt/lib/libtensorrt_rtx.so.1": tensorrt,
        "cuda/include": cuda / "include",
        "cuda/lib64/libcudart.so": cudart,
        "cuda/lib64/libcudart.so.13": cudart,
    }.items():
        (folder / link).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / link).is_symlink():
            (folder / link).symlink_to(str(target))
    return f"-DTENSORRT_ROOT={folder / 'tensorrt'}", f"-DCUDA_ROOT={folder / 'cuda'}"


def configured(folder: Path, *options: str) -> Path:
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    headers = distribution("nlohmann-json").locate_file(
        "nlohmann_json/include"
    )  # importing the package needs more than its headers do
    given = (
        "-DCMAKE_CXX_FLAGS=-Werror",
        f"-DONNXRUNTIME_LIBRARY={library}",
        f"-DNLOHMANN_JSON_INCLUDE_DIR={headers}",
        *options,
    )
    run("cmake", "-S", ROOT / "engines" / "cpp", "-B", folder, "-G", "Ninja", *given)
    run("ninja", "-C", folder)
    return folder

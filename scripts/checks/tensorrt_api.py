"""Hold every call of engines/backends/tensorrt against the real bindings of several versions; no GPU is needed.

    python -m scripts.checks.tensorrt_api [--wheels FOLDER] [VERSION ...]

The vendor's bindings install from the package index, the library they bind to does not. So each version's wheel is
downloaded and unpacked, its extension module is loaded beside empty libraries of the names that it wants, mypy's
stubgen writes the signatures that pybind11 recorded, and mypy checks a copy of our modules in which the API's module,
which is a value there, is the stub itself. Seen: names that a version lacks, missing or unknown arguments, arguments
and results of a wrong type, whichever line they are on. Not seen: what a call does, whether it may be None against its
signature, and what is reached by a name in quotes (builder flags, data types), which is looked up in the stub here by
its own test.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "engines" / "backends" / "tensorrt"
VERSIONS = ("10.0.1", "10.13.3.9", "10.16.1.11", "11.0.0.114", "11.4.0.106")
RTX = "rtx"  # the installed one
TOOLS = Path(sys.executable).parent
MYPY = ("--no-error-summary", "--hide-error-context", "--ignore-missing-imports", "--follow-imports=silent")
# Names that a version may lack and that our code asks for before it uses them, in ways that mypy doesn't follow.
ASKED_FOR = ("ComputeCapability", "num_compute_capabilities", "set_compute_capability", "mark_weights_refittable")
# What pybind11 does and its signatures don't say: Dims are made of tuples and iterate, plans are buffers, callbacks get
# ints.
SAID_OTHERWISE = (
    (r"^bool: .*", ""),  # a data type of this name hides Python's, which signatures mean
    (r"typing\.SupportsInt", "int"),
    (r"(?<!->) Dims\b(?=[,) ])", " Dims | tuple[int, ...]"),
    (r"^class Dims:\n", "class Dims:\n    def __iter__(self) -> typing.Iterator[int]: ...\n"),
    (r"^class IHostMemory:\n", "class IHostMemory:\n    def __buffer__(self, flags: int, /) -> memoryview: ...\n"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "versions",
        nargs="*",
        default=[*VERSIONS, RTX],
        help=f"Default: {', '.join(VERSIONS)}, and the installed TensorRT-RTX ({RTX}).",
    )
    parser.add_argument(
        "--wheels", type=Path, default=ROOT / ".cache" / "tensorrt-bindings", help="Where downloaded wheels are kept."
    )
    arguments = parser.parse_args()
    worst = 0
    for version in arguments.versions:
        with tempfile.TemporaryDirectory() as folder:
            problems = problems_with(version, arguments.wheels, Path(folder))
        print(
            f"{version}: {'every call fits' if not problems else f'{len(problems)} calls do not fit'}",
            *problems,
            sep="\n  ",
        )
        worst = max(worst, bool(problems))
    return worst


def problems_with(version: str, wheels: Path, folder: Path) -> list[str]:
    """mypy's errors on our calls, one a line, against the bindings of one version."""
    stubs = folder / "stubs"
    (rtx_stub if version == RTX else wheel_stub)(version, wheels, folder).rename(stubs_file(stubs))
    copy = folder / "checked"
    copy.mkdir()
    files = [copied(path, copy) for path in sorted(PACKAGE.glob("*.py"))]
    mypy: list[str | Path] = [TOOLS / "mypy", "--config-file", os.devnull, "--cache-dir", folder / "cache", *MYPY]
    done = run([*mypy, *files], MYPYPATH=f"{stubs}:{ROOT}")
    lines = [
        line.removeprefix(f"{copy}/")
        for line in done.stdout.splitlines()
        if line.startswith(str(copy)) and ": error:" in line
    ]
    return [line for line in lines if not ours_to_ask_for(line)]


def stubs_file(stubs: Path) -> Path:
    stubs.mkdir()
    return stubs / "tensorrt.pyi"


def ours_to_ask_for(line: str) -> bool:
    """Whether the line is about a name that our code asks for first."""
    return any(f'has no attribute "{name}"' in line for name in ASKED_FOR)


def copied(path: Path, folder: Path) -> Path:
    """Our module with the API's module in the place of the value that stands for it."""
    text = path.read_text()
    text = re.sub(r"\btrt: Any\b", "_trt: Any", text)  # parameters, which would hide the module
    text = (
        text.replace("self._trt, ", "self._api, ")
        .replace("self._trt = trt", "self._api = _trt")
        .replace("self._trt", "trt")
    )
    text = re.sub(r"if TYPE_CHECKING:\n    import tensorrt\n", "", text)
    text = text.replace(
        "from __future__ import annotations\n",
        "from __future__ import annotations\nimport tensorrt\nimport tensorrt as trt\n",
        1,
    )
    target = folder / f"checked_{path.stem.strip('_')}.py"
    target.write_text(text)
    return target


def rtx_stub(version: str, wheels: Path, folder: Path) -> Path:
    generated = stubgen("tensorrt_rtx_bindings.tensorrt_rtx", folder)
    return cleaned(generated, "tensorrt_rtx_bindings.tensorrt_rtx")


def wheel_stub(version: str, wheels: Path, folder: Path) -> Path:
    unpacked = folder / "bindings"
    with zipfile.ZipFile(wheel(version, wheels)) as archive:
        archive.extractall(unpacked)
    libraries = empty_libraries(next(unpacked.glob("tensorrt_bindings/tensorrt*.so")), folder)
    generated = stubgen("tensorrt_bindings.tensorrt", folder, PYTHONPATH=str(unpacked), LD_LIBRARY_PATH=str(libraries))
    return cleaned(generated, "tensorrt_bindings.tensorrt")


def wheel(version: str, wheels: Path) -> Path:
    pattern = f"tensorrt_cu12_bindings-{version}-cp{sys.version_info.major}{sys.version_info.minor}-*.whl"
    if not (found := list(wheels.glob(pattern))):
        wheels.mkdir(parents=True, exist_ok=True)
        run(
            [
                TOOLS / "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                str(wheels),
                f"tensorrt_cu12_bindings=={version}",
            ],
            check=True,
        )
        found = list(wheels.glob(pattern))
    return found[0]


def empty_libraries(extension: Path, folder: Path) -> Path:
    """The libraries that the extension links to, with the functions that it looks for; none does anything."""
    libraries = folder / "libraries"
    libraries.mkdir()
    symbols = run(["nm", "--dynamic", "--undefined-only", extension], check=True).stdout.split()
    wanted = sorted(
        {symbol.partition("@")[0] for symbol in symbols if re.match(r"create|get[A-Z]|init[A-Z]|\w*INTERNAL", symbol)}
    )
    source = folder / "empty.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in wanted))
    needed = re.findall(r"NEEDED\s+(libnv\S+)", run(["objdump", "-p", extension], check=True).stdout)
    for name in needed:
        run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", libraries / name, source], check=True)
    return libraries


def stubgen(module: str, folder: Path, **environment: str) -> Path:
    run(
        [TOOLS / "stubgen", "--module", module, "--inspect-mode", "--quiet", "--output", str(folder / "generated")],
        check=True,
        **environment,
    )
    return folder / "generated" / Path(*module.split(".")).with_suffix(".pyi")


def cleaned(stub: Path, module: str) -> Path:
    """The stub under the public module's name, with a version added.

    A signature that Python can't parse loses its defaults.
    """
    text = stub.read_text().replace(f"{module}.", "")
    for said, meant in SAID_OTHERWISE:
        text = re.sub(said, meant, text, flags=re.MULTILINE)
    lines = text.splitlines()
    fixed = [
        line if not line.lstrip().startswith("def ") or parses(line) else line.replace(" = ...", "") for line in lines
    ]
    stub.write_text("\n".join([*fixed, "__version__: str", ""]))
    return stub


def parses(definition: str) -> bool:
    try:
        ast.parse(definition.strip().removesuffix("...").rstrip() + " ...")
    except SyntaxError:
        return False
    return True


def run(command: Sequence[str | Path], check: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if check and done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done


if __name__ == "__main__":
    raise SystemExit(main())

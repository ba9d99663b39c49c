"""The C++ runtime, asked line by line: one process, the tests' probe, serves bundle after bundle."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lora.files.tensorfile import Array


class RefusedError(Exception):
    """What the C++ runtime says where it refuses."""


class ServedByCpp:
    """The process; its requests are tests/engines/cpp/served.hpp's."""

    def __init__(self, probe: Path) -> None:
        self._process = subprocess.Popen([probe, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *words: object) -> str:
        """What is answered. Raises RefusedError where the request is refused."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        status, _, said = self._process.stdout.readline().removesuffix("\n").partition(" ")
        assert status.strip(), "the process has ended"
        if status == "refused":
            raise RefusedError(said)
        return said

    def open(
        self, bundle: Path, mode: str, threads: int = 1, memory: int | None = None, digest: str | None = None
    ) -> None:
        self.ask("open", bundle, mode, threads, memory or 0, digest or "-")

    def run(self, task: str, inputs: Mapping[str, Array], adapted: bool = True) -> dict[str, Array]:
        return arrays(self.ask("run", task, "adapted" if adapted else "unadapted", *words(inputs)))

    def held(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs of the task in use."""
        return arrays(self.ask("held", *words(inputs)))

    def end(self) -> None:
        """Ends the process, whose sanitizers then look for leaks."""
        self._process.communicate(timeout=60)
        assert self._process.returncode == 0


def words(inputs: Mapping[str, Array]) -> list[str]:
    return [
        f"{name}:{values.dtype.name}:{'x'.join(map(str, values.shape))}:{values.tobytes().hex()}"
        for name, values in inputs.items()
    ]


def arrays(said: str) -> dict[str, Array]:
    found = {}
    for word in said.split():
        name, dtype, shape, content = word.split(":")
        sizes = [int(size) for size in shape.split("x")]
        found[name] = np.frombuffer(bytes.fromhex(content), dtype).reshape(sizes)
    return found

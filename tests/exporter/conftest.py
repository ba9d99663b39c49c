"""What several test modules of the exporter share: ways to look at a bundle, and inputs for its graphs."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from exporter.bundle.manifest import open_bundle
from exporter.bundle.records import all_files
from lora.errors import LorafuseError
from lora.files.tensorfile import Array

Snapshot = Callable[[Path], dict[str, str]]
Refuses = Callable[..., AbstractContextManager[None]]

# (batch, length): the smallest, an uneven batch, a long single sequence, and one beyond what was traced.
SHAPES = [(1, 1), (3, 7), (1, 48), (5, 20)]


@pytest.fixture(scope="session")
def snapshot() -> Snapshot:
    """Every file below a folder, with the hash of its bytes."""
    return lambda folder: {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def check_files() -> Callable[[Path], None]:
    """Opens a bundle and checks the hash of every file that its manifest names."""

    def check(path: Path) -> None:
        bundle = open_bundle(path)
        for file in all_files(bundle.manifest):
            bundle.checked(file)

    return check


@pytest.fixture
def refuses(tiny_copy: Path, snapshot: Snapshot) -> Refuses:
    """The block must raise ``error`` in one line that holds all ``words``, leave ``tiny_copy`` as it was, and no
    staging folder.
    """

    @contextmanager
    def check(error: type[LorafuseError], *words: str) -> Iterator[None]:
        before = snapshot(tiny_copy)
        with pytest.raises(error) as caught:
            yield
        message = str(caught.value)
        assert "\n" not in message
        assert [word for word in words if word not in message] == [], message
        assert snapshot(tiny_copy) == before
        assert list(tiny_copy.parent.glob(".*staging*")) == []

    return check


# A child is forked for every file-system step of a change and killed just before that step; the last one lives.
# ``stride`` 3 tries every third step; with ``sees_writes``, a step is also every write and flush (slow).
KILL_AT_EVERY_STEP = """
import os, signal, sys
from pathlib import Path

def die_at(last):
    seen = 0
    def step():
        nonlocal seen
        seen += 1
        if seen == last:
            os.kill(os.getpid(), signal.SIGKILL)
    def audit(event, arguments):
        if event == "open" or event.startswith(("os.", "shutil.", "tempfile.", "fcntl.", "mmap.")):
            step()
    def profile(frame, event, function):  # what raises no audit event; before a write the file is there, and empty
        if event == "c_call" and function.__name__ in ("write", "fsync"):
            step()
    sys.addaudithook(audit)
    if sees_writes:
        sys.setprofile(profile)

for step in range(1, 10_000, stride):
    bundle = Path(sys.argv[1], f"{step:04}", "bundle")
    prepare(bundle)
    child = os.fork()
    if child == 0:
        die_at(step)
        change(bundle)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


@pytest.fixture
def killed_at_every_step(tmp_path: Path) -> Callable[..., list[Path]]:
    """The bundles that ``change`` leaves when it is killed at its first, second … step; ``program`` defines it."""

    def run(program: str, *arguments: object) -> list[Path]:
        out = tmp_path / "killed"
        subprocess.run(
            [sys.executable, "-c", program + KILL_AT_EVERY_STEP, out, *map(os.fspath, arguments)],
            check=True,
            timeout=300,
        )
        return [folder / "bundle" for folder in sorted(out.iterdir())]

    return run


@pytest.fixture(scope="session")
def token_ids() -> Callable[..., dict[str, Array]]:
    """Random inputs of a BERT of that (batch, length); the last quarter of the last row is padding."""

    def make(shape: tuple[int, int] = (3, 7), seed: int = 0) -> dict[str, Array]:
        random = np.random.default_rng(seed)
        mask = np.ones(shape, np.int64)
        mask[-1, shape[1] - shape[1] // 4 :] = 0
        return {
            "input_ids": random.integers(0, 30522, shape),
            "attention_mask": mask,
            "token_type_ids": random.integers(0, 2, shape),
        }

    return make


@pytest.fixture(scope="session")
def run_graph() -> Callable[..., Array]:
    """Run an edited graph whose external data lie in ``folder``, on ONNX Runtime; the first output."""

    def run(graph, folder: Path, inputs: dict[str, Array]) -> Array:
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        return onnxruntime.InferenceSession(graph.SerializeToString(), options).run(None, inputs)[0]

    return run


@pytest.fixture(params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    """Runs a test at every one of ``SHAPES``."""
    return request.param

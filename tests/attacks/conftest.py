"""What the attacks share: a bundle that is made in a moment, and the runtimes that are asked for its tasks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from compiled import Built

import engines
from lora.files.tensorfile import Array
from scripts.support.asked import Answer, asked_in_cpp, asked_in_python
from scripts.support.hand_made_bundle import TASKS, hand_made_bundle, inputs
from scripts.support.served_by_cpp import ServedByCpp

Outcome = Array | str  # the logits, or what the runtime says of the task
Ask = Callable[[Path, Sequence[str], str], dict[str, Outcome]]
MODES = ("dedicated", "resident")
RUNTIMES = ("python", "c++")
FACTORS = "is stored as factors, which the Python runtime merges and this one does not"


def logits(found: dict[str, Answer]) -> dict[str, Outcome]:
    """The answers as the tests hold them; a refusal is one printable line."""
    return {task: printable(answer) if isinstance(answer, str) else answer["logits"] for task, answer in found.items()}


def printable(message: str) -> str:
    assert message.isprintable(), ascii(message)
    return message


@dataclass(frozen=True)
class Attacked:
    """A runtime in a mode, asked for tasks of a bundle. One that does not merge refuses what is stored as factors."""

    ask: Ask
    mode: str
    merges: bool
    good: dict[str, Array]

    def __call__(self, bundle: Path, *tasks: str) -> dict[str, Outcome]:
        return self.ask(bundle, tasks or tuple(TASKS), self.mode)

    def has(self, task: str) -> bool:
        """Whether the runtime serves tasks that are stored as this one is."""
        return self.merges or task not in TASKS or TASKS[task][1] == "dense"

    def refuses(self, bundle: Path, task: str, *words: str) -> None:
        """The task is refused with these words, and every other answers as it should."""
        found = self(bundle)
        said = found.pop(task)
        assert isinstance(said, str), f"{task} answered {said}"
        expected = words if self.has(task) else (FACTORS,)
        assert [word for word in expected if word not in said] == [], said
        self.right(found)

    def right(self, found: dict[str, Outcome]) -> None:
        """Each of the answers is the task's own."""
        for task, values in found.items():
            if not self.has(task):
                assert isinstance(values, str)
                assert FACTORS in values
                continue
            assert not isinstance(values, str), values
            np.testing.assert_allclose(values, self.good[task], rtol=0, atol=1e-4, err_msg=task)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that is attacked in copies."""
    return hand_made_bundle(tmp_path_factory.mktemp("attacked") / "bundle").path


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "bundle"))


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def good(made: Path) -> dict[str, Array]:
    """What each task answers when it is loaded alone, from the bundle as it was made."""
    found = {}
    for task in TASKS:
        with engines.load(made, task, threads=1) as session:
            found[task] = session.run(inputs())["logits"]
    assert np.abs(found["left"] - found["right"]).max() > 1
    return found


@pytest.fixture(scope="session")
def cpp(built: Built) -> Iterator[ServedByCpp]:
    """The C++ runtime, under the sanitizers."""
    served = ServedByCpp(built.sanitized / "probe")
    yield served
    served.end()


@pytest.fixture(params=[(name, mode) for name in RUNTIMES for mode in MODES], ids="-".join)
def served(request: pytest.FixtureRequest, good: dict[str, Array]) -> Attacked:
    name, mode = request.param
    if name == "python":
        return Attacked(lambda *asked: logits(asked_in_python(*asked)), mode, True, good)
    cpp = request.getfixturevalue("cpp")
    return Attacked(lambda *asked: logits(asked_in_cpp(cpp, *asked)), mode, False, good)

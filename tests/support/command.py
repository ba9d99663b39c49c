"""The ``lorafuse`` command as a user meets it: a process, its output and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

COMMAND = Path(sys.executable).with_name("lorafuse")
DONE, NO, UNDECIDED, BAD_INPUT = 0, 1, 2, 3

Finished = subprocess.CompletedProcess


def lorafuse(*arguments: str | bytes | Path) -> Finished[str]:
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, encoding="utf-8", check=False)


def answer(*arguments: str | Path, status: int = DONE) -> object:
    """The JSON that a command prints; whatever the status, nothing else is said."""
    done = lorafuse(*arguments, "--json")
    assert (done.returncode, done.stderr) == (status, "")
    return json.loads(done.stdout)


def refusal(*arguments: str | bytes | Path) -> str:
    """What a command says of bad input: status 3, one line on stderr and nothing on stdout."""
    done = lorafuse(*arguments)
    assert (done.returncode, done.stdout) == (BAD_INPUT, ""), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("lorafuse: ")
    return done.stderr.removeprefix("lorafuse: ").rstrip("\n")

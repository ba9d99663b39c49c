"""A bundle that is opened beside a writer: every answer is the old task's or the new one's, and no other.

scripts/checks/swap_race.py does it ten thousand times.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from scripts.support.served_by_cpp import ServedByCpp
from scripts.support.swap_race import RACES, REFUSED, WRONG, opens_in_cpp, opens_in_python, writer

MODES = ("dedicated", "resident")
OPENS = 100


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("swapped", RACES)
@pytest.mark.parametrize("language", ["python", "c++"])
def test_no_answer_comes_from_what_was_swapped_in(
    request: pytest.FixtureRequest, made: Path, tmp_path: Path, language: str, swapped: str, mode: str
):
    race = RACES[swapped](made, tmp_path)
    with writer(race):
        if language == "python":
            found = opens_in_python(race, mode, OPENS)
        else:
            cpp: ServedByCpp = request.getfixturevalue("cpp")
            found = opens_in_cpp(race, mode, OPENS, cpp)
    assert found[WRONG] == 0, found
    if swapped == "manifests":
        assert found[REFUSED] == 0, found
    assert sum(found.values()) == OPENS
    assert len([times for times in found.values() if times]) > 1, found  # it did race


def test_the_writer_ends_with_its_block_however_that_ends(made: Path, tmp_path: Path):
    race = RACES["weights"](made, tmp_path)
    with pytest.raises(ZeroDivisionError), writer(race):
        _ = 1 / 0
    found = race.target.stat().st_ino
    time.sleep(0.1)  # fifty renames
    assert race.target.stat().st_ino == found

"""Ten thousand opens beside a writer that renames every two milliseconds, in both languages.

    python -m scripts.checks.swap_race [--opens 10000] [--probe build/probe]

The bundle's task is asked for in both modes, while its weights file is swapped for another of the same size, and while
its manifest is swapped for that of another version. Every answer must be one that the manifest vouches for. The C++
runtime is asked where ``--probe`` names the tests' program (cmake -DLORAFUSE_TESTS=tests/engines/cpp). Exit status 1
otherwise.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import get_args

from engines.serving.runtime import Mode
from scripts.support.hand_made_bundle import hand_made_bundle
from scripts.support.served_by_cpp import ServedByCpp
from scripts.support.swap_race import RACES, REFUSED, WRONG, opens_in_cpp, opens_in_python, writer

MODES: tuple[Mode, ...] = get_args(Mode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--opens", type=int, default=10_000, help="in each language")
    parser.add_argument("--probe", type=Path)
    arguments = parser.parse_args()
    each, good = arguments.opens // (len(MODES) * len(RACES)), True
    for swapped, make in RACES.items():
        for mode in MODES:
            with tempfile.TemporaryDirectory() as folder:
                race = make(hand_made_bundle(Path(folder) / "made").path, Path(folder))
                with writer(race):
                    found = {"python": opens_in_python(race, mode, each)}
                    if arguments.probe:
                        served = ServedByCpp(arguments.probe)
                        found["c++"] = opens_in_cpp(race, mode, each, served)
                        served.end()
            for language, verdicts in found.items():
                good &= verdicts[WRONG] == 0 and not (swapped == "manifests" and verdicts[REFUSED])
                print(f"{language}, {swapped} swapped, {mode}: {verdicts}", flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

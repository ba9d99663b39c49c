"""Ten thousand bundles that an attacker changed and signed again, asked for in both languages.

    python -m scripts.checks.fuzz --probe build/probe [--mutations 10000] [--first 0]

The manifest, graphs, weights files and adapters of a bundle of four tasks are changed, one at a time, and sizes and
hashes made right again. Both runtimes must take the same decision of every task and give the same answer, though only
one of them is asked where files lie that no manifest names. ``--probe`` is the tests' program (cmake
-DLORAFUSE_TESTS=tests/engines/cpp), best under the sanitizers. Exit status 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from scripts.support.fuzzing import disagreements
from scripts.support.hand_made_bundle import hand_made_bundle
from scripts.support.served_by_cpp import ServedByCpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probe", type=Path, required=True)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the first mutation's seed")
    arguments = parser.parse_args()
    served, wrong = ServedByCpp(arguments.probe), 0
    with tempfile.TemporaryDirectory() as folder:
        made = hand_made_bundle(Path(folder) / "made").path
        for line in disagreements(made, range(arguments.first, arguments.first + arguments.mutations), served):
            wrong += 1
            print(line, flush=True)
    served.end()
    print(f"{arguments.mutations} mutations, {wrong} decided differently")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

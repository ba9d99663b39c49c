"""A writer: renames copies of two files onto a third, in turn, every two milliseconds, until it is killed.

python -m scripts.support.renaming TARGET ONE OTHER
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

PAUSE = 0.002  # seconds between two renames


def main() -> None:
    target, *faces = map(Path, sys.argv[1:])
    turn = 0
    while True:
        swapped = target.with_name(".swapped")
        shutil.copyfile(faces[turn % 2], swapped)
        swapped.replace(target)
        if turn == 0:
            print("renames", flush=True)
        turn += 1
        time.sleep(PAUSE)


if __name__ == "__main__":
    main()

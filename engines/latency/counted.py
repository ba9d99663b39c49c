"""What ``instructions`` runs under callgrind: one run of a model, within a function by which it is told apart.

A child process of its own, which imports no more than running a model takes: everything is fifty times slower there.
"""

from __future__ import annotations

import ctypes
import pickle
import sys
from pathlib import Path

from engines.backends.onnxruntime import OnnxRuntime

WARMUP = 2  # the first run allocates, and the second has the memory as it stays

Compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


def main(job: Path) -> None:
    """Run the model and the inputs that the file holds: to warm up, then once within ``qsort_r``.

    Sorting two elements calls their comparison. That is where the run is made, so that callgrind, which counts within
    ``qsort_r`` alone, counts it and a few thousand instructions of Python's around it.
    """
    model, inputs = pickle.loads(job.read_bytes())  # noqa: S301  # written by our parent a moment ago
    with OnnxRuntime(threads=1).load(model, None) as session:
        for _ in range(WARMUP):
            session.run(inputs)

        runs = iter([inputs])  # one, however often the comparison is called

        def once(*_: int | None) -> int:
            for given in runs:
                session.run(given)
            return 0

        within = ctypes.CDLL(None).qsort_r
        within.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, Compare, ctypes.c_void_p]
        within.restype = None
        within((ctypes.c_int * 2)(), 2, ctypes.sizeof(ctypes.c_int), Compare(once), None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Mutations of a bundle that are signed again: both runtimes take the same decision.

scripts/checks/fuzz.py tries ten thousand.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scripts.support.fuzzing import alike, disagreements
from scripts.support.served_by_cpp import ServedByCpp

MUTATIONS = 60


def test_both_runtimes_decide_alike_whatever_is_changed_and_signed_again(made: Path, cpp: ServedByCpp):
    assert list(disagreements(made, range(MUTATIONS), cpp)) == []


def test_what_is_alike():
    one = np.ones((2, 2))
    assert alike("no", "never")
    assert alike(one, one.copy())
    assert not alike(one, "no")
    assert not alike("no", one)
    assert not alike(one, one * 2)

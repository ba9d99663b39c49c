"""Is one engine as fast as another? An equivalence test on paired, interleaved timings.

"No significant difference" is no evidence of equality, so the question is put the other way round: two one-sided tests
(Schuirmann 1987) against a declared margin. The engines are equivalent when the whole 90 % interval of their ratio lies
within the margin. Sessions differ from one another by where their memory lies, and no number of rounds within one pair
of sessions averages that out; the interval's resampling therefore draws sessions first, then blocks of rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lora.tensorfile import Array

Decision = Literal["equivalent", "slower", "inconclusive"]

CONFIDENCE = 0.90  # of the two-sided interval: each of the two one-sided tests at 5 %
DRAWS = 2000
BLOCK = 5  # neighbouring rounds share the machine's mood; they are resampled together


@dataclass(frozen=True)
class Ratio:
    """An engine's time over the base's: the median of the paired ratios, and its interval."""

    median: float
    low: float
    high: float

    def decide(self, margin: float) -> Decision:
        """``margin`` 0.01 is one per cent, to either side."""
        if 1 / (1 + margin) < self.low and self.high < 1 + margin:
            return "equivalent"
        return "slower" if self.low > 1 + margin else "inconclusive"


def paired_ratio(times: Array, base_times: Array, seed: int) -> Ratio:
    """The ratio of two engines timed in the same rounds; both arrays have shape (sessions, rounds), in any unit."""
    logs = np.log(times / base_times)
    low, high = np.quantile(_bootstrap_medians(logs, np.random.default_rng(seed)), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Ratio(float(np.exp(np.median(logs))), float(np.exp(low)), float(np.exp(high)))


def _bootstrap_medians(logs: Array, random: np.random.Generator) -> Array:
    """Medians of ``DRAWS`` resamples of shape (sessions, rounds): sessions with replacement, then blocks within each."""
    sessions, rounds = logs.shape
    block = min(BLOCK, rounds)
    blocks = -(-rounds // block)
    chosen = random.integers(0, sessions, (DRAWS, sessions, 1))
    starts = random.integers(0, rounds, (DRAWS, sessions, blocks, 1))
    within = ((starts + np.arange(block)) % rounds).reshape(DRAWS, sessions, blocks * block)[:, :, :rounds]
    medians: Array = np.median(logs[chosen, within].reshape(DRAWS, -1), axis=1)
    return medians

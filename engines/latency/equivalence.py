"""Is one engine as fast as another? An equivalence test on paired, interleaved timings.

"No significant difference" is no evidence of equality, so the question is put the other way round: two one-sided tests
(Schuirmann 1987) against a declared margin. The engines are equivalent when the whole interval of their ratio lies
within the margin.

*What is one observation.* Sessions differ from one another by where their memory lies, and no number of rounds within
one pair of sessions averages that out. So a set of fresh sessions gives one number, the median of its paired
log-ratios, and the interval is Wilcoxon's signed-rank one over the sets (Hodges & Lehmann 1963): exact for any
distribution that is symmetric about the true ratio, and a difference of two sessions opened and timed in the same way
is. Resampling six sets, which this replaced, promised 5 % and was wrong in 9 to 17 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from lora.files.tensorfile import Array

Decision = Literal["equivalent", "slower", "faster", "inconclusive"]


@dataclass(frozen=True)
class Ratio:
    """An engine's time over the base's, and the interval that holds it: each bound is wrong with probability ``error``
    at most.
    """

    median: float
    low: float
    high: float
    error: float

    def decide(self, margin: float) -> Decision:
        """``margin`` 0.01 is one per cent, to either side."""
        if 1 / (1 + margin) < self.low and self.high < 1 + margin:
            return "equivalent"
        if self.low > 1 + margin:
            return "slower"
        return "faster" if self.high < 1 / (1 + margin) else "inconclusive"


def paired_ratio(times: Sequence[Array], base_times: Sequence[Array], error: float) -> Ratio:
    """The ratio of two engines timed in the same rounds, in any unit: of each set its rounds, as many as there are, and
    NaN in those that one of them sat out.

    Raises ValueError where the sets are too few for ``error``.
    """
    return signed_rank(paired_medians(times, base_times), error)


def paired_medians(times: Sequence[Array], base_times: Sequence[Array]) -> Array:
    """Of each set, the median log-ratio of the rounds that both engines were timed in; times as ``paired_ratio``'s."""
    return np.array([np.nanmedian(np.log(own / base)) for own, base in zip(times, base_times, strict=True)])


def quantile_ratio(times: Sequence[Array], base_times: Sequence[Array], quantile: float, error: float) -> Ratio:
    """The ratio of a quantile of the times within a set, such as 0.9; times and errors as ``paired_ratio``'s."""
    own, base = (np.log([np.nanquantile(one, quantile) for one in sets]) for sets in (times, base_times))
    return signed_rank(own - base, error)


def signed_rank(logs: Array, error: float) -> Ratio:
    """The ratio that log-ratios of sets tell: the median of all pairwise means, and the two means that are as far from
    the ends as ``error`` allows; ``logs`` has shape (sets,).

    Raises ValueError where the sets are too few for ``error``.
    """
    left_out = int(np.searchsorted(_cumulative(len(logs)), error, side="right"))
    if left_out == 0:
        raise ValueError(f"{len(logs)} sets can't bound a ratio with an error of {error:.3g}")
    first, second = _pairs(len(logs))
    means = np.sort((logs[first] + logs[second]) / 2)
    middle = (means[(len(means) - 1) // 2] + means[len(means) // 2]) / 2
    return Ratio(math.exp(middle), math.exp(means[left_out - 1]), math.exp(means[-left_out]), error)


@cache
def _pairs(sets: int) -> tuple[Array, Array]:
    """Every pair of sets, each with itself too."""
    first, second = np.triu_indices(sets)
    return first, second


@cache
def _cumulative(sets: int) -> Array:
    """P(W ≤ w), w = 0 … n(n + 1)/2, of the signed-rank statistic W: a sum in which each rank of 1 … n is present or
    not, evenly.
    """
    chances = np.ones(1)
    for rank in range(1, sets + 1):
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    cumulative: Array = np.cumsum(chances)
    return cumulative

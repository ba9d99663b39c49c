"""What storing a merge cost: rounding to a narrow dtype can erase an adapter.

The last rounding is what loses it, however wide the sum was computed, so it is measured on the tensor that is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora.merging.merge import Merged

# Above this share of the update lost, the stored tensor is hardly the adapter's any more.
WARN_ABOVE = 0.1


@dataclass(frozen=True)
class Survival:
    """``lost`` is ‖round(W + ΔW) − (W + ΔW)‖ / ‖ΔW‖; ``unchanged`` the share of weights whose bits did not change."""

    parameter: str
    dtype: str
    lost: float
    unchanged: float

    @property
    def warns(self) -> bool:
        """Whether more of the update is lost than ``WARN_ABOVE``."""
        return self.lost > WARN_ABOVE


def survival(merged: Merged) -> Survival | None:
    """The report on one tensor; None for a tensor that the base does not have, which nothing was added to."""
    if merged.base is None:
        return None
    return Survival(merged.parameter, merged.stored.dtype.name, merged.lost, merged.unchanged / merged.stored.size)

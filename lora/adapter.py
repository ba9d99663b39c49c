"""What an adapter is, whatever format it came in: low-rank updates of some weights, and replaced tensors.

Names are those of the base model's modules and parameters, without any prefix of the format.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora.tensorfile import Array


@dataclass(frozen=True)
class LowRank:
    """``W' = W + scaling · B · A`` (Hu et al. 2021, eq. 3), for the weight of one module.

    ``a`` has shape (rank, in), ``b`` (out, rank). The weight has shape (out, in), or (in, out) where ``transposed``
    (transformers' Conv1D; PEFT's ``fan_in_fan_out``).
    """

    module: str
    a: Array
    b: Array
    scaling: float
    transposed: bool = False

    @property
    def parameter(self) -> str:
        """The name of the weight that is updated."""
        return f"{self.module}.weight"

    @property
    def rank(self) -> int:
        """The inner dimension of B · A."""
        return int(self.a.shape[0])

    @property
    def weight_shape(self) -> tuple[int, int]:
        """The shape that the base's weight must have."""
        out_features, in_features = int(self.b.shape[0]), int(self.a.shape[1])
        return (in_features, out_features) if self.transposed else (out_features, in_features)


@dataclass(frozen=True)
class Replacement:
    """``parameter`` takes ``value`` as it is: a trained head, a saved bias."""

    parameter: str
    value: Array


@dataclass(frozen=True)
class Adapter:
    """One trained task.

    ``files`` are the files it was read from and ``sha256`` identifies their bytes. ``base_sha256`` is the fingerprint
    of the base it was trained on, where the file records one.
    """

    path: Path
    files: tuple[Path, ...]
    sha256: str
    task_type: str | None
    updates: tuple[LowRank, ...]
    replacements: tuple[Replacement, ...]
    base_sha256: str | None = None

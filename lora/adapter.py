"""What an adapter is, whatever format it came in: changes to some of a base's tensors.

A change names the module it belongs to; which tensor of a given base that is, ``lora.merging.fit`` decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora.files.tensorfile import Array

# How B · A becomes an update of the weight's shape.
#   linear      (out, in) = B · A, also where a transformers Conv1D or an embedding stores (in, out): (B · A)ᵀ
#   conv        two convolutions composed: A with the kernel's extent, B with extent 1
#   view        loralib, whose file does not name the layer: a kernel takes B · A as its bytes, a matrix is one of the
#               first two
#   experts     one product per expert: A is (experts · rank, in), B is (out, rank · experts), W (experts, out, in)
#   experts_transposed   the same, where W is (experts, in, out)
#   flat        (out, in · kernel) = B · A, which takes the weight's shape
#   sliced      the first columns of A only, as many as the layer has: VeRA's A is for the widest one
Layout = Literal["linear", "transposed", "conv", "view", "experts", "experts_transposed", "flat", "sliced"]
# How a format spells module names: as they are, or with dots written as underscores (kohya).
Spelling = Literal["dotted", "flattened"]
# How several adapters' updates of one weight become one.
Rule = Literal["linear", "ties", "dare_linear", "dare_ties"]


@dataclass(frozen=True)
class LowRank:
    """``W' = W + scaling · B · A`` (Hu et al. 2021, eq. 3); with a ``magnitude``, DoRA's ``W' = m · V / ‖V‖`` of that
    V.

    ``rank`` is each product's inner dimension. ``parameters`` are the names that the weight may have below the module;
    the base has one of them. ``square`` is for the layout "view": how square matrices are stored, None if nobody said.
    """

    module: str
    a: Array
    b: Array
    rank: int
    scaling: float
    layout: Layout = "linear"
    magnitude: Array | None = None
    parameters: tuple[str, ...] = ("weight",)
    square: Literal["linear", "transposed"] | None = None


@dataclass(frozen=True)
class Increment:
    """``parameter' = parameter + scaling · value``: the bias of lora_B."""

    module: str
    value: Array
    scaling: float
    parameters: tuple[str, ...] = ("bias",)


@dataclass(frozen=True)
class Replacement:
    """``parameter`` takes ``value`` as it is: a trained head, a saved bias.

    A head may be new to the base. With ``among``, it is one of these parameters that the base must have.
    """

    parameter: str
    value: Array
    among: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rows:
    """The listed rows of an embedding take ``values`` as they are."""

    module: str
    rows: tuple[int, ...]
    values: Array
    parameters: tuple[str, ...] = ("weight",)


@dataclass(frozen=True)
class Scale:
    """Every output of a linear layer, or every input, times a trained factor (IA3): ``W' = diag(values) · W`` and
    ``bias' = values ∘ bias``, or ``W' = W · diag(values)``. ``axis`` is the weight's, once that is known.
    """

    module: str
    values: Array
    side: Literal["out", "in"]
    parameters: tuple[str, ...] = ("weight",)
    axis: int = 0


@dataclass(frozen=True)
class Blend:
    """Updates of one weight by several adapters, blended before they are added: ``W' = W + rule(weights, s·B·A of
    each)``.

    ``density`` is the share of each update that its pruning keeps; ``seeds`` draw what DARE drops, one per update.
    """

    updates: tuple[LowRank, ...]
    weights: tuple[float, ...]
    rule: Rule
    density: float
    seeds: tuple[int, ...]


Change = LowRank | Increment | Replacement | Rows | Scale | Blend


@dataclass(frozen=True)
class Adapter:
    """One trained task.

    ``files`` are the files it was read from and ``sha256`` identifies their bytes. ``base_sha256`` is the fingerprint
    of the base it was trained on, where the file records one. ``skipped`` are the file's components that were not
    chosen. ``model_class`` is the class of transformers in which it was trained, where the file says it.
    """

    path: Path
    format: str
    files: tuple[Path, ...]
    sha256: str
    changes: tuple[Change, ...]
    task_type: str | None = None
    base_sha256: str | None = None
    spelling: Spelling = "dotted"
    skipped: tuple[str, ...] = ()
    model_class: str | None = None

    @property
    def replaced(self) -> dict[str, Array]:
        """The tensors that the adapter brings whole, by parameter name: a trained head, saved biases."""
        return {change.parameter: change.value for change in self.changes if isinstance(change, Replacement)}

"""Merging: what an adapter does to a base, one tensor at a time."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from lora.adapter import Adapter, Blend, Change, LowRank, Scale
from lora.errors import AdapterError
from lora.files.tensorfile import Array
from lora.merging.delta import Float, changed

Targets = Mapping[str, Sequence[Change]]  # {parameter: its changes}, from lora.merging.fit or lora.merging.several
Dtypes = Mapping[str, np.dtype[Any]]
Item = TypeVar("Item")
Result = TypeVar("Result")
THREADS = min(4, os.cpu_count() or 1)  # each holds one tensor and its working copies


@dataclass(frozen=True)
class Merged:
    """A changed tensor: as it is stored, before that rounding (float32), and as the base has it (None: a new head).

    ``unchanged`` of its elements are bit for bit the base's; ``lost`` is ‖stored − exact‖ / ‖exact − base‖, the share
    of the update that rounding took away.
    """

    parameter: str
    stored: Array
    exact: Array
    base: Array | None
    unchanged: int
    lost: float


def merge(
    base: Mapping[str, Array], targets: Targets, source: object, dtypes: Dtypes | None = None
) -> Iterator[Merged]:
    """The tensors that ``targets`` change, each computed in float32 and rounded once.

    ``base`` maps parameter names to weights; only those to be changed are read. A tensor is stored in the base's dtype
    unless ``dtypes`` names another; ``source`` is what messages call the adapter. One that rounding leaves bit for bit
    as it was is not yielded. Raises AdapterError when a tensor overflows its dtype, or no weight changes at all.
    """
    updated = differing = 0
    for merged, changes in _ahead(targets.items(), lambda target: (_merge_one(base, *target, dtypes or {}), target[1])):
        parameter = merged.parameter
        if not _is_finite(merged):
            raise AdapterError(
                f"{source}: merging into '{parameter}' overflows {merged.stored.dtype}; store it in a wider dtype"
            )
        differs = merged.unchanged < merged.stored.size
        if any(isinstance(change, LowRank | Blend | Scale) for change in changes):
            updated += 1
            differing += differs
        if differs:
            yield merged
    if updated and not differing:
        raise AdapterError(
            f"{source}: merging changes none of the {updated} target weights (lora_B is zero, or the update is lost in"
            " rounding); the result would be the base model"
        )


def _is_finite(merged: Merged) -> bool:
    """The exact values decide for a dtype of float32's range, without a look at the narrow ones."""
    values = merged.stored if merged.stored.dtype == np.float16 else merged.exact
    with np.errstate(over="ignore", invalid="ignore"):
        total = values.sum(
            dtype=np.float32
        )  # one infinity or NaN makes the sum one; it is found without a second array
    return bool(np.isfinite(total) or np.isfinite(values).all())


def apply(changes: Sequence[Change], tensor: Array | None, dtype: Float = np.float32) -> Array:
    """``tensor`` after ``changes``, in ``dtype``; not rounded to its own.

    With float64 this is the oracle of a merge.
    """
    for change in changes:
        tensor = changed(change, tensor, dtype)
    assert tensor is not None
    return tensor


def check_base(adapter: Adapter, base_sha256: str) -> None:
    """Refuse an adapter that records the fingerprint of another base."""
    if adapter.base_sha256 is not None and adapter.base_sha256 != base_sha256:
        raise AdapterError(
            f"{adapter.path}: trained on the base with SHA-256 {adapter.base_sha256[:12]}…, but this base has"
            f" {base_sha256[:12]}…; give the base it was trained on"
        )


def _merge_one(base: Mapping[str, Array], parameter: str, changes: Sequence[Change], dtypes: Dtypes) -> Merged:
    before = base.get(parameter)
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow is found, and named, in the result
        exact = apply(changes, before)
        stored_as = dtypes.get(parameter) or (before.dtype if before is not None else exact.dtype)
        stored = exact.astype(stored_as, copy=False)
    if before is not None and before.shape != exact.shape:
        before = None  # another size: as good as new
    return Merged(parameter, stored, exact, before, _equal_bits(stored, before), _lost(stored, exact, before))


@functools.cache
def _threadpools() -> ThreadpoolController:
    """The native thread pools of this process; finding them takes milliseconds."""
    return ThreadpoolController()


def _ahead(items: Iterable[Item], make: Callable[[Item], Result]) -> Iterator[Result]:
    """``make`` of each item, in order, computed in threads a few items ahead: numpy's loops leave the interpreter free.

    BLAS gets one thread meanwhile: its own would contend with these.
    """
    with _threadpools().limit(limits=1, user_api="blas"), ThreadPoolExecutor(THREADS) as pool:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _equal_bits(stored: Array, base: Array | None) -> int:
    if base is None or base.dtype != stored.dtype:
        return 0
    bits = np.dtype(f"u{stored.dtype.itemsize}")
    return int(np.count_nonzero(stored.view(bits) == base.view(bits)))


def _lost(stored: Array, exact: Array, base: Array | None) -> float:
    if base is None or stored.dtype == exact.dtype:
        return 0.0
    error, update = stored.astype(np.float32), base.astype(np.float32)  # copies, worked on in place
    error -= exact
    update -= exact
    size = _norm(update)
    return _norm(error) / size if size else 0.0


def _norm(values: Array) -> float:
    flat = values.reshape(-1)
    return float(np.sqrt(np.dot(flat, flat)))

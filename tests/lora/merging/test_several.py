"""Several adapters on one base, against PEFT's own blending of whole updates."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from lora.adapter import Adapter, Blend, Increment, LowRank, Replacement
from lora.errors import AdapterError
from lora.merging.delta import delta
from lora.merging.merge import merge
from lora.merging.rules import blended
from lora.merging.several import Blending, Weighted, combined

BASE = {"m.weight": np.random.default_rng(9).normal(size=(6, 8)).astype(np.float32), "m.bias": np.zeros(6, np.float32)}
# n roundings cost at most n epsilons of what is added up (Higham 2002, section 3.1), whichever library adds; two
# libraries, twice that.
EPSILON = float(np.finfo(np.float32).eps)


def adapter(seed: int, *more: object, magnitude: np.ndarray | None = None) -> Adapter:
    rng = np.random.default_rng(seed)
    update = LowRank(
        "m",
        rng.normal(size=(3, 8)).astype(np.float32),
        rng.normal(size=(6, 3)).astype(np.float32),
        3,
        2.0,
        magnitude=magnitude,
    )
    return Adapter(Path(f"adapter-{seed}"), "PEFT", (), f"{seed:064d}", (update, *more))


def merged(*weighted: Weighted, blending: Blending = Blending()) -> np.ndarray:
    return next(iter(merge(BASE, combined(BASE, weighted, blending), "test"))).stored


def test_linear_adds_each_weighted_update():
    result = merged(Weighted(adapter(1), 0.7), Weighted(adapter(2), 0.3))
    want = BASE["m.weight"] + sum(
        weight * delta(adapter(seed).changes[0], (6, 8), np.float64) for seed, weight in ((1, 0.7), (2, 0.3))
    )
    np.testing.assert_allclose(
        result, want, rtol=0, atol=(3 + 5) * EPSILON * np.abs(want).max()
    )  # a rank of 3, two weights, two sums, W


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(0.05, 1.0))
def test_ties_on_whole_updates_is_peft_s(seed: int, count: int, density: float):
    rng = np.random.default_rng(seed)
    updates = [rng.normal(size=(5, 7)).astype(np.float32) for _ in range(count)]
    weights = [float(weight) for weight in rng.uniform(0.1, 1.5, count).astype(np.float32)]
    theirs = merge_utils.ties([torch.from_numpy(update) for update in updates], torch.tensor(weights), density)
    ours = blended(Blend((), tuple(weights), "ties", density, ()), updates)
    np.testing.assert_allclose(
        ours, theirs.numpy(), rtol=0, atol=2 * (count + 2) * EPSILON * count * max(weights) * np.abs(updates).max()
    )


@pytest.mark.parametrize(
    ("rule", "theirs"), [("dare_linear", merge_utils.dare_linear), ("dare_ties", merge_utils.dare_ties)]
)
def test_dare_is_peft_s_on_the_elements_that_are_kept(rule: str, theirs: object, monkeypatch: pytest.MonkeyPatch):
    updates = [np.random.default_rng(seed).normal(size=(5, 7)).astype(np.float32) for seed in (1, 2)]
    kept = iter([np.random.default_rng(seed).random((5, 7)) < 0.6 for seed in (11, 12)])
    monkeypatch.setattr(
        torch, "bernoulli", lambda values: torch.from_numpy(next(kept).astype(np.float32))
    )  # PEFT's choice becomes ours
    want = theirs([torch.from_numpy(update) for update in updates], torch.tensor([0.5, 1.2]), 0.6)
    ours, added = blended(Blend((), (0.5, 1.2), rule, 0.6, (11, 12)), updates), 2 * 1.2 / 0.6 * np.abs(updates).max()
    np.testing.assert_allclose(ours, want.numpy(), rtol=0, atol=2 * 4 * EPSILON * added)


@pytest.mark.parametrize("rule", ["linear", "ties", "dare_linear", "dare_ties"])
def test_the_order_of_the_adapters_does_not_change_a_bit(rule: str):
    weighted = [Weighted(adapter(seed), 0.3 * seed) for seed in (1, 2, 3)]
    results = {merged(*order, blending=Blending(rule)).tobytes() for order in itertools.permutations(weighted)}
    assert len(results) == 1


def test_dare_keeps_about_its_density_and_the_seed_decides_which():
    ones = [np.ones((200, 200), np.float32)]
    first, again, other = (blended(Blend((), (1.0,), "dare_linear", 0.25, (seed,)), ones) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert abs(np.count_nonzero(first) / first.size - 0.25) < 0.02
    assert set(np.unique(first)) == {0.0, 4.0}


def test_increments_are_weighted_too():
    change = Increment("m", np.ones(6, np.float32), 2.0)
    targets = combined(BASE, [Weighted(adapter(1, change), 0.5), Weighted(adapter(2, change), 0.25)], Blending())
    bias = next(result for result in merge(BASE, targets, "test") if result.parameter == "m.bias")
    np.testing.assert_allclose(bias.stored, 1.5)


def test_one_adapter_of_weight_one_is_as_it_was():
    np.testing.assert_array_equal(merged(Weighted(adapter(1)), blending=Blending("ties")), merged(Weighted(adapter(1))))


@pytest.mark.parametrize(
    "weighted",
    [
        [Weighted(adapter(1, magnitude=np.ones(6, np.float32)), 0.5)],
        [Weighted(adapter(1, magnitude=np.ones(6, np.float32))), Weighted(adapter(2))],
    ],
)
def test_dora_with_a_weight_or_with_others_is_refused(weighted: list[Weighted]):
    with pytest.raises(AdapterError, match="adapter-1: a DoRA adapter can't be weighted or combined"):
        combined(BASE, weighted, Blending())


def test_two_heads_of_one_name_are_refused_unless_they_are_equal():
    ones = Replacement("head.weight", np.ones(2, np.float32))
    with pytest.raises(AdapterError, match=r"'head\.weight' is replaced by adapter-1 too"):
        combined(
            BASE,
            [Weighted(adapter(1, ones)), Weighted(adapter(2, replace(ones, value=np.zeros(2, np.float32))))],
            Blending(),
        )
    assert combined(BASE, [Weighted(adapter(1, ones)), Weighted(adapter(2, ones))], Blending())["head.weight"] == [ones]


@pytest.mark.parametrize("density", [0.0, -1.0, 1.1, float("nan")])
def test_a_density_that_is_no_share_is_refused(density: float):
    with pytest.raises(AdapterError, match="is not a share"):
        combined(BASE, [Weighted(adapter(1)), Weighted(adapter(2))], Blending("ties", density))

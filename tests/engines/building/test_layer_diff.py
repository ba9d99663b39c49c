"""Engines held against each other, and what is said where one is missing or can't be looked into."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import refusal

from engines.backends import BuildOptions
from engines.backends.tensorrt.layers import LayerDifference
from engines.building.build import Asked, build_unadapted
from engines.building.layer_diff import Compared
from exporter.bundle.manifest import Bundle

pytest.importorskip("tensorrt_rtx")
COMPARE = ("--task", "first", "--engine", "tensorrt-rtx")


@pytest.mark.parametrize(
    ("found", "equal"),
    [
        (Compared(3, (), 10, 10), True),
        (Compared(3, (), 10, 11), False),
        (Compared(3, (LayerDifference(0, "TacticName", "a", "b"),), 10, 10), False),
    ],
)
def test_engines_are_equal_in_layers_tactics_and_size(found: Compared, equal: bool):
    assert found.equal == equal


def test_a_missing_engine_is_named_with_what_builds_it(tiny_bundle: Bundle, rtx_bundle: Path):
    for path in (tiny_bundle.path, rtx_bundle):  # without any, and without the base's
        command = f"lorafuse build {path} --task first --backend tensorrt-rtx --unadapted"
        assert (
            refusal("verify", path, *COMPARE)
            == f"{path}: the base under task 'first' has no tensorrt-rtx engine; run '{command}'"
        )


@pytest.mark.usefixtures("no_device")
def test_looking_into_engines_needs_a_device(rtx_copy: Path):
    build_unadapted(rtx_copy, "first", Asked("tensorrt-rtx", BuildOptions(("8.9",))))
    assert "CUDA error 35" in refusal("verify", rtx_copy, *COMPARE)

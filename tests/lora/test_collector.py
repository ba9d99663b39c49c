"""The collector is held off inside, and as it was afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from lora.collector import uncollected


@pytest.fixture(params=[True, False], ids=["on", "off"])
def collecting(request: pytest.FixtureRequest) -> Iterator[bool]:
    (gc.enable if request.param else gc.disable)()
    yield request.param
    gc.enable()


def test_it_is_off_inside_and_as_before_afterwards(collecting: bool):
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled() == collecting


def test_what_is_raised_inside_leaves_it_as_before(collecting: bool):
    with pytest.raises(KeyError), uncollected():
        raise KeyError
    assert gc.isenabled() == collecting

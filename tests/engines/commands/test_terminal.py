"""What the commands print, in whatever state the numbers are."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from engines.commands.terminal import print_json


def refused(word: str) -> None:
    pytest.fail(f"{word} is no JSON")


def test_numbers_that_json_has_no_word_for_are_null(capsys: pytest.CaptureFixture[str]):
    print_json(
        {
            "worst": math.nan,
            "pairs": [(math.inf, 1.5), (-math.inf, 2)],
            "numpy": np.float64("nan"),
            "name": "NaN",
            "passed": False,
            "none": None,
        }
    )
    printed = json.loads(capsys.readouterr().out, parse_constant=refused)
    assert printed == {
        "worst": None,
        "pairs": [[None, 1.5], [None, 2]],
        "numpy": None,
        "name": "NaN",
        "passed": False,
        "none": None,
    }


def test_a_document_is_indented_and_ends_its_line(capsys: pytest.CaptureFixture[str]):
    print_json([{"a": 1.0, "b": ()}])
    assert capsys.readouterr().out == '[\n  {\n    "a": 1.0,\n    "b": []\n  }\n]\n'

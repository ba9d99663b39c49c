"""What each package offers: the names in its ``__init__``, and no others without a decision."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

PUBLIC = {
    "lora": ["Adapter", "LorafuseError", "ReadOptions", "merge_folder", "read_adapter"],
    "exporter": ["Request", "add_task", "export", "export_task", "open_bundle"],
    "engines": [
        "Graph",
        "Runtime",
        "Session",
        "TextEncoder",
        "empty_cache",
        "greedy",
        "load",
        "open",
        "predictions",
    ],
}


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_offers_these_names(package: str):
    assert importlib.import_module(package).__all__ == PUBLIC[package]


@pytest.mark.parametrize(("package", "name"), [(package, name) for package, names in PUBLIC.items() for name in names])
def test_every_name_is_there_and_says_what_it_is(package: str, name: str):
    found = getattr(importlib.import_module(package), name)
    assert inspect.getdoc(found)


@pytest.mark.parametrize("package", PUBLIC)
def test_another_name_is_an_attribute_error(package: str):
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'utils'"):
        importlib.import_module(package).utils  # noqa: B018


def test_importing_the_packages_imports_no_library():
    """Each name is imported when it is asked for: the command line starts fast."""
    code = "import sys, lora, exporter, engines; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"numpy", "torch", "onnx", "msgspec", "safetensors"}.isdisjoint(loaded)

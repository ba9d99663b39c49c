"""The C++ runtime lives through changes as the Python one does, and a pinned one takes no other bundle."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from replaced import adapter, close_to, replace_left

from exporter.bundle.edits import remove_task
from exporter.bundle.manifest import open_bundle
from exporter.task import add_task
from lora.files.tensorfile import Array
from scripts.support.hand_made_bundle import inputs
from scripts.support.served_by_cpp import RefusedError, ServedByCpp


def test_reload_takes_what_was_replaced_and_keeps_the_rest_loaded(
    cpp: ServedByCpp, bundle: Path, made: Path, mode: str, good: dict[str, Array]
):
    cpp.open(bundle, mode)
    for task in ("left", "right"):
        cpp.run(task, inputs())
    replace_left(bundle, made)
    close_to(cpp.run("left", inputs())["logits"], good["left"])  # as it was opened
    cpp.ask("reload", "-")
    assert cpp.ask("loaded") == "right"
    close_to(cpp.run("left", inputs())["logits"], good["right"])
    close_to(cpp.run("both", inputs())["logits"], good["both"])
    assert cpp.ask("digest") == open_bundle(bundle).digest


def test_what_is_in_use_ends_on_what_it_began_with(
    cpp: ServedByCpp, bundle: Path, made: Path, mode: str, good: dict[str, Array]
):
    cpp.open(bundle, mode)
    cpp.ask("use", "left")
    replace_left(bundle, made)
    cpp.ask("reload", "-")
    close_to(cpp.held(inputs())["logits"], good["left"])
    close_to(cpp.run("left", inputs())["logits"], good["right"])
    close_to(cpp.held(inputs())["logits"], good["left"])
    cpp.ask("close")
    close_to(cpp.held(inputs())["logits"], good["left"])
    cpp.ask("release")


def test_tasks_come_and_go(cpp: ServedByCpp, bundle: Path, made: Path, mode: str, good: dict[str, Array]):
    cpp.open(bundle, mode)
    cpp.ask("preload", "left")
    remove_task(bundle, "left")
    add_task(bundle, adapter(made, "right"), "further", store="dense")
    cpp.ask("reload", "-")
    assert (cpp.ask("loaded"), cpp.ask("tasks")) == ("", "both further right")
    with pytest.raises(RefusedError, match="no task 'left' in this bundle; it holds: both, further, merged, right"):
        cpp.run("left", inputs())
    close_to(cpp.run("further", inputs())["logits"], good["right"])


def test_a_task_that_was_replaced_before_it_was_loaded_asks_for_a_reload(
    cpp: ServedByCpp, bundle: Path, made: Path, mode: str, good: dict[str, Array]
):
    cpp.open(bundle, mode)
    replace_left(bundle, made)
    with pytest.raises(RefusedError, match=r"has changed since the runtime read its manifest.*call reload\(\)"):
        cpp.run("left", inputs())
    cpp.ask("reload", "-")
    close_to(cpp.run("left", inputs())["logits"], good["right"])


def test_a_reload_that_fails_leaves_the_runtime_as_it_was(
    cpp: ServedByCpp, bundle: Path, mode: str, good: dict[str, Array]
):
    cpp.open(bundle, mode)
    cpp.ask("preload", "left")
    content = (bundle / "manifest.json").read_bytes()
    (bundle / "manifest.json").write_bytes(content[:100])
    with pytest.raises(RefusedError, match="not a bundle's manifest"):
        cpp.ask("reload", "-")
    assert cpp.ask("loaded") == "left"
    close_to(cpp.run("left", inputs())["logits"], good["left"])


def test_evict_gives_a_task_up_now_or_when_its_use_ends(
    cpp: ServedByCpp, bundle: Path, mode: str, good: dict[str, Array]
):
    cpp.open(bundle, mode)
    for task in ("left", "right"):
        cpp.ask("preload", task)
    cpp.ask("evict", "left")
    assert cpp.ask("loaded") == "right"
    cpp.ask("use", "right")
    cpp.ask("evict", "right")
    close_to(cpp.held(inputs())["logits"], good["right"])
    cpp.ask("release")
    assert cpp.ask("loaded") == ""
    close_to(cpp.run("right", inputs())["logits"], good["right"])
    with pytest.raises(RefusedError, match="no task 'nope'"):
        cpp.ask("evict", "nope")


def test_a_pinned_bundle_is_no_other(cpp: ServedByCpp, bundle: Path, made: Path, mode: str):
    digest = f"sha256:{hashlib.sha256((bundle / 'manifest.json').read_bytes()).hexdigest()}"
    cpp.open(bundle, mode, digest=digest)
    replace_left(bundle, made)
    with pytest.raises(RefusedError, match=f"pinned to {digest}; give the digest of what is to be taken"):
        cpp.ask("reload", "-")
    with pytest.raises(RefusedError, match=rf"the bundle is sha256:\w+, but {digest} was asked for"):
        cpp.ask("reload", digest)
    cpp.ask("reload", open_bundle(bundle).digest)
    cpp.run("left", inputs())
    with pytest.raises(RefusedError, match=f"but {digest} was asked for"):
        cpp.open(bundle, mode, digest=digest)


@pytest.mark.parametrize("digest", ["sha256:", "0" * 64, "sha512:" + "0" * 64, "sha256:" + "A" * 64, "sha256:\x1b"])
def test_what_is_no_digest_is_refused(cpp: ServedByCpp, bundle: Path, digest: str):
    with pytest.raises(RefusedError, match="is no digest; expected sha256: and 64 hexadecimal digits"):
        cpp.open(bundle, "dedicated", digest=digest)

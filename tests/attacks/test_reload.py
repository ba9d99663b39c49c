"""A runtime lives through changes, and a pinned one takes no other bundle."""

from __future__ import annotations

from pathlib import Path

import pytest
from replaced import adapter, close_to, replace_left

import engines
from exporter.bundle.edits import remove_task
from exporter.bundle.manifest import open_bundle
from exporter.task import add_task
from lora.errors import BundleError
from lora.files.tensorfile import Array
from scripts.support.hand_made_bundle import inputs


def test_reload_takes_what_was_replaced_and_keeps_the_rest_loaded(
    bundle: Path, made: Path, mode: str, good: dict[str, Array]
):
    with engines.open(bundle, mode, threads=1) as runtime:
        for task in ("left", "right"):
            runtime.run(task, inputs())
        replace_left(bundle, made)
        close_to(runtime.run("left", inputs())["logits"], good["left"])  # as it was opened
        runtime.reload()
        assert runtime.loaded == ("right",)
        close_to(runtime.run("left", inputs())["logits"], good["right"])
        close_to(runtime.run("both", inputs())["logits"], good["both"])


def test_a_run_in_progress_ends_on_what_it_began_with(bundle: Path, made: Path, mode: str, good: dict[str, Array]):
    with engines.open(bundle, mode, threads=1) as runtime:
        with runtime.use("left") as held:
            replace_left(bundle, made)
            runtime.reload()
            close_to(held.run(inputs())["logits"], good["left"])
            close_to(runtime.run("left", inputs())["logits"], good["right"])
            close_to(held.run(inputs())["logits"], good["left"])
        assert runtime.loaded == ("left",)
        assert len(runtime._pool.held()) == 1


def test_tasks_come_and_go(bundle: Path, made: Path, mode: str, good: dict[str, Array]):
    with engines.open(bundle, mode, threads=1) as runtime:
        runtime.preload("left")
        remove_task(bundle, "left")
        add_task(bundle, adapter(made, "right"), "further")
        runtime.reload()
        assert runtime.loaded == ()
        with pytest.raises(BundleError, match="no task 'left' in this bundle; it holds: both, further, merged, right"):
            runtime.run("left", inputs())
        close_to(runtime.run("further", inputs())["logits"], good["right"])


def test_a_task_that_was_replaced_before_it_was_loaded_asks_for_a_reload(bundle: Path, made: Path, mode: str):
    with engines.open(bundle, mode, threads=1) as runtime:
        replace_left(bundle, made)
        with pytest.raises(BundleError, match=r"has changed since the runtime read its manifest.*call reload\(\)"):
            runtime.run("left", inputs())
        runtime.reload()
        runtime.run("left", inputs())


def test_a_reload_that_fails_leaves_the_runtime_as_it_was(bundle: Path, mode: str, good: dict[str, Array]):
    with engines.open(bundle, mode, threads=1) as runtime:
        runtime.preload("left")
        content = (bundle / "manifest.json").read_bytes()
        (bundle / "manifest.json").write_bytes(content[:100])
        with pytest.raises(BundleError, match="not a bundle's manifest"):
            runtime.reload()
        assert runtime.loaded == ("left",)
        close_to(runtime.run("left", inputs())["logits"], good["left"])


def test_evict_gives_a_task_up_now_or_when_its_use_ends(bundle: Path, mode: str, good: dict[str, Array]):
    with engines.open(bundle, mode, threads=1) as runtime:
        for task in ("left", "right"):
            runtime.preload(task)
        runtime.evict("left")
        assert runtime.loaded == ("right",)
        with runtime.use("right") as held:
            runtime.evict("right")
            close_to(held.run(inputs())["logits"], good["right"])
        assert runtime.loaded == ()
        close_to(runtime.run("right", inputs())["logits"], good["right"])
        with pytest.raises(BundleError, match="no task 'nope'"):
            runtime.evict("nope")


def test_a_pinned_bundle_is_no_other(bundle: Path, made: Path, mode: str):
    digest = open_bundle(bundle).digest
    with engines.open(bundle, mode, threads=1, digest=digest) as runtime:
        replace_left(bundle, made)
        with pytest.raises(BundleError, match="pinned to sha256:"):
            runtime.reload()
        with pytest.raises(BundleError, match=r"the bundle is sha256:\w+, but sha256:\w+ was asked for"):
            runtime.reload(digest)
        runtime.reload(open_bundle(bundle).digest)
        runtime.run("left", inputs())
    for opening in (lambda: engines.open(bundle, digest=digest), lambda: engines.load(bundle, "left", digest=digest)):
        with pytest.raises(BundleError, match=f"but {digest} was asked for"):
            opening()


@pytest.mark.parametrize("digest", ["", "sha256:", "0" * 64, "sha512:" + "0" * 64, "sha256:" + "A" * 64, "sha256:\x1b"])
def test_what_is_no_digest_is_refused(bundle: Path, digest: str):
    with pytest.raises(BundleError, match="is no digest; expected sha256: and 64 hexadecimal digits"):
        engines.open(bundle, digest=digest)


def test_the_digest_is_the_manifests(bundle: Path):
    import hashlib

    content = (bundle / "manifest.json").read_bytes()
    assert open_bundle(bundle).digest == f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_loading_beside_a_writer_reads_the_manifest_again(
    bundle: Path, made: Path, good: dict[str, Array], monkeypatch: pytest.MonkeyPatch
):
    """The change comes between the manifest and the files."""
    import engines.serving.load as load

    opened: list[Path] = []

    def open_late(path: Path, digest: str | None = None):
        found = open_bundle(path, digest)
        if not opened:
            replace_left(bundle, made)
        opened.append(path)
        return found

    monkeypatch.setattr(load, "open_bundle", open_late)
    with engines.load(bundle, "left", threads=1) as session:
        close_to(session.run(inputs())["logits"], good["right"])
    assert len(opened) == 2

"""Only files that the manifest names are served, and the folder has no say in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from exporter.bundle.check import check_bundle
from exporter.bundle.manifest import open_bundle
from lora.errors import BundleError
from scripts.support.resigned import Record, edit_manifest, manifest_of


def adapter_of(bundle: Path, task: str) -> list[Record]:
    files: list[Record] = manifest_of(bundle)["tasks"][task]["adapter"]
    return files


@pytest.mark.parametrize("listed", [0, 1], ids=["the configuration", "the tensors"])
def test_an_adapters_file_that_the_manifest_does_not_list_is_not_read(served, bundle: Path, listed: int):
    """The other lies beside it, and nobody vouches for it."""
    only = adapter_of(bundle, "merged")[listed]
    edit_manifest(bundle, lambda manifest: manifest["tasks"]["merged"].update(adapter=[only]))
    served.refuses(bundle, "merged", "the adapter is the files", Path(only["path"]).name)
    assert check_bundle(bundle) != []


def test_what_lies_beside_an_adapters_files_is_no_part_of_it(served, bundle: Path):
    """Its name is one that a reader of folders would prefer."""
    config, tensors = adapter_of(bundle, "merged")
    folder = (bundle / config["path"]).parent
    shutil.copy(bundle / tensors["path"], folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors.index.json").write_text("{}")
    served.right(served(bundle))


def test_files_of_two_folders_are_the_manifests_adapter(served, bundle: Path):
    """Where the files lie is the manifest's word; that the folder of the first has another of that name is nobody's."""
    _, tensors = adapter_of(bundle, "merged")
    moved = "base/adapter_model.safetensors"
    (bundle / tensors["path"]).rename(bundle / moved)
    (bundle / tensors["path"]).write_bytes(b"another's")
    edit_manifest(bundle, lambda manifest: manifest["tasks"]["merged"]["adapter"][1].update(path=moved))
    served.right(served(bundle))


def test_a_manifest_that_is_a_link_is_refused(served, bundle: Path, tmp_path: Path):
    (bundle / "manifest.json").rename(tmp_path / "outside.json")
    (bundle / "manifest.json").symlink_to(tmp_path / "outside.json")
    for said in served(bundle).values():
        assert said == f"{bundle / 'manifest.json'}: a link, which may lead out of the bundle; refusing to follow it"
    assert [finding.path for finding in check_bundle(bundle)] == ["manifest.json"]


def test_a_folder_that_becomes_a_link_after_the_bundle_was_opened_is_not_followed(bundle: Path, tmp_path: Path):
    opened = open_bundle(bundle)
    (bundle / "adapters").rename(tmp_path / "away")
    (bundle / "adapters").symlink_to(tmp_path / "away")
    with pytest.raises(BundleError, match="missing from the bundle"):
        opened.content(opened.task("merged").adapter[0])


def test_a_pipe_in_the_place_of_a_file_does_not_hang(bundle: Path):
    opened = open_bundle(bundle)
    file = opened.manifest.base.weights[0]
    (bundle / file.path).unlink()
    os.mkfifo(bundle / file.path)
    with pytest.raises(BundleError, match="missing from the bundle"):
        opened.content(file)

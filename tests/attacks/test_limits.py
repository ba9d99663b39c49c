"""What is asked for is looked at before any work is done on it, and what a stranger wrote can't steer a terminal."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

import engines
from exporter.bundle.manifest import open_bundle
from lora.errors import BundleError, EngineError, LorafuseError
from lora.files.tensorfile import Array
from scripts.support.hand_made_bundle import LONGEST, VOCABULARY, inputs
from scripts.support.resigned import edit_graph, edit_manifest, part_of, replace_content
from scripts.support.served_by_cpp import RefusedError, ServedByCpp

MODES = ("dedicated", "resident")


@pytest.mark.parametrize("threads", [-1, (os.cpu_count() or 1) + 1, 10**6])
def test_threads_of_the_cpp_runtime_are_one_to_the_machines_too(cpp: ServedByCpp, bundle: Path, threads: int):
    said = f"threads {threads}: expected 0 for every core, or 1 to {os.cpu_count()}, which this machine has"
    with pytest.raises(RefusedError, match=said):
        cpp.open(bundle, "dedicated", threads)


@pytest.mark.parametrize("threads", [0, -1, (os.cpu_count() or 1) + 1, 10**6])
def test_threads_are_one_to_the_machines(bundle: Path, threads: int):
    with pytest.raises(EngineError, match=rf"threads is {threads}; expected 1 to {os.cpu_count()}, as many as this"):
        engines.open(bundle, threads=threads)
    with pytest.raises(EngineError, match=rf"threads is {threads}"):
        engines.load(bundle, "left", threads=threads)


def changed(**values: Array) -> dict[str, Array]:
    return inputs() | values


IDS = inputs()["input_ids"]
BROKEN = {
    "a negative id": (changed(input_ids=IDS - 10), rf"input 'input_ids' holds -\d+; expected 0 to {VOCABULARY - 1}"),
    "an id beyond": (
        changed(input_ids=IDS + VOCABULARY),
        rf"input 'input_ids' holds \d+; expected 0 to {VOCABULARY - 1}",
    ),
    "a longer mask": (
        changed(attention_mask=np.ones((2, 6), np.int64)),
        r"input 'attention_mask' is of shape \[2, 6\]; expected \[2, 5\], as long as 'input_ids'",
    ),
    "a shorter mask": (changed(attention_mask=np.ones((2, 1), np.int64)), r"of shape \[2, 1\]; expected \[2, 5\]"),
    "a mask of fewer rows": (
        changed(attention_mask=np.ones((1, 5), np.int64)),
        r"of shape \[1, 5\]; expected \[2, 5\]",
    ),
    "too long": (
        {name: np.ones((1, LONGEST + 1), np.int64) for name in ("input_ids", "attention_mask")},
        rf"input 'input_ids' makes {LONGEST + 1} tokens a row; expected at most {LONGEST}",
    ),
}


@pytest.mark.parametrize(("given", "said"), BROKEN.values(), ids=BROKEN)
def test_both_runtimes_refuse_them_and_go_on(served, bundle: Path, given: dict[str, Array], said: str):
    refused = served.ask(bundle, ["left"], served.mode, given)["left"]
    assert isinstance(refused, str)
    assert re.search(said, refused)
    served.right(served(bundle))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("given", "said"), BROKEN.values(), ids=BROKEN)
def test_inputs_that_a_graph_would_answer_wrongly_are_refused(
    bundle: Path, good: dict[str, Array], mode: str, given: dict[str, Array], said: str
):
    with engines.open(bundle, mode, threads=1) as runtime:
        with pytest.raises(EngineError, match=said):
            runtime.run("left", given)
        with runtime.use("left") as task, pytest.raises(EngineError, match=said):
            task.run(given)
        np.testing.assert_allclose(runtime.run("left", inputs())["logits"], good["left"], atol=1e-4)


@pytest.mark.parametrize(("given", "said"), BROKEN.values(), ids=BROKEN)
def test_a_loaded_task_refuses_them_too(bundle: Path, given: dict[str, Array], said: str):
    with engines.load(bundle, "left", threads=1) as session, pytest.raises(EngineError, match=said):
        session.run(given)


def test_the_longest_and_the_last_id_are_taken(served, bundle: Path):
    ids = np.full((1, LONGEST), VOCABULARY - 1)
    found = served.ask(bundle, ["left"], served.mode, {"input_ids": ids, "attention_mask": np.ones_like(ids)})["left"]
    assert not isinstance(found, str), found
    assert np.isfinite(found).all()


def test_a_size_that_is_not_the_files_is_told_by_both(served, bundle: Path):
    edit_manifest(bundle, lambda manifest: manifest["base"]["weights"][0].update(size=10**15))
    said = served(bundle, "left")["left"]
    assert isinstance(said, str)
    assert "bytes, but the manifest says 1000000000000000" in said


def test_a_size_that_is_not_the_files_is_told_before_the_hash(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    edit_manifest(bundle, lambda manifest: manifest["base"]["weights"][0].update(size=10**15))
    opened = open_bundle(bundle)
    monkeypatch.setattr("exporter.bundle.manifest.check_sha256", lambda *_: pytest.fail("hashed"))
    with pytest.raises(BundleError, match="bytes, but the manifest says 1000000000000000"):
        opened.mapped(opened.manifest.base.weights[0])


ESCAPE = "\x1b[2J\x9b31m\n"


def test_what_a_stranger_wrote_is_printed_escaped(served, bundle: Path):
    """The name of a node's operator, and of a tensor."""

    def rename(model) -> None:
        next(tensor for tensor in model.graph.initializer if tensor.name == "left.weight").name = ESCAPE

    edit_graph(bundle, "left", rename)
    said = served(bundle, "left")["left"]
    assert isinstance(said, str)  # and printable, as whoever asks has made sure


def test_an_axis_whose_name_is_no_text_is_refused(served, bundle: Path):
    path = part_of(bundle, "left")["model"]["path"]
    replace_content(bundle, path, (bundle / path).read_bytes().replace(b"sequence", b"sequenc\xff"))
    served.refuses(bundle, "left", "not an ONNX model that can be served (a text is not UTF-8)")


def test_every_error_is_one_printable_line():
    message = str(LorafuseError(f"tensor '{ESCAPE}' and \udcff"))
    assert message.isprintable()
    assert message == r"tensor '\x1b[2J\x9b31m\n' and \udcff"

"""Torch state dicts: read as they are, and never run."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lora.errors import AdapterError
from lora.formats.peft import read_peft
from lora.formats.pickled import read_pickle

pytestmark = pytest.mark.filterwarnings(
    "ignore:Detected pickle protocol:UserWarning"
)  # torch's, about bytes made to be refused
shapes = st.lists(st.integers(0, 4), max_size=4)
DTYPES = {
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int64: np.int64,
}


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return open, (str(self.marker), "w")


def stored(value: object, file: Path) -> Path:
    torch.save(value, file)
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property."""
    return tmp_path_factory.mktemp("pickled")


@given(shapes, st.sampled_from(list(DTYPES)), st.integers(0, 2**32 - 1))
def test_a_state_dict_is_read_bit_for_bit(folder: Path, shape: list[int], dtype: torch.dtype, seed: int):
    values = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 100).to(dtype)
    found = read_pickle(stored({"name": values}, folder / "state.pt"))["name"]
    assert (found.dtype, found.shape) == (np.dtype(DTYPES[dtype]), tuple(shape))
    np.testing.assert_array_equal(found.astype(np.float64), values.double().numpy())


def test_parameters_and_views_are_read(tmp_path: Path):
    values = torch.arange(6.0).reshape(2, 3)
    found = read_pickle(
        stored({"transposed": values.T, "parameter": torch.nn.Parameter(values)}, tmp_path / "state.pt")
    )
    np.testing.assert_array_equal(found["transposed"], values.numpy().T)
    np.testing.assert_array_equal(found["parameter"], values.numpy())


def test_a_transposed_view_in_bfloat16_is_read(tmp_path: Path):
    values = torch.arange(6.0, dtype=torch.bfloat16).reshape(2, 3)
    found = read_pickle(stored({"name": values.T}, tmp_path / "state.pt"))["name"]
    np.testing.assert_array_equal(found.astype(np.float32), values.T.float().numpy())


WAYS_TO_SAVE = {
    "torch.save": lambda value, file: torch.save(value, file),
    "torch.save of old": lambda value, file: torch.save(value, file, _use_new_zipfile_serialization=False),
    "pickle": lambda value, file: file.write_bytes(pickle.dumps(value)),
    "pickle of old": lambda value, file: file.write_bytes(pickle.dumps(value, protocol=0)),
}


@pytest.mark.parametrize("where", ["alone", "beside tensors", "as a key"])
@pytest.mark.parametrize("way", WAYS_TO_SAVE)
def test_a_payload_is_refused_and_not_run(way: str, where: str, tmp_path: Path):
    file, payload = tmp_path / "state.bin", Payload(tmp_path / "ran")
    value = {
        "alone": payload,
        "beside tensors": {"a.lora_A": torch.ones(2, 2), "b": payload},
        "as a key": {payload: torch.ones(2)},
    }[where]
    WAYS_TO_SAVE[way](value, file)
    with pytest.raises(
        AdapterError, match=r"state\.bin: damaged, or holds more than tensors, which could run code"
    ) as refusal:
        read_pickle(file)
    assert not payload.marker.exists()
    assert "\n" not in str(refusal.value)


def test_the_payload_of_these_tests_does_run_elsewhere(tmp_path: Path):
    payload = Payload(tmp_path / "ran")
    pickle.loads(pickle.dumps(payload)).close()
    assert payload.marker.exists()


NOT_STATE_DICTS = {
    "holds no tensors by name; save": torch.ones(2),
    "holds no tensors by name (a key is 3)": {3: torch.ones(2)},
    "'epoch' is a int, not a tensor": {"epoch": 3, "weight": torch.ones(2)},
    "'state_dict' is a dict, not a tensor": {"state_dict": {"weight": torch.ones(2)}},
    "tensor 'weight' (torch.float32, torch.sparse_coo) has no plain values": {"weight": torch.eye(2).to_sparse()},
    "tensor 'weight' (torch.float8_e4m3fn, torch.strided) has no plain values": {
        "weight": torch.ones(2).to(torch.float8_e4m3fn)
    },
}


@pytest.mark.parametrize("message", NOT_STATE_DICTS)
def test_what_is_no_state_dict_is_refused(message: str, tmp_path: Path):
    with pytest.raises(AdapterError) as refusal:
        read_pickle(stored(NOT_STATE_DICTS[message], tmp_path / "state.pt"))
    assert message in str(refusal.value)


def test_an_empty_state_dict_is_refused(tmp_path: Path):
    with pytest.raises(AdapterError, match="holds no tensors by name"):
        read_pickle(stored({}, tmp_path / "state.pt"))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(AdapterError, match=r"state\.pt: no such file; expected a torch state dict"):
        read_pickle(tmp_path / "state.pt")


@settings(max_examples=200)
@given(st.data(), st.booleans())
def test_damaged_bytes_are_refused_or_read(folder: Path, data: st.DataObject, zipped: bool):
    file = folder / "damaged.pt"
    torch.save(
        {"a.lora_A": torch.ones(2, 3), "a.lora_B": torch.ones(4, 2)}, file, _use_new_zipfile_serialization=zipped
    )
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        read_pickle(file)
    except AdapterError as refusal:
        assert "\n" not in str(refusal)  # not every example is refused


def test_without_torch_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(AdapterError, match="needs torch; install it, or convert the file to safetensors"):
        read_pickle(tmp_path / "state.pt")


@pytest.mark.parametrize("version", ["1.13.1", "2.5.1", "2.9.1+cpu"])
def test_a_torch_whose_reader_can_be_made_to_run_code_is_refused(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(AdapterError, match=r"update it to 2\.10"):
        read_pickle(stored({"name": torch.ones(2)}, tmp_path / "state.pt"))


def test_reading_safetensors_imports_no_torch():
    program = "import sys, lora.formats.read, lora.merging.to_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def peft_folder(folder: Path, save, name: str, dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (2, 6), "B": (4, 2)}
    save(
        {
            f"base_model.model.layer.lora_{name}.weight": torch.randn(shape, generator=generator).to(dtype)
            for name, shape in shapes.items()
        },
        folder / name,
    )
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pefts_bin_is_read_as_its_safetensors_are(dtype: torch.dtype, tmp_path: Path):
    pickled = read_peft(peft_folder(tmp_path / "pickled", torch.save, "adapter_model.bin", dtype))
    (found,), (expected,) = (
        pickled.changes,
        read_peft(peft_folder(tmp_path / "plain", save_file, "adapter_model.safetensors", dtype)).changes,
    )
    assert found.a.tobytes() == expected.a.tobytes()
    assert found.b.tobytes() == expected.b.tobytes()
    assert pickled.files[1].name == "adapter_model.bin"


def test_pefts_safetensors_are_preferred_to_its_bin(tmp_path: Path):
    folder = peft_folder(tmp_path / "both", save_file, "adapter_model.safetensors")
    torch.save(Payload(tmp_path / "ran"), folder / "adapter_model.bin")
    assert read_peft(folder).files[1].name == "adapter_model.safetensors"


def test_pefts_bin_with_a_payload_is_refused(tmp_path: Path):
    folder = peft_folder(
        tmp_path / "evil", lambda _, file: torch.save(Payload(tmp_path / "ran"), file), "adapter_model.bin"
    )
    with pytest.raises(AdapterError, match=r"adapter_model\.bin: damaged, or holds more than tensors"):
        read_peft(folder)
    assert not (tmp_path / "ran").exists()

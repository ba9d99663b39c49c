"""The parts that the C++ runtime has of its own, against the libraries that Python has for them; and what a user does with the library."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import numpy as np
from compiled import HERE, ROOT, Built, run
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from exporter.bundle.manifest import Bundle


def test_sha256_is_hashlibs(built: Built, tmp_path: Path):
    """Every length up to three blocks, where the padding takes every form, and one of many blocks."""
    chance = random.Random(0)
    contents = [chance.randbytes(size) for size in (*range(193), 100_003)]
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
    said = built.probe("sha256", *(tmp_path / str(number) for number in range(len(contents))))
    assert said.split() == [hashlib.sha256(content).hexdigest() for content in contents]


WHOLE = {
    "scalar": np.array(1.5, np.float32),
    "matrix@1,0": np.arange(6, dtype=np.float16).reshape(2, 3),
    "ids": np.arange(4, dtype=np.int64),
    "empty": np.zeros((0, 3), np.float32),
    "flags": np.array([True, False]),
}


def test_a_safetensors_file_is_read_as_the_library_reads_it(built: Built, tmp_path: Path):
    (tmp_path / "file").write_bytes(save(WHOLE, {"format": "pt"}))
    wanted = ["whole"]
    for name, values in sorted(WHOLE.items()):
        wanted += [name, str(values.dtype), hashlib.sha256(values.tobytes()).hexdigest()[:16], *map(str, values.shape)]
    assert built.probe("tensors", tmp_path / "file").split() == wanted


def mutated(chance: random.Random, content: bytes) -> bytes:
    """A file with its header's length, some bytes of its header, or its end changed."""
    size = int.from_bytes(content[:8], "little")
    header, data = bytearray(content[8 : 8 + size]), content[8 + size :]
    match chance.randrange(5):
        case 0:
            return chance.choice([0, 1, size - 1, size + 1, len(content), 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little") + content[8:]
        case 1:
            return content[: chance.randrange(len(content))]
        case 2:
            return content + chance.randbytes(chance.randrange(1, 9))
        case 3:
            digits = [place for place, byte in enumerate(header) if chr(byte).isdigit()]
            for place in chance.sample(digits, chance.randrange(1, 4)):
                header[place] = ord(chance.choice("0123456789"))
        case 4:
            place = chance.randrange(len(header))
            header[place : place + chance.randrange(3)] = chance.choice([b"", b"-", b"9" * 20, b'"', b"[", b"}", b"\x00", b"\xff", b"1.5", b"null"])
    return len(header).to_bytes(8, "little") + bytes(header) + data


def library_reads(path: Path) -> bool:
    try:
        with safe_open(path, framework="numpy"):
            return True
    except (SafetensorError, ValueError, OSError):
        return False


def test_hostile_safetensors_files_are_refused_where_the_library_refuses_them(built: Built, tmp_path: Path):
    """And none crashes it: the probe runs under AddressSanitizer. What is more than the library refuses are tensors of dtypes that engines lack."""
    chance, content = random.Random(1), save(WHOLE, {"format": "pt"})
    paths = [tmp_path / f"{number:03}" for number in range(400)]
    for path in paths:
        path.write_bytes(mutated(chance, content))
    found = [line.startswith("whole") for line in built.probe("tensors", *paths).splitlines()]
    wanted = [library_reads(path) for path in paths]
    assert 0 < sum(wanted) < len(wanted)
    assert [(path.name, mine) for path, mine, theirs in zip(paths, found, wanted, strict=True) if mine != theirs] == []


def test_the_pool_holds_under_threads(tmp_path: Path, built: Built):
    """Under ThreadSanitizer, which sees a race even where it does no harm."""
    program, source = tmp_path / "pool", ROOT / "engines" / "cpp"
    flags = ("-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-fsanitize=thread", "-pthread")
    run("g++", *flags, f"-I{source}/include", f"-I{source}/src", HERE / "pool_stress.cpp", source / "src" / "dtype.cpp", "-o", program)
    assert run(program) == "0 broken, loaded again: yes, refused: yes\n"


def test_an_installed_library_is_found_by_cmake_and_needs_no_json_header(built: Built, tmp_path: Path, tiny_bundle: Bundle):
    prefix = tmp_path / "installed"
    run("cmake", "--install", built.shared, "--prefix", prefix)
    run("cmake", "-S", HERE / "consumer", "-B", tmp_path / "consumer", "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("ninja", "-C", tmp_path / "consumer")
    assert run(tmp_path / "consumer" / "consumer", tiny_bundle.path) == "first\n"
    assert json.dumps(sorted(path.name for path in (prefix / "include").rglob("*.h*"))) == '["lorafuse.h", "runtime.hpp"]'

from __future__ import annotations

import shutil

import pytest
from compiled import HERE, Built, configured, tensorrt_root
from filelock import FileLock


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Built:
    """Compiled with every warning an error; once for all of pytest's processes."""
    for tool in ("cmake", "ninja", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed here")
    temporary = tmp_path_factory.getbasetemp()
    folder = (temporary if worker_id == "master" else temporary.parent) / "cpp"
    with FileLock(f"{folder}.lock"):
        shared = configured(
            folder / "shared",
            "-DCMAKE_BUILD_TYPE=Release",
            "-DBUILD_SHARED_LIBS=ON",
            f"-DCMAKE_INSTALL_PREFIX={folder / 'installed'}",
        )
        sanitized = configured(
            folder / "sanitized",
            "-DCMAKE_CXX_FLAGS=-Werror -O1 -g1",
            "-DLORAFUSE_SANITIZE=address,undefined",
            f"-DLORAFUSE_TESTS={HERE}",
        )
        tensorrt = configured(
            folder / "tensorrt",
            "-DBUILD_SHARED_LIBS=ON",
            f"-DCMAKE_INSTALL_PREFIX={folder / 'with-tensorrt'}",
            *tensorrt_root(folder / "roots"),
        )
    return Built(shared, sanitized, tensorrt)

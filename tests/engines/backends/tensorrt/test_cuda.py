"""Machines without a device: no driver, and a driver that finds none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engines.backends import NoDeviceError
from engines.backends.tensorrt.cuda import Event, checked, cudart, require_device
from lora.errors import EngineError

pytestmark = pytest.mark.usefixtures("no_device")

ASK = """
from engines.backends import NoDeviceError
from engines.backends.tensorrt.cuda import require_device
try:
    require_device()
except NoDeviceError as error:
    print(error)
"""
# A driver of CUDA 12.9 in a machine from which the GPU was taken out: what cuInit then says.
DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return 100; }
int cuDriverGetVersion(int *version) { *version = 12090; return 0; }
static int no_device() { return 100; }
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, void *status) {
    *function = (void *)no_device;
    if (!strcmp(name, "cuInit")) *function = (void *)cuInit;
    if (!strcmp(name, "cuDriverGetVersion")) *function = (void *)cuDriverGetVersion;
    if (!strcmp(name, "cuGetProcAddress")) *function = (void *)cuGetProcAddress_v2;
    return 0;
}
int cuGetProcAddress(const char *name, void **function, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, function, version, flags, 0);
}
"""


def test_no_driver_is_error_35_in_cudas_words():
    with pytest.raises(NoDeviceError) as refused:
        require_device()
    said = "CUDA error 35: CUDA driver version is insufficient for CUDA runtime version"
    assert str(refused.value) == f"no NVIDIA driver on this machine, or one that is too old ({said})"


def test_a_driver_that_finds_no_device_is_error_100(tmp_path: Path):
    (tmp_path / "driver.c").write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "driver.c"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", ASK], env={"LD_LIBRARY_PATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "no CUDA device on this machine (CUDA error 100: no CUDA-capable device is detected)\n"


def test_a_call_that_fails_carries_cudas_words():
    with pytest.raises(EngineError, match=r"\ACUDA error \d+: \w"):
        checked(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))


def test_an_events_calls_take_what_they_are_given():
    """The bindings check what they are handed before they ask the driver."""
    with pytest.raises(EngineError, match="CUDA error 35"):
        Event()
    event, handle = cudart.cudaEvent_t(0), 0
    for status, *_ in (
        cudart.cudaEventRecord(event, handle),
        cudart.cudaEventElapsedTime(event, event),
        cudart.cudaEventDestroy(event),
    ):
        assert int(status) == 35

"""Every test that takes `device` runs interpreted on the CPU and, marked `gpu`, compiled."""

import checked_memory as checked_memory_module
import pytest
import quick_interpreter

from vllm_ffa_fp8fp8.kernels.runtime import INTERPRETED


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    if (request.param == "cpu") != INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 runs kernels on the CPU, TRITON_INTERPRET=0 on the GPU")
    return request.param


@pytest.fixture(scope="session", autouse=INTERPRETED)
def checked_memory():
    """Kernels touch nothing but the storages of their tensors, in all tests."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        quick_interpreter.install(monkeypatch)
        yield checked_memory_module.install(monkeypatch)

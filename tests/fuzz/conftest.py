"""Kernels run interpreted here, and touch nothing but the storages of their tensors."""

import sys
from pathlib import Path

import pytest
import torch

from vllm_ffa_fp8fp8.kernels.runtime import INTERPRETED

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))


@pytest.fixture(scope="session", autouse=True)
def checked_memory():
    if not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    import checked_memory
    import quick_interpreter

    with pytest.MonkeyPatch.context() as monkeypatch:
        quick_interpreter.install(monkeypatch)
        yield checked_memory.install(monkeypatch)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tensors are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

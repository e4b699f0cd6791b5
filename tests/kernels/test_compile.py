"""The kernels compile for GPUs that are not here, with the Triton that is, and fit them."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_kernels import KERNELS

SCRIPT = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_kernels_compile(capability):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    run = subprocess.run(
        [sys.executable, SCRIPT, str(capability)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    compiled = {line.split()[0] for line in run.stdout.splitlines()}
    assert compiled == set(itertools.chain(*KERNELS.values()))

"""Nothing is left to compile while serving, and nothing is compiled that no step launches."""

import os
import subprocess
import sys
from pathlib import Path

from launched_variants import ENGINES

SCRIPT = Path(__file__).with_name("launched_variants.py")


def test_the_warmup_compiles_what_steps_launch():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr[-3000:]
    engines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(engines) == len(ENGINES)
    assert all("'decode_kernel': " in kernels for kernels in engines)

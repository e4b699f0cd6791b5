"""The kernels compile for GPUs that are not here, with the Triton that is, and are what their speed
rests on; `make check-compiled` asks more, of more versions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

SCRIPT = Path(__file__).with_name("compile_kernels.py")
CACHE = Path(__file__).parents[2] / ".triton" / "cache" / triton.__version__
KERNELS = {
    "_decode_plan_kernel", "decode_threshold_kernel", "decode_kernel", "weigh_kernel",
    "draw_kernel", "encode_kernel", "_kv_write_kernel", "_kv_gather_kernel", "_base_read_kernel",
    "_rope_write_kernel", "_project_write_kernel",
}  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(CACHE),  # that of `make check-compiled`
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_INTERPRET": "0",
    }
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_kernels_compile():
    done = run("90", "--extent", "main")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert {line.split()[0] for line in done.stdout.splitlines()} == KERNELS


@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8), reason="3.7 knows it by itself"
)
def test_an_alignment_that_is_not_stated_is_seen():
    done = run("90", "--only", "decode pruned", "--extent", "main", "--forget-alignment")
    assert done.returncode == 1, done.stdout + done.stderr[-3000:]
    failures = [line for line in done.stdout.splitlines() if "FAILED" in line]
    for function in ("load_rows", "load_columns"):
        assert any(f"at a time, not 16, in {function}" in line for line in failures), failures
    assert any("no rows by asynchronous copies" in line for line in failures), failures

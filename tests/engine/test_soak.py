"""The soak in miniature: ugly traffic, and the default backend's tokens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import MODEL, environment
from vllm.platforms import current_platform

SOAK = Path(__file__).parents[2] / "scripts" / "soak.py"


def soak(to: Path, *arguments: str) -> dict:
    command = [sys.executable, SOAK, "--model", MODEL, "--json", to, *arguments]
    process = subprocess.run(command, env=environment(), capture_output=True, text=True)
    print(process.stdout[-6000:])
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-3000:]
    return json.loads(to.read_text())


@pytest.mark.slow
@pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")
def test_traffic_in_miniature(tmp_path):
    limits = ("--requests", "20", "--max-model-len", "240", "--page-size", "16", "--eager")
    table = soak(tmp_path / "table.json", *limits)
    assert table["requests"] == 20 and table["compared"] > 10
    assert table["mismatches"] == table["crashes"] == 0
    for name in ("aborts", "preemptions", "prefix hits, tokens", "drafts accepted"):
        assert table[name] > 0, name


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize("drafts", ["0", "4", "7"])
def test_two_minutes_of_traffic_on_a_gpu(tmp_path, drafts):
    limits = ("--minutes", "2", "--max-model-len", "20000", "--drafts", drafts)
    table = soak(tmp_path / "table.json", *limits)
    assert table["preemptions"] > 0 and table["prefix hits, tokens"] > 0

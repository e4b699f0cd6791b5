"""`runner.py` with vLLM's V2 model runner on the CPU, as `v2_on_cpu.py` has it."""

import json
import sys
from pathlib import Path

import v2_on_cpu  # noqa: F401  sets it up, before anything imports vLLM
from runner import run

if __name__ == "__main__":
    job, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(run(json.loads(job.read_text()))))

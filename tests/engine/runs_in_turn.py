"""`runner.py` for several jobs, whose engines follow one another in one process:
`python runs_in_turn.py JOBS RESULTS`, two JSON files with lists of what it takes and gives."""

import json
import sys
from pathlib import Path
from typing import Any

import vllm
from runner import run

ENGINES: list[Any] = []


def run_and_end(job: dict[str, Any]) -> dict[str, Any]:
    result = run(job)
    ENGINES.pop().llm_engine.engine_core.shutdown()
    return result


class NotedLLM(vllm.LLM):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        ENGINES.append(self)


if __name__ == "__main__":
    vllm.LLM = NotedLLM
    jobs, results = map(Path, sys.argv[1:])
    results.write_text(json.dumps(list(map(run_and_end, json.loads(jobs.read_text())))))

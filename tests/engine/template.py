"""Imports vLLM, and runs every job that it is told in a fork of itself: `python template.py`.

Standard input: a line a job, JSON, `[script, its arguments, file of its output]`. Standard output:
a line a job, its exit code. A fork starts where a new process is after the import, which takes as
long as all else that a small engine does.
"""

import gc
import json
import os
import runpy
import sys

from vllm import LLM  # noqa: F401


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        script, arguments, output = json.loads(line)
        child = os.fork()
        if not child:
            return run(script, arguments, output)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def run(script: str, arguments: list[str], output: str) -> None:
    for file, flags, descriptors in (
        (os.devnull, os.O_RDONLY, (0,)),
        (output, os.O_WRONLY | os.O_CREAT, (1, 2)),
    ):
        opened = os.open(file, flags)
        for descriptor in descriptors:
            os.dup2(opened, descriptor)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()

"""One run of vLLM, in its own process, so that its memory is free afterwards."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine and worker in this process: a quicker start
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def run_engine(job: dict[str, Any], log: str, work: Callable) -> Iterator[tuple[str, Any]]:
    """Yields ("phase", text) as it goes on, then ("result", dict); RuntimeError if it fails.

    `work(job, tell)`, a function of a module, makes the result. `job["environment"]` may hold
    variables to set.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(job, log, sender, work))
    process.start()
    sender.close()
    try:
        kind = None
        while kind != "result":
            kind, value = receiver.recv()
            if kind == "error":
                raise RuntimeError(value)
            yield kind, value
    except EOFError:
        process.join()
        raise RuntimeError(f"the process ended early, exit code {process.exitcode}") from None
    finally:
        process.join(timeout=30)
        process.kill()


def answer(job: dict[str, Any], log: str, sender: Connection, work: Callable) -> None:
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # The job names the backend. The other variables of the user stay as they are.
    os.environ.pop("VLLM_ATTENTION_BACKEND", None)
    os.environ.update(job.get("environment", {}))
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        sender.send(("result", work(job, lambda text: sender.send(("phase", text)))))
    except Exception as error:
        traceback.print_exc()
        sender.send(("error", f"{type(error).__name__}: {error}"))


def watch(
    console: Console, name: str, job: dict[str, Any], work: Callable
) -> dict[str, Any] | None:
    """Runs one job of `run_engine`, shows what it is doing, and its log only if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "vllm.log")
        start = time.monotonic()
        try:
            with console.status(Text(name)) as status:
                for kind, value in run_engine(job, str(log), work):
                    if kind == "result":
                        console.print(Text(f"{name}: done in {time.monotonic() - start:.0f} s"))
                        return value
                    status.update(Text(f"{name}: {value}"))
                    if not console.is_terminal:
                        console.print(Text(f"{name}: {value} ({time.monotonic() - start:.0f} s)"))
        except RuntimeError as error:
            console.print(Text(log.read_text(errors="replace")[-6000:], style="dim"))
            console.print(Text.assemble((f"{name} failed", "red"), f": {error}"))
    return None

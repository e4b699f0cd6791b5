"""Engines and servers in processes of their own, with their logs."""

import contextlib
import functools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "assets" / "recall-9m"
RUNNER = HERE / "runner.py"
TEMPLATE = HERE / "template.py"
SETTINGS_OF_THE_CALLER = ("VLLM_ATTENTION_BACKEND", "FFA_FP8FP8_CONFIG", "TRITON_INTERPRET")
START_SECONDS, RUN_SECONDS, STOP_SECONDS = 240, 500, 60


@dataclass(frozen=True)
class Run:
    batches: list[list[dict[str, Any]]]
    skips: list[dict[str, int]]
    decode_query_lens: list[int]
    decode_steps: list[list[list[int]]]
    facts: dict[str, Any]
    log: str

    def skip_ratio(self, batch: int) -> float:
        counts = self.skips[batch]
        return 1 - counts["kept_blocks"] / counts["total_blocks"]


def environment(**changes: str) -> dict[str, str]:
    variables = {
        name: value for name, value in os.environ.items() if name not in SETTINGS_OF_THE_CALLER
    }
    return variables | {"VLLM_LOGGING_LEVEL": "INFO", "NO_COLOR": "1"} | changes


def run_engine(
    batches: list[list[Any]],
    sampling: dict[str, Any],
    variables: dict[str, str] | None = None,
    **llm: Any,
) -> Run:
    """What an engine answers to `batches`; it and its worker are one process."""
    llm = {"model": str(MODEL), "seed": 0} | llm
    job = {"llm": llm, "batches": batches, "sampling": sampling}
    result, log = run_script(RUNNER, job, variables)
    return Run(**result, log=log)


def run_script(
    script: Path, job: dict[str, Any], variables: dict[str, str] | None = None
) -> tuple[dict[str, Any], str]:
    """What `python script JOB RESULT` makes of a job, and its log; engines have no processes.

    Where there is no GPU and no variable is named, a fork of a process that has imported vLLM
    runs the script."""
    with tempfile.TemporaryDirectory() as folder:
        job_file, result, log = (Path(folder, name) for name in ("job.json", "result.json", "log"))
        job_file.write_text(json.dumps(job))
        changes = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | (variables or {})
        if variables is None and not Path("/dev/nvidiactl").exists():
            settings = environment(**changes)
            settings.pop("PYTEST_CURRENT_TEST", None)
            exit_code = fork(tuple(settings.items()), script, [job_file, result], log)
        else:
            with log.open("wb") as output:
                exit_code = subprocess.run(
                    [sys.executable, script, job_file, result],
                    env=environment(**changes),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=RUN_SECONDS,
                ).returncode
        text = log.read_text(errors="replace")
        assert exit_code == 0, text[-8000:]
        return json.loads(result.read_text()), text


def fork(settings: tuple, script: Path, arguments: list[Path], log: Path) -> int:
    """The exit code of a script in a fork of a process with such environment variables."""
    process = template(settings)
    process.stdin.write(json.dumps([str(script), [*map(str, arguments)], str(log)]) + "\n")
    process.stdin.flush()
    if select.select([process.stdout], [], [], RUN_SECONDS)[0]:
        return int(process.stdout.readline())
    template.cache_clear()
    os.killpg(process.pid, signal.SIGKILL)
    raise TimeoutError(log.read_text(errors="replace")[-8000:])


@functools.cache
def template(settings: tuple) -> subprocess.Popen:
    """It ends where this process does, with its standard input."""
    return subprocess.Popen(
        [sys.executable, TEMPLATE],
        env=dict(settings),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_ours(batches: list[list[Any]], sampling: dict[str, Any], options: dict, **llm: Any) -> Run:
    """`run_engine` with FFA_FP8FP8, which counts the blocks it skips."""
    return run_engine(
        batches,
        sampling,
        attention_backend="FFA_FP8FP8",
        additional_config={"ffa_fp8fp8": {"record_skip_ratio": True} | options},
        worker_extension_cls="vllm_ffa_fp8fp8.stats.WorkerExtension",
        **llm,
    )


class Server:
    """A running `vllm serve`."""

    def __init__(self, process: subprocess.Popen, url: str, log: Path):
        self.process, self.url, self._log = process, url, log

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def complete(self, prompt: str, max_tokens: int) -> str:
        body = {"model": "recall-9m", "prompt": prompt, "temperature": 0, "max_tokens": max_tokens}
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)["choices"][0]["text"]

    def stop(self) -> int:
        """Asks it to end, as Ctrl-C does, and waits for it and its children; its exit code."""
        deadline = time.monotonic() + STOP_SECONDS
        self.process.send_signal(signal.SIGINT)
        exit_code = self.process.wait(timeout=STOP_SECONDS)
        while self.has_processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        return exit_code

    def has_processes(self) -> bool:
        """Whether it or any of its children still runs: they share its process group."""
        for file in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it ended just now
                state, _, group = file.read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.process.pid and state != "Z":
                    return True
        return False

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log[-8000:]
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            time.sleep(0.5)
        raise TimeoutError(self.log[-8000:])


@contextlib.contextmanager
def serve(*arguments: str, **variables: str) -> Iterator[Server]:
    """`vllm serve` of recall-9m on a free port, once it is healthy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [shutil.which("vllm", path=places), "serve", MODEL, "--port", port]
    command += ["--host", "127.0.0.1", "--served-model-name", "recall-9m", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env=environment(**variables),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        server = Server(process, f"http://127.0.0.1:{port}", log)
        try:
            server.wait_until_healthy()
            yield server
        finally:
            if server.has_processes():
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

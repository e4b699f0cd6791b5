"""A running `vllm serve`, as its clients and its machine see it."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

START_SECONDS, STOP_SECONDS, ANSWER_SECONDS = 600, 60, 600
VARIABLES = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
LOG_LINES = 60


class Failure(Exception):
    """What a server should not have done."""


class Server:
    def __init__(self, process: subprocess.Popen, url: str, log: Path):
        self.process, self.url, self.log = process, url, log
        self.http = aiohttp.ClientSession(
            url,
            timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS),
            connector=aiohttp.TCPConnector(limit=0),
        )

    async def post(self, path: str, body: dict | None = None) -> tuple[int, dict[str, Any]]:
        """Status and body of the answer."""
        async with self.http.post(path, json=body) as response:
            return response.status, await response.json(content_type=None) or {}

    async def stream(self, path: str, body: dict, chunks: int | None) -> AsyncIterator[dict]:
        """The chunks of an answer, or so many of them, after which the connection is dropped."""
        async with self.http.post(path, json=body | {"stream": True}) as response:
            if response.status != 200:
                raise Failure(f"{response.status}: {await response.text()}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[len(b"data: ") :])
                if "error" in chunk:
                    raise Failure(json.dumps(chunk))
                yield chunk
                chunks = None if chunks is None else chunks - 1
                if chunks == 0:
                    return

    async def sum_of(self, *names: str) -> int:
        """The sum of all series of /metrics with such names, less `vllm:`."""
        async with self.http.get("/metrics") as response:
            text = await response.text()
        samples = (s for f in text_string_to_metric_families(text) for s in f.samples)
        wanted = {f"vllm:{name}" for name in names}
        return int(sum(sample.value for sample in samples if sample.name in wanted))

    def memory_mib(self, counts_gpu: bool) -> int:
        """Of the processes of the engine, and what is taken of the GPUs, by others too."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        total = sum(child.memory_info().rss for child in children if is_engine(child))
        return (total + (gpu_memory() if counts_gpu else 0)) >> 20

    def end_of_log(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])

    async def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise Failure(f"it did not start:\n{self.end_of_log()}")
            with contextlib.suppress(aiohttp.ClientError):
                async with self.http.get("/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.5)
        raise Failure(f"it did not start in {START_SECONDS} s:\n{self.end_of_log()}")

    def stop(self) -> None:
        """As Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        exit_code = self.process.wait(STOP_SECONDS)
        if exit_code:
            raise Failure(f"its exit code is {exit_code}:\n{self.end_of_log()}")


def is_engine(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(name in " ".join(process.cmdline()) for name in ("EngineCore", "Worker"))
    return False


def gpu_memory() -> int:
    """Bytes that are taken of all GPUs."""
    from vllm.third_party import pynvml

    pynvml.nvmlInit()
    gpus = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
    return sum(pynvml.nvmlDeviceGetMemoryInfo(gpu).used for gpu in gpus)


@contextlib.asynccontextmanager
async def serve(model: str, *options: str) -> AsyncIterator[Server]:
    """`vllm serve`, once it is healthy; raises Failure where it does not start or end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [shutil.which("vllm", path=places), "serve", model, "--port", port]
    command += ["--host", "127.0.0.1", "--served-model-name", "model", *options]
    variables = os.environ | VARIABLES
    variables.pop("VLLM_ATTENTION_BACKEND", None)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=variables, stdout=output, stderr=output, start_new_session=True
            )
        server = Server(process, f"http://127.0.0.1:{port}", log)
        try:
            await server.wait_until_healthy()
            yield server
            server.stop()
        finally:
            await server.http.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

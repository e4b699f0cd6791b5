"""One run of vLLM, in its own process, so that its memory is free afterwards."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine and worker in this process: a quicker start
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def run_engine(
    job: dict[str, Any], log: str, work: Callable | None = None
) -> Iterator[tuple[str, Any]]:
    """Yields ("phase", text) as it goes on, then ("result", dict); RuntimeError if it fails.

    `work(job, tell)`, a function of a module, makes the result: `generate` where none is given.
    `job["environment"]` may hold variables to set.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(job, log, sender, work or generate))
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


def generate(job: dict[str, Any], tell: Any) -> dict[str, Any]:
    tell("importing vLLM")
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    tell("loading the model")
    llm = LLM(enforce_eager=current_platform.is_cpu(), disable_log_stats=True, **job["llm"])
    sampling = SamplingParams(temperature=0, max_tokens=12, stop="\n")
    llm.generate("# warm-up", sampling, use_tqdm=False)
    records_skips = "worker_extension_cls" in job["llm"]
    if records_skips:
        llm.collective_rpc("ffa_skip_stats")  # reading starts a new count
    first, *others = job["prompts"]
    tell("reading the file and answering the first question")
    start = time.perf_counter()
    outputs = llm.generate(first, sampling, use_tqdm=False)
    first_seconds = time.perf_counter() - start
    tell("answering the other questions")
    start = time.perf_counter()
    outputs += llm.generate(others, sampling, use_tqdm=False)
    result = {
        "answers": [output.outputs[0].text for output in outputs],
        "prompt_tokens": [len(output.prompt_token_ids) for output in outputs],
        "cached_tokens": [output.num_cached_tokens for output in outputs],
        "first_seconds": first_seconds,
        "other_seconds": time.perf_counter() - start,
        "backend": llm.collective_rpc(backend_names)[0],
        "cache_bytes_per_token": dense_bytes_per_token(llm),
    }
    if records_skips:
        result |= summed_skip_stats(llm.collective_rpc("ffa_skip_stats"))
    return result


def backend_names(worker: Any) -> str:
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    attention = [layer for layer in layers if hasattr(layer, "get_attn_backend")]
    return ", ".join(sorted({layer.get_attn_backend().get_name() for layer in attention}))


def dense_bytes_per_token(llm: Any) -> int:
    """K and V of every layer at the model's own width, which is what a default backend keeps."""
    config = llm.llm_engine.vllm_config
    model, parallel = config.model_config, config.parallel_config
    heads = model.get_num_kv_heads(parallel) * parallel.tensor_parallel_size
    return 2 * model.get_num_layers(parallel) * heads * model.get_head_size() * model.dtype.itemsize


def summed_skip_stats(workers: list[dict[str, int]]) -> dict[str, Any]:
    kept, total, size = (
        sum(worker[name] for worker in workers)
        for name in ("kept_blocks", "total_blocks", "cache_bytes_per_token")
    )
    return {"skip_ratio": 1 - kept / total if total else None, "cache_bytes_per_token": size}

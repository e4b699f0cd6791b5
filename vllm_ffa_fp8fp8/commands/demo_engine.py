"""The demo's engines, and its job in each one's process: questions to a model, figures of a run."""

import time
from typing import Any

from vllm_ffa_fp8fp8.integration.compat import backend_names
from vllm_ffa_fp8fp8.settings import Setting


def arguments_of(setting: Setting) -> dict[str, Any]:
    """Arguments of LLM that make it run with a setting and count what it skips."""
    return {
        "attention_backend": "FFA_FP8FP8",
        "worker_extension_cls": "vllm_ffa_fp8fp8.stats.WorkerExtension",
        "additional_config": {"ffa_fp8fp8": setting.options | {"record_skip_ratio": True}},
    }


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
    tell(f"reading the file and answering the {'first ' if others else ''}question")
    start = time.perf_counter()
    outputs = llm.generate(first, sampling, use_tqdm=False)
    first_seconds = time.perf_counter() - start
    start = time.perf_counter()
    if others:
        tell("answering the other questions")
        outputs += llm.generate(others, sampling, use_tqdm=False)
    result = {
        "answers": [output.outputs[0].text for output in outputs],
        "prompt_tokens": [len(output.prompt_token_ids) for output in outputs],
        "first_seconds": first_seconds,
        "other_seconds": time.perf_counter() - start,
        "backend": llm.collective_rpc(backend_names)[0],
        "cache_bytes_per_token": dense_bytes_per_token(llm),
    }
    if records_skips:
        from vllm_ffa_fp8fp8.attention.stats import sum_skip_stats

        stats = sum_skip_stats(llm.collective_rpc("ffa_skip_stats"))
        result |= {name: stats[name] for name in ("kept", "cache_bytes_per_token")}
    return result


def dense_bytes_per_token(llm: Any) -> int:
    """K and V of every layer at the model's own width, which is what a default backend keeps."""
    config = llm.llm_engine.vllm_config
    model, parallel = config.model_config, config.parallel_config
    heads = model.get_num_kv_heads(parallel) * parallel.tensor_parallel_size
    return 2 * model.get_num_layers(parallel) * heads * model.get_head_size() * model.dtype.itemsize

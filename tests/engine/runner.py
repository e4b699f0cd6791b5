"""Runs one engine in a process of its own: `python runner.py JOB RESULT`, two JSON files.

Job: `llm` (arguments of `LLM`), `batches` (lists of prompts, each a text, token ids or, with
`extra_args` of its own, a mapping that has it as `prompt`, submitted together) and `sampling`
(arguments of `SamplingParams`). Result: `batches` (lists of answers),
`skips` (one count a batch, empty where nothing counts), `decode_query_lens` (of the steps of
FFA_FP8FP8 that decode), `decode_steps` (of the same steps the query tokens of each decode, and of
each prefill beside them) and `facts` about the worker.
"""

import json
import sys
from pathlib import Path
from typing import Any


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(**job["llm"])
    query_lens, steps = record_decodes()
    llm.collective_rpc(count_projections)
    options = job["llm"].get("additional_config", {}).get("ffa_fp8fp8", {})
    counts_skips = options.get("record_skip_ratio", False)
    batches, skips = [], []
    for prompts in job["batches"]:
        sampling = [
            SamplingParams(
                temperature=0, logprobs=4, extra_args=extra_args_of(prompt), **job["sampling"]
            )
            for prompt in prompts
        ]
        outputs = llm.generate(list(map(as_prompt, prompts)), sampling, use_tqdm=False)
        batches.append(list(map(as_answer, outputs)))
        if counts_skips:
            skips.append(llm.collective_rpc("ffa_skip_stats", kwargs={"by_head": True})[0])
    facts = llm.collective_rpc(worker_facts)[0]
    if "speculative_config" in job["llm"]:
        accepted = "vllm:spec_decode_num_accepted_tokens"
        facts["accepted_tokens"] = sum(m.value for m in llm.get_metrics() if m.name == accepted)
    if not job["llm"].get("disable_log_stats", True):
        ours = [m for m in llm.get_metrics() if m.name.startswith("vllm:ffa_")]
        facts["metrics"] = {metric.name: metric.value for metric in ours}
    return {
        "batches": batches,
        "skips": skips,
        "decode_query_lens": query_lens,
        "decode_steps": steps,
        "facts": facts,
    }


def record_decodes() -> tuple[list[int], list[list[list[int]]]]:
    """`decode_query_lens` and `decode_steps`, which grow with every step; empty for other backends,
    and where the worker is another process."""
    query_lens, steps = [], []
    metadata = sys.modules.get("vllm_ffa_fp8fp8.attention.metadata")
    if metadata is None:
        return query_lens, steps
    build = metadata.FFAFP8FP8MetadataBuilder.build

    def recording_build(self, common_prefix_len, common_attn_metadata, *args, **kwargs):
        result = build(self, common_prefix_len, common_attn_metadata, *args, **kwargs)
        if result.num_decodes:
            query_lens.append(result.query_len)
            tokens = common_attn_metadata.query_start_loc_cpu.diff().tolist()
            steps.append([tokens[: result.num_decodes], tokens[result.num_decodes :]])
        return result

    metadata.FFAFP8FP8MetadataBuilder.build = recording_build
    return query_lens, steps


def count_projections(worker: Any) -> None:
    """From here on `worker.projections` counts the calls, outside replayed graphs, of what takes
    a layer of FFA_FP8FP8 from hidden states, or from projections, to the cache."""
    worker.projections = calls = {"project_rope_and_write": 0, "rope_and_write": 0}

    def counted(original, name: str):
        def call(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    for layer in worker.vllm_config.compilation_config.static_forward_context.values():
        ops = getattr(getattr(layer, "impl", None), "ops", None)
        for name in calls:
            if original := getattr(ops, name, None):
                setattr(ops, name, counted(original, name))


def extra_args_of(prompt: Any) -> dict[str, Any] | None:
    return prompt["extra_args"] if isinstance(prompt, dict) else None


def as_prompt(prompt: str | list[int] | dict[str, Any]) -> Any:
    if isinstance(prompt, dict):
        prompt = prompt["prompt"]
    return prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}


def as_answer(output: Any) -> dict[str, Any]:
    completion = output.outputs[0]
    return {
        "text": completion.text,
        "tokens": list(completion.token_ids),
        # of each token: the best ones, best first
        "best": [
            sorted(((entry.logprob, token) for token, entry in step.items()), reverse=True)
            for step in completion.logprobs
        ],
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
    }


def worker_facts(worker: Any) -> dict[str, Any]:
    compilation = worker.vllm_config.compilation_config
    layers = [
        layer
        for layer in compilation.static_forward_context.values()
        if hasattr(layer, "get_attn_backend")
    ]
    caches = [layer.kv_cache for layer in layers]  # a tuple of states where attention is linear
    facts = {
        "backends": sorted({layer.get_attn_backend().get_name() for layer in layers}),
        "page_shape": list(next(c.shape for c in caches if hasattr(c, "shape"))),
        "plugin_is_loaded": "vllm_ffa_fp8fp8.plugin" in sys.modules,
        "model_runner": type(worker.model_runner).__module__,
        "enforce_eager": worker.vllm_config.model_config.enforce_eager,
        "compilation_mode": getattr(compilation.mode, "name", None),
        "projections": worker.projections,
    }
    graphs = getattr(worker.model_runner, "cudagraph_manager", None)
    if graphs is not None:
        facts["cudagraph_mode"] = graphs.cudagraph_mode.name
        facts["captured_modes"] = sorted({graph.cg_mode.name for graph in graphs.graphs})
    return facts


if __name__ == "__main__":
    job_file, result_file = map(Path, sys.argv[1:])
    result_file.write_text(json.dumps(run(json.loads(job_file.read_text()))))

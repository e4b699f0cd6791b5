"""Engines one after another in one process: `python engines_in_turn.py JOB RESULT`, JSON files.

Job: a list of `llm` (arguments of `LLM`), `prompts` (token ids), `max_tokens`, and `again`: why the
prompts are asked twice, "cached", or "replaced", with weights in new storage and of other values
before; or None. Result: for each engine and each time of asking the answers: `tokens`; `first`, the
best first tokens' log probabilities; `cached`, how many tokens of the prompt were.
"""

import json
import sys
from pathlib import Path
from typing import Any

ALIVE: list[Any] = []
"""What was replaced: freed memory would hold the old values by chance."""


def run(job: dict[str, Any]) -> list[list[dict]]:
    from vllm import LLM, SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, logprobs=4
    )
    prompts = [{"prompt_token_ids": tokens} for tokens in job["prompts"]]
    llm = LLM(**job["llm"])
    asked = [ask(llm, prompts, sampling)]
    if job["again"] == "replaced":
        llm.collective_rpc(replace_weights)
        llm.reset_prefix_cache()
    if job["again"]:
        asked.append(ask(llm, prompts, sampling))
    llm.llm_engine.engine_core.shutdown()
    return asked


def ask(llm, prompts, sampling) -> list[dict[str, Any]]:
    return [
        {
            "tokens": list(answer.outputs[0].token_ids),
            "first": {t: entry.logprob for t, entry in answer.outputs[0].logprobs[0].items()},
            "cached": answer.num_cached_tokens,
        }
        for answer in llm.generate(prompts, sampling, use_tqdm=False)
    ]


def replace_weights(worker: Any) -> None:
    """Norms, rotary tables, and, where the model reads them, projections and biases."""
    for module in worker.model_runner.model.modules():
        rotary, linear = getattr(module, "rotary_emb", None), getattr(module, "qkv_proj", None)
        if rotary is None or linear is None:
            continue
        places = [(linear, name) for name in ("weight", "bias")]
        places += [(getattr(module, name, None), "weight") for name in ("q_norm", "k_norm")]
        if rotary not in ALIVE:  # layers share it
            places.append((rotary, "cos_sin_cache"))
            ALIVE.append(rotary)
        for holder, name in places:
            tensor = getattr(holder, name, None)
            if tensor is not None and tensor.numel():
                ALIVE.append(tensor.data)
                tensor.data = tensor.data.flip(0).contiguous()


if __name__ == "__main__":
    job_file, result_file = map(Path, sys.argv[1:])
    result_file.write_text(json.dumps(list(map(run, json.loads(job_file.read_text())))))

"""A prompt's pages leave an engine through its KV connector and come back: `python round_trip.py
JOB RESULT`, two JSON files.

Job: `llm` (arguments of `LLM`), `prompt` (token ids) and `other` (token ids, whose steps give the
connector time to store). Result: `answers` (cold, from the engine's own prefix cache, through the
connector), `pages` (digests by layer of the prompt's whole pages before they left and after they
came back), `planes` (by name: whether the bytes of a plane differ from page to page) and `fused`
(whether layers run fused).
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from runner import as_answer

POISON = 0xFF


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(**job["llm"])
    table = record_block_tables()
    sampling = SamplingParams(temperature=0, logprobs=4, max_tokens=8, ignore_eos=True)

    def ask(prompt: list[int]) -> dict[str, Any]:
        table.clear()
        (output,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
        return as_answer(output)

    def pages() -> dict[str, torch.Tensor]:
        cache_size = llm.llm_engine.vllm_config.cache_config.block_size
        blocks = table[0][: len(job["prompt"]) // cache_size]
        return {
            name: cache[blocks.to(cache.device)].cpu()
            for name, cache in llm.collective_rpc(caches)[0].items()
        }

    answers = [ask(job["prompt"]), ask(job["prompt"])]
    sent = pages()
    ask(job["other"])
    assert llm.reset_prefix_cache()
    for cache in llm.collective_rpc(caches)[0].values():
        cache.fill_(POISON)
    answers.append(ask(job["prompt"]))
    received = pages()
    return {
        "answers": answers,
        "pages": [{n: digest(t) for n, t in part.items()} for part in (sent, received)],
        "planes": llm.collective_rpc(planes_that_vary, args=(table[0][:2].tolist(),))[0],
        "fused": llm.collective_rpc(is_fused)[0],
    }


def record_block_tables() -> list[torch.Tensor]:
    """The block table of the first step of a request that runs alone, once it has run."""
    from vllm_ffa_fp8fp8.attention.metadata import FFAFP8FP8MetadataBuilder as Builder

    tables, build = [], Builder.build

    def recording_build(self, common_prefix_len, common_attn_metadata, *args, **kwargs):
        tables.append(common_attn_metadata.block_table_tensor[0].cpu().long().clone())
        return build(self, common_prefix_len, common_attn_metadata, *args, **kwargs)

    Builder.build = recording_build
    return tables


def layers(worker: Any) -> dict[str, Any]:
    context = worker.vllm_config.compilation_config.static_forward_context
    return {name: layer for name, layer in context.items() if hasattr(layer, "impl")}


def caches(worker: Any) -> dict[str, torch.Tensor]:
    return {name: layer.kv_cache for name, layer in layers(worker).items()}


def planes_that_vary(worker: Any, blocks: list[int]) -> dict[str, bool]:
    layer = next(iter(layers(worker).values()))
    planes = layer.impl.planes(layer.kv_cache)
    first, second = (
        {
            name: plane[block].view(torch.uint8)
            for name, plane in planes._asdict().items()
            if isinstance(plane, torch.Tensor)
        }
        for block in blocks
    )
    return {name: not torch.equal(first[name], second[name]) for name in first}


def is_fused(worker: Any) -> bool:
    return all(layer.impl.fused_qkv is not None for layer in layers(worker).values())


def digest(pages: torch.Tensor) -> str:
    assert not (pages == POISON).all(-1).any()
    return hashlib.sha256(pages.contiguous().numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    job_file, result_file = map(Path, sys.argv[1:])
    result_file.write_text(json.dumps(run(json.loads(job_file.read_text()))))

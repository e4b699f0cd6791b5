"""Models that mix kinds of layers: FFA_FP8FP8, named alone, runs full attention and leaves the rest
to vLLM.

GEMMA3 may name the folder of a real Gemma 3, for the tests of one.
"""

import functools
import os
from typing import Any

import pytest
from agreement import NEAR_TIE, check_same_tokens
from jobs import CONTINUE, GPU, SMALL_STEPS, source_batch
from processes import HERE, Run, run_script
from prompts import source_prompt
from random_models import make_model
from vllm.platforms import current_platform

from vllm_ffa_fp8fp8.commands.demo_prompts import source_lines

LENGTHS = (1, 129, 1100)
LENGTHS_GPU = (1, 2, 15, 17, 63, 65, 129, 257, 500, 1000, 1500, 2049, 4000)
OTHER_KINDS = {
    "Gemma3Text": "sliding_window (5 layers)",
    "Gemma2": "sliding_window (2 layers)",
    "GptOss": "sliding_window (2 layers)",
    "Qwen3Next": "mamba (3 layers)",
    "Llama4Text": "chunked_local_attention (3 layers)",
}
DEFAULTS = {"mamba": "GDN_ATTN"}  # of other kinds what attention has
BLOCK_SIZE, RUN_LENGTH = 16, 128

on_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")
REAL_NEAR_TIE = 0.2
"""Between logprobs of a real Gemma 3 in bfloat16, whose own rounding is a KL of 1.2e-3 (see
docs/accuracy.md), so about 0.05 of a logprob."""
real = pytest.mark.skipif(not os.environ.get("GEMMA3"), reason="GEMMA3 names no Gemma 3")


def batches(lengths: tuple[int, ...]) -> list[list[list[int]]]:
    """Prompts of such lengths, longer than a step together; then three that a cache knows: the
    longest, one that goes on behind it, and one that leaves it midway."""
    *others, longest = prompts = source_batch(lengths, apart=2)
    return [
        prompts,
        [longest, longest + others[-1][:40], longest[: len(longest) // 2] + others[-1]],
    ]


def plain_places() -> list[int]:
    """A prompt in which runs of a token give neighbouring keys like scores."""
    runs = [token for token in source_prompt(9, start=5000) for _ in range(RUN_LENGTH)]
    return source_prompt(64) + runs + source_prompt(64, start=900)


def ours(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "attention_backend": "FFA_FP8FP8",
        "additional_config": {"ffa_fp8fp8": {"record_skip_ratio": True} | options},
        "worker_extension_cls": "vllm_ffa_fp8fp8.stats.WorkerExtension",
    }


SHORT_ANSWER = {"max_tokens": 8, "ignore_eos": True}
EXACT = ours({"preset": "exact"})
BALANCED = ours({"preset": "balanced", "block_size": BLOCK_SIZE})


def run_in_turn(
    *engines: tuple[dict[str, Any], list[list[list[int]]]], sampling: dict[str, Any] = CONTINUE
) -> list[Run]:
    more = {"seed": 0, "enable_prefix_caching": True}
    jobs = [{"llm": llm | more, "batches": b, "sampling": sampling} for llm, b in engines]
    results, log = run_script(HERE / "runs_in_turn.py", jobs)
    return [Run(**result, log=log) for result in results]


def check_hybrid(default: Run, exact: Run, others: str, near_tie: float = NEAR_TIE) -> None:
    attention = set(default.facts["backends"]) - {"GDN_ATTN"}
    assert "FFA_FP8FP8" not in attention and "FFA_FP8FP8" in exact.facts["backends"]
    kind = others.split()[0]
    name = DEFAULTS.get(kind) or attention.pop()
    said = f"vLLM's choice for the others: {others} {name}. Pages have "
    assert said in exact.log
    check_same_tokens(exact, default, near_tie)
    for counts in exact.skips:
        assert counts["kept_blocks"] == counts["total_blocks"] > 0
    for answer in exact.batches[1][:2]:
        assert answer["num_cached_tokens"] > answer["num_prompt_tokens"] / 2


def check_balanced(run: Run) -> None:
    for layer in run.skips[0]["layers"]:
        assert 0 < layer["kept_blocks"] < layer["total_blocks"]


@pytest.mark.slow
@on_cpu
def test_on_cpu(tmp_path):
    engines, asked = [], batches(LENGTHS)
    for architecture in OTHER_KINDS:
        model = SMALL_STEPS | make_model(architecture, tmp_path / architecture)
        engines += [(model, asked), (model | EXACT, asked)]
    engines.append((model | BALANCED, [[plain_places()]]))
    *runs, balanced = run_in_turn(*engines, sampling=SHORT_ANSWER)
    for place, others in enumerate(OTHER_KINDS.values()):
        check_hybrid(*runs[2 * place : 2 * place + 2], others)
    check_balanced(balanced)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", OTHER_KINDS)
def test_on_gpu(tmp_path, architecture):
    """Ours in CUDA graphs where tokens are compared."""
    model, asked = GPU | make_model(architecture, tmp_path), batches(LENGTHS_GPU)
    if DEFAULTS.get(OTHER_KINDS[architecture].split()[0]) == "GDN_ATTN":
        model["gdn_prefill_backend"] = "triton"  # the other is FlashInfer's
    eager = model | {"enforce_eager": True}
    default, exact, balanced = run_in_turn(
        (eager, asked), (model | EXACT, asked), (eager | BALANCED, [[plain_places()]])
    )
    check_hybrid(default, exact, OTHER_KINDS[architecture])
    check_balanced(balanced)


@functools.cache
def gemma_tokens(num_lines: int) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(os.environ["GEMMA3"])
    return tokenizer("".join(source_lines()[:num_lines]))["input_ids"]


def gemma_batches(lengths: tuple[int, ...]) -> list[list[list[int]]]:
    tokens = gemma_tokens(3000)
    prompts = [tokens[2 * length :][:length] for length in lengths]
    return [prompts, [prompts[-1], prompts[-1] + prompts[1]]]


def check_gemma(llm: dict[str, Any], lengths: tuple[int, ...]) -> None:
    llm, asked = llm | {"model": os.environ["GEMMA3"]}, gemma_batches(lengths)
    default, exact, balanced = run_in_turn(
        (llm, asked), (llm | EXACT, asked), (llm | BALANCED, [[asked[0][-1]]])
    )
    check_hybrid(default, exact, "sliding_window (15 layers)", REAL_NEAR_TIE)
    check_balanced(balanced)
    print(f"{1 - balanced.skip_ratio(0):.3f} of {lengths[-1]} tokens' blocks were kept")


@pytest.mark.slow
@real
@on_cpu
def test_gemma3_on_cpu():
    check_gemma(SMALL_STEPS, (1, 129, 1100))


@pytest.mark.gpu
@real
def test_gemma3_on_gpu():
    check_gemma(GPU, (1, 17, 129, 513, 1000, 4000, 12_000))

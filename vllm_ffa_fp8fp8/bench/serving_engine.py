"""One engine's part of `bench serving`, in its own process: times rows of batch x tokens."""

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from vllm_ffa_fp8fp8.bench.steering import steer

PROBE_TOKENS = 4


def time_rows(job: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """Milliseconds per output token of each row.

    Args:
        job: `llm` (arguments of `LLM`), `rows` (`[batch, tokens]` each), `steps` (a small and a
            large number of output tokens), `repeats`, `vocab_size`, `counts` (whether kept blocks
            are counted), `kept` (the fraction to steer for, or None), `thresholds` (one a row
            instead of steering, log2 units over the anchors, or None).
    """
    tell("importing vLLM")
    from vllm import LLM

    tell("loading the model")
    llm = LLM(**job["llm"])
    longest = max(tokens for _, tokens in job["rows"])
    prompts = [
        random.Random(seed).choices(range(10, job["vocab_size"]), k=longest)
        for seed in range(max(batch for batch, _ in job["rows"]))
    ]
    results = []
    for index, (batch, tokens) in enumerate(job["rows"]):
        threshold = job["thresholds"][index] if job["thresholds"] else None
        row = Row(llm, [prompt[:tokens] for prompt in prompts[:batch]])
        tell(f"{batch} x {tokens:,}: prefill")
        row.generate(1)
        if threshold is not None:
            row.set_threshold(threshold)
        elif job["kept"] is not None:
            tell(f"{batch} x {tokens:,}: moving the threshold until {job['kept']:g} is kept")
            threshold, _ = steer(row.measure_kept, job["kept"])
            row.set_threshold(threshold)
        tell(f"{batch} x {tokens:,}: timing")
        row.generate(job["steps"][0])
        if job["counts"]:
            row.read_kept()
        times = [row.token_milliseconds(*job["steps"]) for _ in range(job["repeats"])]
        kept = row.read_kept() if job["counts"] else None
        results.append(
            {
                "batch": batch,
                "tokens": tokens,
                "ms": statistics.median(times),
                "all_ms": times,
                "kept": kept,
                "threshold_over_anchors": threshold,
            }
        )
    backend = llm.collective_rpc("ffa_backend_names")[0]
    llm.llm_engine.engine_core.shutdown()  # the next engine needs the memory
    return {"rows": results, "backend": backend}


class Row:
    """Requests that are generated for together; their prompts stay in the prefix cache."""

    def __init__(self, llm: Any, prompts: list[list[int]]):
        self.llm = llm
        self.prompts = [{"prompt_token_ids": prompt} for prompt in prompts]

    def generate(self, num_tokens: int) -> float:
        """Seconds for `num_tokens` output tokens of each request."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        outputs = self.llm.generate(self.prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs)
        return seconds

    def token_milliseconds(self, few: int, many: int) -> float:
        """Of a steady decode step: the prefill of the last page cancels out."""
        shorter = self.generate(few)
        return (self.generate(many) - shorter) / (many - few) * 1e3

    def set_threshold(self, over_anchors: float) -> None:
        builders = self.llm.collective_rpc("ffa_move_limit", args=(over_anchors,))
        assert all(builders), "no metadata builder has a limit to set"

    def read_kept(self) -> float | None:
        """Kept fraction since the last reading; None where nothing was counted."""
        from vllm_ffa_fp8fp8.attention.stats import sum_skip_stats

        return sum_skip_stats(self.llm.collective_rpc("ffa_skip_stats"))["kept"]

    def measure_kept(self, threshold: float) -> float:
        self.set_threshold(threshold)
        self.read_kept()
        self.generate(PROBE_TOKENS)
        kept = self.read_kept()
        return 1.0 if kept is None else kept

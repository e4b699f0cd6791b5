"""The job of `calibrate` in an engine's own process: one engine, values chosen on the way."""

from collections.abc import Callable
from typing import Any

from vllm_ffa_fp8fp8.bench.quality.engine import Run, Text, start_engine, stop_engine
from vllm_ffa_fp8fp8.bench.quality.report import summary
from vllm_ffa_fp8fp8.bench.quality.search import SCALES, Wish, search


def find_limit(job: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """Measures values of delta or tau until one reaches the wish.

    Args:
        job: as `judge_texts` takes it, without `runs`, and `wish`, a name of FIGURES' summary and
            its value.

    Returns the `backend`, the `limits` that were measured, their `runs` as `judge_texts` does, and
    the `best` of them.
    """
    job = job | {"runs": [], "reuse_prompts": True}
    llm = start_engine(job, tell, enable_prefix_caching=True)
    fill_cache(llm, job, tell)
    if job["llm"].get("enforce_eager"):
        llm.collective_rpc("ffa_measure_errors")
    scale, wish = SCALES[job["options"]["rule"]], Wish(*job["wish"])
    measured: dict[float, list[Text]] = {}
    before = ""

    def measure(care: float) -> float:
        nonlocal before
        limit = scale.limit(care)
        run = {"name": f"{scale.name(limit)}{before}", "limit": limit, "is_reference": False}
        texts = measured[limit] = Run(llm, job, run | {"copies": 1}, tell).judge_all()
        found = summary(texts)
        before = (
            f" (before: {scale.name(limit)}, kept {found['kept']:.3f}, KL {found['kl_mean']:.1e})"
        )
        return found[wish.figure]

    best = scale.limit(search(measure, wish, scale))
    return {
        "backend": stop_engine(llm),
        "limits": list(measured),
        "runs": list(measured.values()),
        "best": best,
    }


def fill_cache(llm: Any, job: dict[str, Any], tell: Callable[[str], None]) -> None:
    """Leaves the prompts in the cache, where all values find them: prefill is not pruned."""
    from vllm import SamplingParams

    texts, last = job["texts"], job["last"]
    for number, tokens in enumerate(texts):
        tell(f"reading text {number + 1} of {len(texts)}")
        prompt = {"prompt_token_ids": tokens[: len(tokens) - last - 1]}
        llm.generate([prompt], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)

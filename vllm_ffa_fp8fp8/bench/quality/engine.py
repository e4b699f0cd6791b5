"""The job of `quality` in an engine's own process: one backend and cache, some runs over texts."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vllm_ffa_fp8fp8.bench.quality.judge import FIGURES, PROCESSOR, JudgedText
from vllm_ffa_fp8fp8.config import ADDITIONAL_CONFIG_KEY
from vllm_ffa_fp8fp8.registry import BACKEND_NAME

EXTENSION = "vllm_ffa_fp8fp8.bench.quality.worker.QualityExtension"
Text = dict[str, Any]


def judge_texts(job: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """Decodes the end of each text in each run.

    Args:
        job: `llm` (arguments of `LLM`), `options` (of FFA_FP8FP8; None: another backend),
            `texts` (tokens of each), `last` (how many of them are judged), `folder` (for the
            reference's distributions), `copies` (requests at a time, at most), `check` (beside
            the reference: all options that the model is to be able to run with) and `runs`: each
            with a `name`, `is_reference`, `copies` (of a text decoded together; the newest is
            judged) and `limit` (delta or tau, to set before; None: as in the options).

    Returns the `backend`, and for each of the `runs` a list of texts with `figures` (FIGURES of
    each token) and `layers` (of `ffa_skip_stats`, and `squares` of `ffa_layer_errors`, None where
    they are not measured; empty for another backend); or a `problem` that the user can mend.
    """
    try:
        llm = start_engine(job, tell)
    except ModelRefused as error:
        return {"problem": str(error)}
    runs = [Run(llm, job, run, tell).judge_all() for run in job["runs"]]
    return {"backend": stop_engine(llm), "runs": runs}


class ModelRefused(ValueError):
    """What the user can mend, found before weights are loaded."""


def start_engine(job: dict[str, Any], tell: Callable[[str], None], **arguments: Any) -> Any:
    """vLLM's LLM for a job of `judge_texts`. Raises ModelRefused."""
    tell("importing vLLM")
    from vllm import LLM
    from vllm.platforms import current_platform

    llm_arguments = {
        "seed": 0,
        "max_model_len": max(map(len, job["texts"])),
        "max_num_seqs": job["copies"],
        "enforce_eager": current_platform.is_cpu(),
        "enable_prefix_caching": False,  # what was decoded is no prefix of another run
        "async_scheduling": False,
        "disable_log_stats": True,
        "skip_tokenizer_init": True,
        "logits_processors": [PROCESSOR],
        "worker_extension_cls": EXTENSION,
        **arguments,
        **job["llm"],
    }
    if job["check"]:
        tell("looking whether the model can run with FFA_FP8FP8")
        try:
            make_references(job, check_model(llm_arguments, job["check"]))
        except ValueError as error:
            raise ModelRefused(str(error)) from error
    tell("loading the model")
    if job["options"] is None:
        return LLM(**without_ours(llm_arguments))
    return LLM(**with_ours(llm_arguments, job["options"] | {"record_skip_ratio": True}))


def stop_engine(llm: Any) -> str:
    """The name of its backend."""
    backend = llm.collective_rpc("ffa_backend_names")[0]
    llm.llm_engine.engine_core.shutdown()  # the next engine needs the memory
    return backend


def our_kinds(llm: dict[str, Any]) -> list[str]:
    """The kinds of layers for which `attention_config` names FFA_FP8FP8; none: it is for all."""
    kinds = (llm.get("attention_config") or {}).get("backend_per_kind") or {}
    return [kind for kind, backend in kinds.items() if backend == BACKEND_NAME]


def with_ours(llm: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    chosen = {} if our_kinds(llm) else {"attention_backend": BACKEND_NAME}
    return llm | chosen | {"additional_config": {ADDITIONAL_CONFIG_KEY: options}}


def without_ours(llm: dict[str, Any]) -> dict[str, Any]:
    if not (ours := our_kinds(llm)):
        return llm
    attention = dict(llm["attention_config"])
    kinds = attention.pop("backend_per_kind").items()
    attention["backend_per_kind"] = {kind: other for kind, other in kinds if kind not in ours}
    return llm | {"attention_config": attention}


def check_model(llm_arguments: dict[str, Any], settings: list[dict[str, Any]]) -> int:
    """The size of the model's vocabulary. Raises ValueError where FFA_FP8FP8 cannot run a model
    with such options, as far as its configuration tells, before weights are loaded."""
    from vllm import EngineArgs

    from vllm_ffa_fp8fp8.config import FFAConfig
    from vllm_ffa_fp8fp8.environment import fp8_available
    from vllm_ffa_fp8fp8.integration.refusals import (
        check_impl_arguments,
        check_options,
        refusal_reasons,
    )

    for options in settings:
        check_options(FFAConfig(**options), fp8_available())
        config = EngineArgs(**with_ours(llm_arguments, options)).create_engine_config()
    model, parallel = config.model_config, config.parallel_config
    reasons = refusal_reasons(
        head_size=model.get_head_size(),
        dtype=model.dtype,
        kv_cache_dtype=None,
        block_size=None,
        use_mla=model.use_mla,
    )
    if reasons:
        raise ValueError(reasons[0])
    check_impl_arguments(
        num_heads=model.get_num_attention_heads(parallel),
        num_kv_heads=model.get_num_kv_heads(parallel),
    )
    return model.get_vocab_size()


def make_references(job: dict[str, Any], vocab_size: int) -> None:
    """Files for the reference's distributions. Raises ValueError where the disk is too full, or a
    text has a token that the model does not know."""
    size = job["last"] * vocab_size * np.dtype(np.float32).itemsize
    for number, tokens in enumerate(job["texts"]):
        if max(tokens) >= vocab_size:
            raise ValueError(
                f"the tokenizer makes token {max(tokens)} of a text, and the model knows "
                f"{vocab_size:,}: the two do not belong together"
            )
        path = reference_path(job, number)
        try:
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            needed = size * len(job["texts"]) / 1e9
            raise ValueError(
                f"{path.parent} has no room for the reference's distributions, {needed:.2f} GB "
                f"({error.strerror}): set TMPDIR to a larger disk, or judge fewer tokens or texts"
            ) from error


def reference_path(job: dict[str, Any], number: int) -> Path:
    return Path(job["folder"], f"log-probs-{number}")


class Run:
    """One pass over the texts."""

    def __init__(
        self, llm: Any, job: dict[str, Any], run: dict[str, Any], tell: Callable[[str], None]
    ):
        self.llm, self.job, self.run, self.tell = llm, job, run, tell
        self.is_ours = job["options"] is not None

    def judge_all(self) -> list[Text]:
        if self.run["limit"] is not None:
            builders = self.llm.collective_rpc("ffa_set_limit", args=(self.run["limit"],))
            assert all(builders), "no metadata builder has a limit to set"
        return [self.judge(number) for number in range(len(self.job["texts"]))]

    def judge(self, number: int) -> Text:
        texts, last = self.job["texts"], self.job["last"]
        tokens = texts[number]
        place = f"text {number + 1} of {len(texts)}, {len(tokens):,} tokens"
        if len(self.job["runs"]) != 1:
            place = f"{self.run['name']}, {place}"
        self.tell(place)
        figures = Path(self.job["folder"], "figures")
        np.full((last, len(FIGURES)), np.nan).tofile(figures)
        text = JudgedText(tokens[-last - 1 :], len(tokens) - last - 1)
        judged = JudgedText(
            text.tokens,
            text.prompt_tokens,
            str(figures),
            str(reference_path(self.job, number)),
            self.run["is_reference"],
        )
        if self.is_ours:
            self.llm.collective_rpc("ffa_skip_stats")  # reading starts a new count
            self.llm.collective_rpc("ffa_layer_errors")
        self.generate(tokens, [text] * (self.run["copies"] - 1) + [judged])
        found = np.fromfile(figures).reshape(last, -1)
        if np.isnan(found).any():
            raise RuntimeError(f"{place}: distributions are missing or NaN")
        return {"figures": found.tolist(), "layers": self.count_blocks(text)}

    def generate(self, tokens: list[int], texts: list[JudgedText]) -> None:
        outputs = self.llm.generate(
            [{"prompt_token_ids": tokens[: text.prompt_tokens]} for text in texts],
            [text.sampling_params() for text in texts],
            use_tqdm=False,
        )
        for output, text in zip(outputs, texts, strict=True):
            cached = output.num_cached_tokens and not self.job.get("reuse_prompts")
            if list(output.outputs[0].token_ids) != text.tokens or cached:
                raise RuntimeError("the model was not led along the text, token by token")

    def count_blocks(self, text: JudgedText) -> list[dict[str, Any]]:
        """Kept blocks of each layer. Raises RuntimeError where other tokens than the last ones
        were decoded: those alone are pruned, and are what is to be judged."""
        if not self.is_ours:
            return []
        from vllm_ffa_fp8fp8.attention.stats import sum_skip_stats

        stats = sum_skip_stats(self.llm.collective_rpc("ffa_skip_stats"))
        seq_lens = [text.prompt_tokens + step for step in range(1, len(text.tokens))]
        expected = sum(self.llm.collective_rpc("ffa_blocks_to_read", args=(seq_lens,)))
        counted = stats["total_blocks"] + stats["short_blocks"]
        if counted != expected:
            raise RuntimeError(f"decode looked at {counted} blocks instead of {expected}")
        errors = sum_errors(self.llm.collective_rpc("ffa_layer_errors"))
        return [layer | {"squares": errors.get(layer["layer"])} for layer in stats["layers"]]


def sum_errors(workers: list[dict[int, list[float]]]) -> dict[int, list[float]]:
    """`ffa_layer_errors` of all workers as one."""
    sums: dict[int, list[float]] = {}
    for worker in workers:
        for layer, squares in worker.items():
            sums[layer] = [a + b for a, b in zip(sums.get(layer, [0.0, 0.0]), squares, strict=True)]
    return sums

"""What the machine may refuse while an engine starts, said with what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.registry import BACKEND_NAME


@contextmanager
def naming_what_to_lower(vllm_config: Any) -> Iterator[None]:
    """Says of an OutOfMemoryError what the memory was for, and what asks for less of it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        max_model_len = vllm_config.model_config.max_model_len
        max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        raise torch.OutOfMemoryError(
            f"{BACKEND_NAME} found no memory for what a step needs besides the KV cache, at "
            f"max_model_len {max_model_len:,} and max_num_seqs {max_num_seqs:,}: lower "
            f"--max-model-len, which counts most, or --max-num-seqs; or spread the model by "
            f"--tensor-parallel-size, or end what else uses the GPU. {error}"
        ) from error


@lru_cache
def check_triton_cache() -> None:
    """ValueError where Triton could not keep what it compiles, as in a read-only home."""
    folder = environment.triton_cache()
    if problem := environment.why_unwritable(folder):
        raise ValueError(
            f"{BACKEND_NAME} compiles its kernels with Triton, whose cache {folder} cannot be "
            f"written: {problem}. Set TRITON_CACHE_DIR to a folder that can be written, and "
            "VLLM_CACHE_ROOT, where vLLM keeps what it compiles, to another."
        )

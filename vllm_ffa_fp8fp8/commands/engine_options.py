"""What commands that start engines share: `--engine-args`, the files they keep, how they end."""

import argparse
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.bench.files import make_folder
from vllm_ffa_fp8fp8.settings import parse_value

OWN_ARGUMENTS = (
    "model", "attention_backend", "kv_cache_dtype", "additional_config", "worker_extension_cls",
    "logits_processors", "speculative_config", "enable_prefix_caching", "max_num_seqs",
    "max_model_len", "async_scheduling", "skip_tokenizer_init",
)  # fmt: skip
"""Arguments of LLM that are not the user's here."""
MISTAKE, STOPPED = 2, 130


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine-args", nargs="+", default=[], metavar="KEY=VALUE",
        help="more arguments of vLLM's LLM, for all engines: tensor_parallel_size=2",
    )  # fmt: skip


def engine_arguments(pairs: Iterable[str], command: str) -> dict[str, Any]:
    """What `--engine-args` of `command` say. Raises ValueError."""
    arguments = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip("- ").replace("-", "_")
        if not (key and equals):
            raise ValueError(f"--engine-args are KEY=VALUE, such as dtype=float16, not {pair!r}")
        if key in OWN_ARGUMENTS:
            raise ValueError(f"--engine-args {key}: {command} sets that itself")
        arguments[key] = parse_value(value)
    return arguments


def check_path(path: Path | None, argument: str = "--json") -> None:
    """Raises ValueError where the figures could not be kept at the end."""
    if path is None:
        return
    make_folder(path.parent)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: {argument} takes a file")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error


def run_with_engines(work: Callable[[], int], what_is_kept: Callable[[], str] = str) -> int:
    """The exit code of `work`, which needs vLLM: MISTAKE where it raises ValueError, for what the
    user can mend, and STOPPED where he stops it, which says `what_is_kept`, too."""
    if environment.vllm_version() is None:
        print(environment.NO_VLLM)
        return 1
    try:
        return work()
    except ValueError as error:
        print(error)
        return MISTAKE
    except KeyboardInterrupt:
        print(f"Stopped. {what_is_kept()}".strip())
        return STOPPED

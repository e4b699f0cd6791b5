"""What each option of FFA_FP8FP8 is for: for README and `ffa-fp8fp8 config --doc`."""

from dataclasses import dataclass, fields
from typing import Any

import yaml

from vllm_ffa_fp8fp8.config import DEFAULT_PRESET, FFAConfig

MEANINGS = {
    "rule": (
        "how blocks to read are chosen: `threshold`, by their best score, with `delta`; "
        "`share`, by their share of the softmax, with `tau`; it follows where either is said"
    ),
    "delta": (
        "how far the threshold lies below the best score of the first and last tokens, in log2 "
        "units; `null` (YAML: `.inf`) keeps everything"
    ),
    "tau": (
        "from which share of the softmax on a block is read for sure; one with a smaller share "
        "w is read with probability w / tau and counts tau / w times: no bias, and an error of "
        "at most sqrt(tau M) D (docs/accuracy.md); `null` reads everything"
    ),
    "block_size": (
        "tokens kept or skipped together: 16, 32, 64, 128, or null: 16 by share, by threshold "
        "the largest power of two that divides vLLM's page (`--block-size`), up to 128"
    ),
    "use_fp8_residual": (
        "store and use the residual; false has the base alone: a cache a quarter smaller, less "
        "exact in prefill, too"
    ),
    "v_cache_dtype": (
        "`auto` stores V in the model's dtype, `fp8` as E4M3: a cache a quarter smaller"
    ),
    "precomputed_threshold": ("find thresholds in a kernel of their own instead of in every split"),
    "scan": (
        "what the scan by share reads: `base`, the FP8 base, or `int4`, 4 bits a key element that "
        "the cache holds beside it, 14% more of it; pages of a multiple of 64 tokens"
    ),
    "dense_layers": ("layers that are not pruned; negative indices count from the end"),
    "min_context": ("requests with fewer tokens are not pruned"),
    "min_request_delta": (
        "by threshold, the smallest `delta` that a request may choose, with `ffa_delta`"
    ),
    "max_request_tau": (
        "by share, the largest `tau` that a request may choose: "
        '`SamplingParams(extra_args={"ffa_tau": 0.006})`, `"vllm_xargs": {"ffa_tau": 0.006}`'
    ),
    "record_skip_ratio": ("count kept and all blocks on the device"),
    "metrics": ("count them and show them at `/metrics` and in vLLM's log (`docs/metrics.md`)"),
    "fused_kproj": (
        "QKV projection to cache write as one kernel: for small batches (`auto`) or up to 128 "
        "tokens (`on`), with one kernel behind the projection for others; `off`: vLLM's "
        "kernels, then the cache write"
    ),
}
UNITS = {
    "delta": "log2 units",
    "tau": "share of the softmax",
    "block_size": "tokens",
    "min_context": "tokens",
    "min_request_delta": "log2 units",
    "max_request_tau": "share of the softmax",
}


@dataclass(frozen=True)
class Described:
    """An option: `takes` says which values, `default` is what `balanced` has, as YAML."""

    name: str
    takes: str
    default: str
    unit: str
    meaning: str


def described_options() -> list[Described]:
    """Every option in the order in which they are defined."""
    balanced = FFAConfig.load(DEFAULT_PRESET)
    return [
        Described(
            name=field.name,
            takes=field.metadata["allowed"],
            default=as_yaml(getattr(balanced, field.name)),
            unit=UNITS.get(field.name, ""),
            meaning=MEANINGS[field.name],
        )
        for field in fields(FFAConfig)
    ]


def as_yaml(value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def options_table() -> str:
    """README's table of options, in Markdown."""
    rows = [(f"`{o.name}`", o.default, o.meaning) for o in described_options()]
    head = [("option", f"default (`{DEFAULT_PRESET}`)", "meaning"), ("---",) * 3]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (*head, *rows))

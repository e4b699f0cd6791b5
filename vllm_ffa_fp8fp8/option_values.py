"""What each option of FFA_FP8FP8 takes."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

BLOCK_SIZES = (16, 32, 64, 128)
V_CACHE_DTYPES = ("auto", "fp8")
SCANS = ("base", "int4")
FUSED_KPROJ = ("auto", "on", "off")
RULES = {"threshold": "delta", "share": "tau"}
"""How blocks to read are chosen, and the option that says how many."""


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def delta(value: object) -> float:
    if value is None:
        return math.inf
    if (is_int(value) or isinstance(value, float)) and value >= 0:
        return float(value)  # OverflowError for an integer that no float holds
    raise ValueError


def rule(value: object) -> str:
    if isinstance(value, str) and value in RULES:
        return value
    raise ValueError


def tau(value: object) -> float | None:
    if value is None:
        return None
    if (is_int(value) or isinstance(value, float)) and 0 < value < 1:
        return float(value)
    raise ValueError


def largest_tau(value: object) -> float:
    if (is_int(value) or isinstance(value, float)) and 0 <= value <= 1:
        return float(value)
    raise ValueError


def block_size(value: object) -> int | None:
    if value is None or (is_int(value) and value in BLOCK_SIZES):
        return value
    raise ValueError


def v_cache_dtype(value: object) -> str:
    if isinstance(value, str) and value in V_CACHE_DTYPES:
        return value
    raise ValueError


def flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError


def layers(value: object) -> tuple[int, ...]:
    if isinstance(value, list | tuple) and all(is_int(layer) for layer in value):
        return tuple(value)
    raise ValueError


def scan(value: object) -> str:
    if isinstance(value, str) and value in SCANS:
        return value
    raise ValueError


def count(value: object) -> int:
    if is_int(value) and 0 <= value < 2**31:  # an int32 of the kernels
        return value
    raise ValueError


def fused_kproj(value: object) -> str:
    if isinstance(value, bool):  # YAML reads a bare on or off as one
        value = "on" if value else "off"
    if value in FUSED_KPROJ:
        return value
    raise ValueError


def option(default: Any, check: Callable[[object], Any], allowed: str) -> Any:
    """A field whose `check` returns the value to store or raises ValueError or OverflowError;
    `allowed` says what it accepts, for the user."""
    return dataclasses.field(default=default, metadata={"check": check, "allowed": allowed})


def check_together(options: Any) -> None:
    """ValueError for options, of an FFAConfig, that do not go together."""
    if options.rule == "share" and options.precomputed_threshold:
        raise ValueError(
            "Option 'precomputed_threshold' = True belongs to rule 'threshold', and the rule "
            "is 'share'; leave it out, or set rule: threshold"
        )
    if not options.scans_codes:
        return
    if options.rule != "share":
        raise ValueError(
            "Option 'scan' = 'int4' belongs to rule 'share', and the rule is "
            f"{options.rule!r}; leave it out, or set tau"
        )
    if options.block_size == 128:
        raise ValueError(
            "Option 'block_size' = 128 is larger than the runs of 64 tokens that scan: int4 reads; "
            "set 16, 32 or 64"
        )

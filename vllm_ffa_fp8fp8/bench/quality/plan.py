"""Which engines `quality` runs, and what for."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vllm_ffa_fp8fp8.option_values import RULES
from vllm_ffa_fp8fp8.settings import Setting

COPIES = 4
"""Requests of the batch that shows the default backend's own rounding, unless told."""
DEFAULT, FP8_CACHE, FLOOR = "default", "fp8 cache", "default, batch of"
Value = TypeVar("Value")


def floor_name(copies: int) -> str:
    return f"{FLOOR} {copies}"


def floor_of(named: Mapping[str, Value]) -> Value | None:
    """Of the last of the batches that show the default backend's own rounding."""
    return next((named[name] for name in reversed(named) if name.startswith(FLOOR)), None)


@dataclass(frozen=True)
class Texts:
    sources: list[str]
    tokens: list[list[int]]

    def of_length(self, length: int | None) -> list[int]:
        """Which of them have so many tokens; None: all."""
        return [n for n, tokens in enumerate(self.tokens) if length in (None, len(tokens))]


@dataclass
class Engine:
    """A backend with its cache, and the runs that differ in nothing but delta or tau.

    Args:
        llm: arguments of `LLM`.
        settings: of FFA_FP8FP8; none: another backend.
        runs: as `judge_texts` takes them.
    """

    llm: dict[str, Any]
    settings: list[Setting] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return "; ".join(run["name"] for run in self.runs)

    def add(self, name: str, **run: Any) -> None:
        plain = {"name": name, "limit": None, "is_reference": False, "copies": 1}
        self.runs.append(plain | run)

    def job(self, texts: Texts, last: int, folder: str, check: Sequence[Setting]) -> dict[str, Any]:
        """What `judge_texts` takes. With `check` it first looks whether the model can run so."""
        return {
            "llm": self.llm,
            "options": self.settings[0].options if self.settings else None,
            "texts": texts.tokens,
            "last": last,
            "folder": folder,
            "copies": max([COPIES, *(run["copies"] for run in self.runs)]),
            "check": [setting.options for setting in check],
            "runs": self.runs,
        }


def plan_engines(
    settings: Sequence[Setting], llm: dict[str, Any], *, floor: Sequence[int], fp8_cache: bool
) -> list[Engine]:
    """The reference's first. `floor`: the batches that it is repeated in."""
    default = Engine(llm)
    default.add(DEFAULT, is_reference=True)
    for copies in floor:
        default.add(floor_name(copies), copies=copies)
    engines = [default, *_engines_of(settings, llm)]
    if fp8_cache:
        engines.append(Engine(llm | {"kv_cache_dtype": "fp8"}))
        engines[-1].add(FP8_CACHE)
    return engines


def _engines_of(settings: Sequence[Setting], llm: dict[str, Any]) -> Iterator[Engine]:
    """Settings that prune and differ in delta or tau alone share an engine, where it is set
    anew."""
    engines: dict[str, Engine] = {}
    for setting in settings:
        limit = setting.config.limit
        others = json.dumps(setting.options | {RULES[setting.config.rule]: limit is not None})
        engine = engines.setdefault(others, Engine(llm))
        engine.settings.append(setting)
        engine.add(setting.name, limit=limit)
    yield from engines.values()

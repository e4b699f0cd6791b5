"""What `bench serving` times, and its figures: plain data, engine arguments, a table."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_ffa_fp8fp8.bench.files import Records
from vllm_ffa_fp8fp8.bench.published import SERVING
from vllm_ffa_fp8fp8.bench.report import CACHED, conditions, ratio, table
from vllm_ffa_fp8fp8.bench.store import fingerprint
from vllm_ffa_fp8fp8.config import ADDITIONAL_CONFIG_KEY, FFAConfig

EXTENSION = "vllm_ffa_fp8fp8.bench.serving_worker.BenchWorkerExtension"
UNCOUNTED = ", not counting"
OUR_PACKAGES = tuple(f"vllm_ffa_fp8fp8.{room}" for room in ("attention", "integration", "kernels"))
TIMING_FILES = ("serving.py", "serving_engine.py", "serving_worker.py", "steering.py")
PREFILL_CHUNK = 16_384
"""Tokens of a step: a few large steps, since prefill is not timed."""


@dataclass(frozen=True)
class Variant:
    """An engine to time.

    Args:
        llm: its arguments of `LLM`.
        options: of FFA_FP8FP8; None for another backend.
    """

    name: str
    llm: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] | None = None

    @property
    def counts(self) -> bool:
        """Whether it counts the blocks that it keeps."""
        return self.options is not None and self.options["record_skip_ratio"]

    @property
    def min_context(self) -> int:
        """Tokens from which on FFA_FP8FP8 prunes."""
        return FFAConfig.load(overrides=self.options).min_context

    def uncounted(self) -> "Variant":
        """The same without counting, which steering needs."""
        options = {**self.options, "record_skip_ratio": False}
        return replace(self, name=self.name + UNCOUNTED, options=options)


FLASH = {"attention_backend": "FLASH_ATTN"}
BF16 = Variant("FLASH_ATTN bf16", FLASH)
FP8 = Variant("FLASH_ATTN fp8", FLASH | {"kv_cache_dtype": "fp8"})
PEERS = (BF16, FP8)


def parse_variant(text: str) -> Variant:
    """From `NAME={"option": value}`: FFA_FP8FP8 with such options. Raises ValueError."""
    name, _, options = text.partition("=")
    try:
        options = json.loads(options)
    except json.JSONDecodeError as error:
        raise ValueError(f"{text!r} is not NAME=JSON: {error}") from None
    if not name:
        raise ValueError(f"{text!r} is not NAME=JSON: it has no name")
    if options is None:
        raise ValueError(f"{text!r} is not NAME=JSON: the options must be a mapping")
    FFAConfig.load(overrides=options)
    options = {"record_skip_ratio": True} | options
    return Variant(name, {"attention_backend": "FFA_FP8FP8"}, options)


@dataclass(frozen=True)
class Settings:
    """How all variants are timed.

    Args:
        model: its name in `MODELS`; `changes`: to its configuration.
        rows: batch and prompt tokens of each.
        kept: the fraction of blocks that FFA_FP8FP8 is to keep; None leaves its threshold alone.
        steps: a small and a large number of output tokens, whose times are subtracted.
        memory: the part of the GPU's memory that an engine may use.
        tensor_parallel_size: GPUs that share each layer.
    """

    model: str
    rows: tuple[tuple[int, int], ...]
    kept: float | None
    steps: tuple[int, int]
    repeats: int
    memory: float
    on_gpu: bool
    changes: dict[str, Any] = field(default_factory=dict)
    tensor_parallel_size: int = 1


def engine_job(
    variant: Variant, rows: list, settings: Settings, folder: str, vocab_size: int
) -> dict[str, Any]:
    """The job of `serving_engine.time_rows`."""
    batches = sorted({batch for batch, _ in settings.rows})
    llm = {
        "model": folder,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "seed": 0,
        "max_num_seqs": batches[-1],
        "max_num_batched_tokens": PREFILL_CHUNK,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "worker_extension_cls": EXTENSION,
        "tensor_parallel_size": settings.tensor_parallel_size,
    } | variant.llm
    if variant.options is not None:
        llm["additional_config"] = {ADDITIONAL_CONFIG_KEY: variant.options}
    if settings.on_gpu:
        llm["gpu_memory_utilization"] = settings.memory
        llm["compilation_config"] = {"cudagraph_capture_sizes": batches}
    else:
        llm["enforce_eager"] = True
    return {
        "llm": llm,
        "rows": rows,
        "steps": settings.steps,
        "repeats": settings.repeats,
        "vocab_size": vocab_size,
        "counts": variant.counts,
        "kept": settings.kept if variant.counts else None,
        "thresholds": None,
        # as in production: scheduling overlaps with the device's work
        "environment": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} if settings.on_gpu else {},
    }


class Results:
    """Figures in a JSON file, a record for each variant and row. Arguments as of `Records`."""

    def __init__(
        self, path: Path, environment: dict[str, str], fresh: bool = False, commit: str = ""
    ):
        self.path, self.environment = path, environment
        self._file = Records(path, SERVING, environment, fresh=fresh, commit=commit)

    def missing(self, variant: Variant, settings: Settings) -> list[tuple[int, int]]:
        """The rows that no earlier run timed with the same code and settings."""
        return [row for row in settings.rows if self._find(variant, row, settings) is None]

    def thresholds(self, variant: Variant, rows: list, settings: Settings) -> list[float] | None:
        """Where the counting twin of such a variant was steered to; None for others. Raises
        ValueError where the twin was not timed."""
        if not variant.name.endswith(UNCOUNTED) or settings.kept is None:
            return None
        twin = replace(
            variant,
            name=variant.name.removesuffix(UNCOUNTED),
            options={**variant.options, "record_skip_ratio": True},
        )
        steered = [self._find(twin, row, settings) for row in rows]
        if None in steered:
            raise ValueError(f"{variant.name}: its counting twin was not timed")
        return [record["threshold_over_anchors"] for record in steered]

    def put(self, variant: Variant, settings: Settings, answer: dict[str, Any]) -> None:
        for row in answer["rows"]:
            key = self._key(variant, (row["batch"], row["tokens"]), settings)
            figures = {"ms": round(row["ms"], 3), "all_ms": [round(ms, 3) for ms in row["all_ms"]]}
            figures |= {name: row[name] for name in ("kept", "threshold_over_anchors")}
            figures |= {"backend": answer["backend"], "counts": variant.counts}
            self._file.put(key, figures, self._code(variant))
        self._file.save()

    def of(self, variants: list[Variant], settings: Settings) -> list[dict[str, Any]]:
        """Records of all rows and variants, by row; `cached` tells those of earlier runs."""
        found = [self._find(v, row, settings) for row in settings.rows for v in variants]
        return [record | {"cached": self._file.is_cached(record)} for record in found if record]

    def _find(self, variant: Variant, row, settings: Settings) -> dict[str, Any] | None:
        return self._file.find(self._key(variant, row, settings), self._code(variant))

    @staticmethod
    def _code(variant: Variant) -> str:
        code = fingerprint("vllm_ffa_fp8fp8.bench", only=TIMING_FILES)
        return code if variant.options is None else f"{code}-{fingerprint(*OUR_PACKAGES)}"

    @staticmethod
    def _key(variant: Variant, row, settings: Settings) -> dict[str, Any]:
        return {
            "variant": variant.name,
            "batch": row[0],
            "tokens": row[1],
            "llm": variant.llm,
            "options": variant.options,
            "target_kept": None if variant.options is None else settings.kept,
            "steps": list(settings.steps),
            "repeats": settings.repeats,
        }


def as_table(records: list[dict[str, Any]]) -> Table:
    """A row for each record, with the ratios over FLASH_ATTN at the same batch and length."""
    result = table(
        "Time per output token, milliseconds", "batch x tokens", "engine", "ms", "kept",
        "over bf16", "over fp8",
    )  # fmt: skip
    for record in records:
        row = (record["batch"], record["tokens"])
        kept = record["kept"]
        result.add_row(
            f"{row[0]} x {row[1]:,}",
            record["variant"],
            f"{record['ms']:.2f}{CACHED if record['cached'] else ''}",
            ratio(kept),
            *(ratio(_over(records, record, row, peer.name)) for peer in PEERS),
        )
    return result


def _over(records: list, record: dict[str, Any], row: tuple[int, int], peer: str) -> float | None:
    for other in records:
        if other["variant"] == peer and (other["batch"], other["tokens"]) == row:
            return other["ms"] / record["ms"]
    return None


def notes(environment: dict[str, str], records: list, settings: Settings) -> list[str]:
    """Conditions of the figures."""
    few, many = settings.steps
    result = [
        conditions(environment, (record["commit"] for record in records)),
        f"{settings.model} with dummy weights.",
        f"Median of {settings.repeats}: (time of {many} tokens - time of {few}) / {many - few}, "
        "prompts in the prefix cache.",
    ]
    if settings.kept is not None:
        result.append(
            "Kept: as counted while timed; counting costs some of the time. The benchmark moved "
            "the threshold in the running engine until so much was kept. Rows of engines named "
            f"'{UNCOUNTED.strip(', ')}' ran at the same threshold without counting."
        )
    if unskipped := [r for r in records if r["counts"] and r["kept"] in (None, 1)]:
        where = ", ".join(f"{r['variant']} at {r['batch']} x {r['tokens']:,}" for r in unskipped)
        result.append(f"Nothing was skipped by {where}: `exact` is faster there.")
    cached = sum(record["cached"] for record in records)
    if cached:
        result.append(f"{CACHED} {cached} of {len(records)} figures come from earlier runs.")
    return result

"""Tables of whole models and of the projection."""

from typing import Any

from vllm_ffa_fp8fp8.bench.cells import FA3_BF16, OURS, Cell, Figures
from vllm_ffa_fp8fp8.bench.decode_tables import DECODE_TABLES, cell_of, has_main
from vllm_ffa_fp8fp8.bench.model_shapes import PROJECTIONS
from vllm_ffa_fp8fp8.bench.preset_tables import PRESET_TABLES
from vllm_ffa_fp8fp8.bench.published import KPROJ, RETRIEVAL, SERVING, Published, Source
from vllm_ffa_fp8fp8.bench.quality_tables import QUALITY_TABLES
from vllm_ffa_fp8fp8.bench.report import conditions, ratio
from vllm_ffa_fp8fp8.bench.serving import BF16, FP8
from vllm_ffa_fp8fp8.bench.store import DECODE
from vllm_ffa_fp8fp8.bench.tables import Tables, markdown, shown, time, with_conditions

OURS_SERVED = "FFA_FP8FP8"
FUSED = ("auto", "off")
TIMED = (8, 32_768)
"""Batch and tokens of the decode times beside a real model's answers."""
NEAR = 1.15
"""How far apart a kept fraction that was timed and one that was counted may be."""


def served(source: Source, variant: str) -> dict[tuple[int, int], dict[str, Any]]:
    """Records of a variant by batch and tokens, the last one where there are several."""
    return {(r["batch"], r["tokens"]): r for r in source.records if r["variant"] == variant}


def serving_table(published: Published) -> str:
    """Milliseconds per output token beside FLASH_ATTN."""
    source = published.newest(SERVING, lambda source: bool(served(source, OURS_SERVED)))
    ours, *peers = (served(source, name) for name in (OURS_SERVED, BF16.name, FP8.name))
    rows, used = [], []
    for row, record in sorted(ours.items()):
        others = [peer.get(row) for peer in peers]
        used += [record, *filter(None, others)]
        rows.append(
            (
                f"{row[0]} x {row[1]:,}",
                ratio(record["kept"]),
                f"{record['ms']:.2f}",
                *("-" if other is None else f"{other['ms']:.2f}" for other in others),
                *(ratio(other and other["ms"] / record["ms"]) for other in others),
            )
        )
    headings = (
        "batch x tokens", "kept", "FFA_FP8FP8", "FLASH_ATTN, bf16 cache", "FLASH_ATTN, fp8 cache",
        "over bf16", "over fp8",
    )  # fmt: skip
    table = markdown(headings, rows)
    return with_conditions(table, source, (r["commit"] for r in used), repeats(used))


def repeats(records: list[dict[str, Any]]) -> str:
    counts = sorted({len(record["all_ms"]) for record in records})
    apart = max(max(r["all_ms"]) / min(r["all_ms"]) - 1 for r in records)
    return f"Medians of {' or '.join(map(str, counts))} runs, which lay up to {apart:.0%} apart."


def fused_table(published: Published) -> str:
    """The engine with the fused projection and without it."""
    source = published.newest(SERVING, lambda source: bool(served(source, FUSED[0])))
    variants = [served(source, name) for name in FUSED]
    found = sorted(set(variants[0]) & set(variants[1]))
    used = [variant[row] for row in found for variant in variants]
    rows = [
        (
            str(batch),
            f"{tokens:,}",
            *(", ".join(f"{ms:.2f}" for ms in v[batch, tokens]["all_ms"]) for v in variants),
        )
        for batch, tokens in found
    ]
    table = markdown(("batch", "tokens", *FUSED), rows)
    return with_conditions(table, source, (record["commit"] for record in used))


def projected(published: Published, phase: str) -> tuple[Source, list[dict[str, Any]]]:
    def records(source: Source) -> list[dict[str, Any]]:
        return [record for record in source.records if record["phase"] == phase]

    source = published.newest(KPROJ, lambda source: bool(records(source)))
    order = list(PROJECTIONS)
    return source, sorted(records(source), key=lambda r: (order.index(r["model"]), r["tokens"]))


def one_kernel(record: dict[str, Any]) -> float:
    return record["us"]["one kernel, default"]


def sped_up(record: dict[str, Any], us: float, bold: bool) -> str:
    text = f"{shown(us)} ({record['us']['unfused'] / us:.2f})"
    return f"**{text}**" if bold else text


def projection_table(published: Published) -> str:
    """From hidden states to the cache, a decode step."""
    source, records = projected(published, "decode")
    rows = [
        (
            record["model"].upper(),
            str(record["tokens"]),
            shown(record["floor_us"]),
            shown(record["us"]["unfused"]),
            sped_up(record, record["us"]["linear + kernel"], not record["auto"]),
            sped_up(record, one_kernel(record), record["auto"]),
        )
        for record in records
    ]
    headings = ("shape", "tokens", "floor", "unfused", "linear + one kernel", "one kernel")
    commits = (record["commit"] for record in records)
    return with_conditions(markdown(headings, rows), source, commits)


def prefill_table(published: Published) -> str:
    """Behind the projection, a prefill step."""
    source, records = projected(published, "prefill")
    rows = [
        (
            record["model"].upper(),
            f"{record['tokens']:,}",
            shown(record["floor_us"]),
            shown(record["us"]["unfused"]),
            sped_up(record, one_kernel(record), bold=False),
        )
        for record in records
    ]
    headings = ("shape", "tokens", "a copy of as many bytes", "unfused", "one kernel")
    commits = (record["commit"] for record in records)
    return with_conditions(markdown(headings, rows), source, commits)


def timed_at(figures: Figures, kept: float) -> Cell | None:
    """Our cell of the nearest kept fraction that is near enough."""

    def apart(cell: Cell) -> float:
        return max(figures[cell].kept / kept, kept / figures[cell].kept)

    shape = cell_of(*TIMED, 1.0).shape
    cells = [
        cell
        for cell in figures
        if (cell.shape, cell.series, cell.value_dtype) == (shape, OURS, "auto")
        and not cell.is_variant
    ]
    best = min(cells, key=apart, default=None)
    return best if best and apart(best) <= NEAR else None


def answer_table(published: Published) -> str:
    """A real model's right answers, and decode's time where as much is kept."""
    answers, times = published.newest(RETRIEVAL), published.newest(DECODE, has_main)
    figures, shape = times.figures, cell_of(*TIMED, 1.0).shape
    bf16 = figures.get(Cell(shape, FA3_BF16))
    lengths = sorted({record["tokens"] for record in answers.records})
    used, rows = [], []
    for rule in dict.fromkeys(record["rule"] for record in answers.records):
        records = {r["tokens"]: r for r in answers.records if r["rule"] == rule}
        longest = records[lengths[-1]]
        ours = longest["series"] == OURS
        cell = timed_at(figures, longest["kept"]) if ours else Cell(shape, longest["series"])
        figure = figures.get(cell)
        used += [figure.commit] if figure else []
        rows.append(
            (
                rule,
                *(str(records[length]["right"]) for length in lengths),
                f"{longest['kept']:.2f}",
                f"{time(figure)} (at {figure.kept:.2f})" if figure and ours else time(figure),
                ratio(figure and bf16 and bf16.us / figure.us),
            )
        )
    first = answers.records[0]
    headings = (
        "", *(f"{length:,}" for length in lengths), f"kept at {lengths[-1]:,}",
        "decode, us", "over bf16",
    )  # fmt: skip
    notes = (
        f"Right answers of {first['questions']} a length: {first['model']}, {first['conditions']}; "
        f"{answers.environment['gpu']}, {answers.stack}, {first['date']}.",
        f"Decode: one layer, {TIMED[0]} x {TIMED[1]:,} tokens, at the nearest kept fraction that "
        f"was timed; {conditions(times.environment, used)}",
    )
    return "\n\n".join((markdown(headings, rows), " ".join(notes)))


TABLES: Tables = (
    DECODE_TABLES
    | QUALITY_TABLES
    | PRESET_TABLES
    | {
        "answers": answer_table,
        "serving": serving_table,
        "serving-kproj": fused_table,
        "kproj": projection_table,
        "kproj-prefill": prefill_table,
    }
)

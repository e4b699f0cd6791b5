"""The table of `quality`'s figures."""

from typing import Any

from vllm_ffa_fp8fp8.bench.published import QUALITY, Published
from vllm_ffa_fp8fp8.bench.quality.plan import DEFAULT
from vllm_ffa_fp8fp8.bench.report import conditions
from vllm_ffa_fp8fp8.bench.tables import Tables, markdown

NO_FIGURES = "No figures of `quality` are kept under plot/ yet."


def quality_table(published: Published) -> str:
    """Kept and KL of each setting, a row a model, length and text, of the newest stack."""
    sources = published.of(QUALITY)
    sources = [source for source in sources if source.stack == sources[0].stack]
    records = [record for source in sources for record in source.records]
    if not records:
        return NO_FIGURES
    runs: dict[tuple, dict[str, dict[str, Any]]] = {}
    for record in records:
        key = (record["model"], record["tokens"], record["text"], record["last"])
        runs.setdefault(key, {})[record["name"]] = record
    names = list(dict.fromkeys(r["name"] for r in records if r["name"] != DEFAULT))
    rows = [
        (model, f"{tokens:,}", text, str(last), *(cell(run.get(name)) for name in names))
        for (model, tokens, text, last), run in sorted(runs.items())
    ]
    table = markdown(("model", "tokens", "text", "judged, of each", *names), rows)
    notes = [
        conditions(source.environment, (record["commit"] for record in source.records))
        for source in sources
    ]
    return "\n\n".join((table, " ".join(notes)))


def cell(record: dict[str, Any] | None) -> str:
    if record is None:
        return "-"
    return f"{record['kept']:.3f}, {record['kl_mean']:.1e}"


QUALITY_TABLES: Tables = {"quality": quality_table}

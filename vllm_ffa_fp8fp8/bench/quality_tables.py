"""The table of `quality`'s figures."""

from typing import Any

from vllm_ffa_fp8fp8.bench.published import QUALITY, Published
from vllm_ffa_fp8fp8.bench.quality.plan import DEFAULT
from vllm_ffa_fp8fp8.bench.report import conditions
from vllm_ffa_fp8fp8.bench.tables import Tables, markdown
from vllm_ffa_fp8fp8.option_values import RULES

NO_FIGURES = "No figures of `quality` are kept under plot/ yet."


def quality_table(published: Published) -> str:
    """Kept and KL, a row a setting, a column a model and length, of the newest stack."""
    sources = published.of(QUALITY)
    sources = [source for source in sources if source.stack == sources[0].stack]
    records = [record for source in sources for record in source.records]
    if not records:
        return NO_FIGURES
    subjects = sorted({(r["model"], r["tokens"]) for r in records})
    found = {(r["name"], r["model"], r["tokens"]): r for r in records}
    options = {r["name"]: r["options"] for r in records if r["name"] != DEFAULT}
    rows = [
        (name, *(cell(found.get((name, *subject))) for subject in subjects))
        for name in sorted(options, key=lambda name: order_of(options[name]))
    ]
    table = markdown(("", *(f"{model}, {tokens:,}" for model, tokens in subjects)), rows)
    judged = dict.fromkeys(f"the last {r['last']} tokens of {r['text']}" for r in records)
    notes = [f"Of {'; '.join(judged)}."]
    notes += [
        conditions(source.environment, (record["commit"] for record in source.records))
        for source in sources
    ]
    return "\n\n".join((table, " ".join(notes)))


def order_of(options: dict[str, Any]) -> tuple:
    """vLLM's own caches first, then like settings side by side."""
    if not options:
        return (0,)
    rule, scan = options["rule"], options.get("scan", "")
    limit = options[RULES[rule]] or 0.0
    block_size = options["block_size"] or (16 if rule == "share" else 64)
    return 1 + bool(limit), rule, block_size, limit, scan


def cell(record: dict[str, Any] | None) -> str:
    if record is None:
        return "-"
    return f"{record['kept']:.3f}, {record['kl_mean']:.1e}"


QUALITY_TABLES: Tables = {"quality": quality_table}

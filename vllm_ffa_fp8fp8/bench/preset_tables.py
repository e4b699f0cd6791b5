"""Which preset for whom: what each costs in quality and bytes, and how long it takes."""

import math
from typing import Any

from vllm_ffa_fp8fp8.bench.cells import FA3_BF16, FA3_FP8, OURS
from vllm_ffa_fp8fp8.bench.pictures.sources import LAYERS, QUALITY
from vllm_ffa_fp8fp8.bench.published import Published, Source
from vllm_ffa_fp8fp8.bench.quality.plan import FP8_CACHE
from vllm_ffa_fp8fp8.bench.report import conditions
from vllm_ffa_fp8fp8.bench.tables import Tables, markdown
from vllm_ffa_fp8fp8.config import FFAConfig

PRUNING = ("balanced", "fast")
FOR = {
    "exact": "the model's own answers; a check of the others",
    "balanced": "the default: closer to them than an fp8 cache by far",
    "fast": "at most an fp8 cache's error, and the least time",
}
HEAD_SIZE = 128
NEAR = 1.15
"""How far apart a kept fraction that was timed and one that was judged may be."""
NOT_TIMED = "not measured yet"
Run = dict[str, dict[str, Any]]
"""Records of a model and length by the names of the settings."""


def presets_table(published: Published) -> str:
    """A row a preset, and vLLM's caches beside them."""
    judged = published.newest(QUALITY, lambda source: bool(runs_of(source)))
    runs = runs_of(judged)
    timed = published.newest(LAYERS, lambda source: bool(runs_at_end(source, longest(runs))))
    times = runs_at_end(timed, longest(runs))
    peers = {r["series"]: r for r in times if r["series"] != OURS}
    exact = next((r for r in times if r["setting"] and r["setting"].value is None), None)
    ours = 4 * HEAD_SIZE + 1
    rows = [[f"`exact`: {FOR['exact']}", f"{ours}", *["1, rounding alone"] * len(runs)]]
    rows[0] += timed_as(exact, peers)
    used = [*filter(None, [exact]), *peers.values()]
    for name in PRUNING:
        tau = FFAConfig.load(name).limit
        found = [record_of(run, tau) for run in runs.values()]
        nearest = nearest_to(times, record_of(runs[longest(runs)], tau))
        used += [nearest] if nearest else []
        cells = [cell(r, run[FP8_CACHE]) for r, run in zip(found, runs.values(), strict=True)]
        row = [f"`{name}` (`tau` {tau:g}): {FOR[name]}", f"{ours}", *cells]
        rows.append(row + timed_as(nearest, peers))
    fp8 = [f"1, {run[FP8_CACHE]['kl_mean']:.1e}" for run in runs.values()]
    rows.append(["vLLM's fp8 cache", f"{2 * HEAD_SIZE}", *fp8, *timed_as(peers[FA3_FP8], peers)])
    bf16 = ["1, 0"] * len(runs)
    rows.append(["vLLM's bf16 cache", f"{4 * HEAD_SIZE}", *bf16, *timed_as(peers[FA3_BF16], peers)])
    cases = (f"{model}, {tokens:,}: kept, KL" for model, tokens in runs)
    headings = ("", "cache", *cases, "decode, us", "over bf16", "over fp8")
    first = times[0]
    notes = (
        f"Cache: bytes a token and KV head of {HEAD_SIZE}. KL: of the next token from vLLM's "
        "default backend, mean, nats, and in brackets over an fp8 cache's; "
        + conditions(judged.environment, (r["commit"] for r in judged.records)),
        f"Decode: a layer of {first['model']}, heads repeated to 32 over 8, {first['batch']} x "
        f"{first['length']:,} tokens, at the kept fraction in brackets, the nearest that was timed "
        "or the least above; " + conditions(timed.environment, (r["commit"] for r in used)),
    )
    return "\n\n".join((markdown(headings, rows), " ".join(notes)))


def runs_of(source: Source) -> dict[tuple[str, int], Run]:
    """Those beside an fp8 cache, by model and length."""
    runs: dict[tuple[str, int], Run] = {}
    for record in source.records:
        runs.setdefault((record["model"], record["tokens"]), {})[record["name"]] = record
    return {key: run for key, run in sorted(runs.items()) if FP8_CACHE in run}


def longest(runs: dict[tuple[str, int], Run]) -> tuple[str, int]:
    return max(runs, key=lambda case: case[1])


def runs_at_end(source: Source, case: tuple[str, int]) -> list[dict[str, Any]]:
    """What was timed of the model at the longest context and the largest batch."""
    records = [r for r in source.records if r["model"] == case[0]]
    last = max(((r["length"], r["batch"]) for r in records), default=None)
    return [r for r in records if (r["length"], r["batch"]) == last]


def record_of(run: Run, tau: float | None) -> dict[str, Any] | None:
    """What was judged of blocks of 16 by share."""
    return next(
        (r for r in run.values() if is_of(r["options"]) and r["options"]["tau"] == tau), None
    )


def is_of(options: dict[str, Any]) -> bool:
    return options.get("rule") == "share" and options.get("block_size") in (16, None)


def nearest_to(times: list[dict[str, Any]], judged: dict[str, Any] | None) -> dict[str, Any] | None:
    """What was timed where about as much is kept, or else the least that is more."""
    if judged is None:
        return None
    ours = [r for r in times if r["setting"] and is_of(r["setting"].options)]
    ratios = {abs(math.log(r["kept"] / judged["kept"])): r for r in ours}
    if ratios and min(ratios) <= math.log(NEAR):
        return ratios[min(ratios)]
    more = [r for r in ours if r["kept"] > judged["kept"]]
    return min(more, key=lambda r: r["kept"], default=None)


def cell(record: dict[str, Any] | None, fp8: dict[str, Any]) -> str:
    if record is None:
        return "-"
    return (
        f"{record['kept']:.3f}, {record['kl_mean']:.1e} ({record['kl_mean'] / fp8['kl_mean']:.2f})"
    )


def timed_as(record: dict[str, Any] | None, peers: dict[str, dict[str, Any]]) -> list[str]:
    if record is None:
        return [NOT_TIMED, "-", "-"]
    at = f" (at {record['kept']:.3f})" if record["kept"] < 1 else ""
    ratios = (f"{peers[name]['us'] / record['us']:.2f}" for name in (FA3_BF16, FA3_FP8))
    return [f"{record['us']:.1f}{at}", *ratios]


PRESET_TABLES: Tables = {"presets": presets_table}

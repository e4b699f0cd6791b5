"""What `ffa-fp8fp8 eval` found, as JSON data and as a table."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_ffa_fp8fp8.bench.report import show_table, table
from vllm_ffa_fp8fp8.settings import Setting

LOSS = "ffa_loss"
"""How the tasks' names begin whose text is read in prefill."""
LOSS_NOTE = (
    "Losses are nats a token. They are read in prefill, where nothing is pruned, and show what the "
    "cache's format changes; `ffa-fp8fp8 quality` has the loss by decode."
)
Results = Mapping[str, dict[str, Any]]
"""By name what `evaluate` returned, the default backend's first."""


def entries(settings: Sequence[Setting], results: Results) -> list[dict[str, Any]]:
    """A setting each, with its score, standard error, difference from the default backend's and
    that one's standard error, and kept fraction, of each task and length."""
    options = {setting.name: setting.options for setting in settings}
    reference = next(iter(results.values()))["parts"]
    return [
        {
            "name": name,
            "options": options.get(name),
            "backend": result["backend"],
            "results": [
                compared(part, base) for part, base in zip(result["parts"], reference, strict=True)
            ],
        }
        for name, result in results.items()
    ]


def compared(part: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """The difference's standard error is of pairs: the same documents."""
    scores = part["scores"]
    differences = [one - other for one, other in zip(scores, base["scores"], strict=True)]
    return {
        "task": part["task"],
        "length": part["length"],
        "documents": len(scores),
        "score": statistics.fmean(scores),
        "stderr": standard_error(scores),
        "difference": statistics.fmean(differences),
        "difference_stderr": standard_error(differences),
        "higher_is_better": part["higher_is_better"],
        "kept": part["kept"],
    }


def standard_error(values: Sequence[float]) -> float | None:
    """None for a single value, which does not say."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def show(screen: Console, title: str, found: Sequence[dict[str, Any]]) -> None:
    show_table(screen, score_table(title, found))
    if any(part["task"].startswith(LOSS) for part in found[0]["results"]):
        screen.print(LOSS_NOTE)
    for part in found[0]["results"]:
        if part["higher_is_better"] and part["score"] == 0:
            screen.print(
                f"{part['task']} at {part['length']:,} tokens: the model never answers, so it says "
                "nothing about settings."
            )


def score_table(title: str, found: Sequence[dict[str, Any]]) -> Table:
    """The settings of a task and length below each other."""
    scores = table(
        title, "task", "tokens", "of", "setting", "score", "+-", "difference", "+-", "kept"
    )
    for place, part in enumerate(found[0]["results"]):
        for first, entry in zip((True, *[False] * len(found)), found, strict=False):
            result = entry["results"][place]
            asked = [part["task"], f"{part['length']:,}", str(part["documents"])]
            scores.add_row(
                *(asked if first else [""] * len(asked)),
                entry["name"],
                f"{result['score']:.3f}",
                shown(result["stderr"]),
                "" if first else f"{result['difference']:+.3f}",
                "" if first else shown(result["difference_stderr"]),
                shown(result["kept"]),
            )
    return scores


def shown(number: float | None) -> str:
    return "-" if number is None else f"{number:.3f}"


def unpruned(settings: Sequence[Setting], results: Results) -> Iterator[str]:
    """A sentence for each setting that should prune and skipped nothing."""
    for setting in settings:
        if setting.name not in results or not setting.config.prunes:
            continue
        kept = [part["kept"] for part in results[setting.name]["parts"]]
        counted = [fraction for fraction in kept if fraction is not None]
        if not counted:
            yield (
                f"{setting.name} pruned nothing: no task decoded behind a prompt of min_context = "
                f"{setting.config.min_context:,} tokens. Take tasks that generate, or --lengths."
            )
        elif min(counted) == 1:
            yield (
                f"{setting.name} skipped nothing: it kept every block, so its scores say nothing "
                "about pruning. Give longer prompts (--lengths), or a setting that keeps less."
            )

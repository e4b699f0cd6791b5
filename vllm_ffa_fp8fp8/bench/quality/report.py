"""What `quality` found, as JSON data and as tables."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vllm_ffa_fp8fp8.bench.files import replacing
from vllm_ffa_fp8fp8.bench.quality.plan import FP8_CACHE, Engine, Texts
from vllm_ffa_fp8fp8.bench.report import show_table
from vllm_ffa_fp8fp8.bench.report import table as markdown_table

Text = dict[str, Any]
Entry = dict[str, Any]


@dataclass(frozen=True)
class Judged:
    """A setting's run over all texts, as `judge_texts` returns it."""

    name: str
    options: dict[str, Any] | None
    backend: str
    texts: Sequence[Text]


@dataclass
class Report:
    """A file and a table for each of `lengths`, tokens; None: one for all texts.

    Args:
        head: what all files begin with.
        order: names of settings.
        path: of the file; None: none is written.
    """

    head: dict[str, Any]
    texts: Texts
    last: int
    order: Sequence[str]
    lengths: Sequence[int | None]
    path: Path | None
    judged: dict[str, Judged] = field(default_factory=dict)

    def put(self, engine: Engine, answer: dict[str, Any]) -> None:
        """Takes what `judge_texts` returned. Raises ValueError where it cannot be written."""
        options = {setting.name: setting.options for setting in engine.settings}
        for run, texts in zip(engine.runs, answer["runs"], strict=True):
            name = run["name"]
            self.judged[name] = Judged(name, options.get(name), answer["backend"], texts)
        for length in self.lengths if self.path else ():
            with replacing(self.path_of(length)) as part:
                part.write_text(json.dumps(self.content(length), indent=1) + "\n")

    def path_of(self, length: int | None) -> Path:
        path = self.path
        return path if len(self.lengths) == 1 else path.with_stem(f"{path.stem}-{length}")

    def content(self, length: int | None) -> dict[str, Any]:
        chosen = self.texts.of_length(length)
        sources = [self.texts.sources[n] for n in chosen]
        tokens = [len(self.texts.tokens[n]) for n in chosen]
        others = (FP8_CACHE, *self.order)
        order = [name for name in self.judged if name not in others]  # the default's own runs
        order += others
        judged = [self.judged[name] for name in order if name in self.judged]
        return self.head | {
            "text": ", ".join(sources),
            "tokens": max(tokens),
            "last": self.last,
            "settings": [entry(run, chosen, sources, tokens) for run in judged],
        }

    def show(self, screen: Console) -> None:
        for length in self.lengths:
            content = self.content(length)
            model = Path(self.head["model"]).name
            title = f"{model}, {content['tokens']:,} tokens, the last {self.last} of them"
            screen.line()
            show_table(screen, main_table(content["settings"], title))
            for table in layer_tables(content["settings"]):
                screen.line()
                show_table(screen, table)
            if self.path is not None:
                screen.print(str(self.path_of(length)))


def entry(
    run: Judged, chosen: Sequence[int], sources: Sequence[str], lengths: Sequence[int]
) -> Entry:
    """The setting's part of the file, over the chosen texts, of such sources and tokens."""
    texts = [run.texts[number] for number in chosen]
    parts = [
        {"text": source, "tokens": tokens} | summary([text])
        for source, tokens, text in zip(sources, lengths, texts, strict=True)
    ]
    return {
        "name": run.name,
        "options": run.options,
        "backend": run.backend,
        **summary(texts),
        **by_layer(texts),
        "texts": parts,
    }


def summary(texts: Sequence[Text]) -> dict[str, float]:
    """`kept`: fraction of the blocks; `kl_mean`, `kl_max`: nats; `kl_error`: the mean's standard
    error, tokens taken as independent; `agree`: fraction; `loss`: nats a token; `left`,
    `left_most`: see `left_of`."""
    kl, agrees, loss = np.concatenate([text["figures"] for text in texts]).T
    counts = [layer for text in texts for layer in text["layers"]]
    return {
        "kept": kept_of(counts),
        "kl_mean": float(kl.mean()),
        "kl_error": float(kl.std() / math.sqrt(len(kl))),
        "kl_max": float(kl.max()),
        "agree": float(agrees.mean()),
        "loss": float(loss.mean()),
        "left": left_of(counts),
        "left_most": max((count["most_left_mass"] for count in counts), default=0.0),
    }


def kept_of(counts: Iterable[dict[str, Any]]) -> float:
    """Of all blocks, those of requests below `min_context` among them, which are all read."""
    counts = list(counts)
    short = sum(count["short_blocks"] for count in counts)
    total = sum(count["total_blocks"] for count in counts) + short
    return (sum(count["kept_blocks"] for count in counts) + short) / total if total else 1.0


def left_of(counts: Iterable[dict[str, Any]]) -> float:
    """By share: the share of the softmax that was left to the draw, the mean over query tokens, KV
    heads and layers."""
    counts = list(counts)
    tokens = sum(count["tokens"] for count in counts)
    return sum(count["left_mass"] for count in counts) / tokens if tokens else 0.0


def error_of(counts: Iterable[dict[str, Any]]) -> float:
    """What skipping changed in attention's outputs, 2-norm, relative to them."""
    changed, exact = map(sum, zip(*(count["squares"] for count in counts), strict=True))
    return math.sqrt(changed / exact) if exact else 0.0


FIGURES_BY_LAYER = {"kept": kept_of, "left": left_of, "error": error_of}
TITLES = {
    "kept": "Kept by layer",
    "left": "Left to the draw, by layer: share of the softmax, mean",
    "error": "Error of attention's output by layer: of skipping alone, relative 2-norm",
}


def by_layer(texts: Sequence[Text]) -> dict[str, list[float]]:
    """`layers`, their indices, and `kept_by_layer`, `left_by_layer` and `error_by_layer` in that
    order; empty for another backend, and where they are not measured."""
    layers = list(zip(*(text["layers"] for text in texts), strict=True))
    has_errors = all(count["squares"] for layer in layers for count in layer)
    indices = [counts[0]["layer"] for counts in layers]
    return {"layers": indices} | {
        f"{name}_by_layer": [figure(layer) for layer in layers if has_errors or name != "error"]
        for name, figure in FIGURES_BY_LAYER.items()
    }


def main_table(entries: Sequence[Entry], title: str) -> Table:
    headings = ("kept", "KL, mean", "±", "KL, largest", "same best token", "loss", "over default")
    has_draws = any(found["left"] for found in entries)
    table = markdown_table(title, "setting", *headings, *["left to the draw"] * has_draws)
    for found in entries:
        table.add_row(
            found["name"],
            f"{found['kept']:.3f}",
            f"{found['kl_mean']:.2e}",
            f"{found['kl_error']:.0e}",
            f"{found['kl_max']:.2e}",
            f"{found['agree']:.1%}",
            f"{found['loss']:.4f}",
            f"{found['loss'] - entries[0]['loss']:+.4f}",
            *[f"{found['left']:.3f}"] * has_draws,
        )
    return table


def layer_tables(entries: Sequence[Entry]) -> Iterator[Table]:
    """A row a layer, of the figures that any setting has."""
    for name, title in TITLES.items():
        ours = [found for found in entries if any(found[f"{name}_by_layer"])]
        if not ours:
            continue
        table = markdown_table(title, "layer", *(found["name"] for found in ours))
        rows = zip(*(found[f"{name}_by_layer"] for found in ours), strict=True)
        for layer, figures in zip(ours[0]["layers"], rows, strict=True):
            table.add_row(str(layer), *(f"{figure:.3f}" for figure in figures))
        yield table

"""From which context length decode attention is faster than FlashAttention, as far as measured."""

from dataclasses import dataclass
from pathlib import Path

from vllm_ffa_fp8fp8.bench.cells import FA3_BF16, FA3_FP8, OURS, Cell, Geometry
from vllm_ffa_fp8fp8.bench.published import Published, Source
from vllm_ffa_fp8fp8.bench.store import DECODE

KEPT = 0.1
"""Of the blocks, in the figures that are looked at."""


@dataclass(frozen=True)
class Row:
    """How many times as fast decode attention is as FlashAttention 3 with a bf16 cache, and with
    an fp8 cache, None where that was not timed."""

    batch: int
    tokens: int
    over_bf16: float
    over_fp8: float | None


@dataclass(frozen=True)
class Timed:
    """Rows of one GPU and stack, short contexts first."""

    rows: list[Row]
    geometry: Geometry
    source: Source

    @property
    def first_tokens(self) -> int | None:
        """The shortest context from which on every row is faster."""
        slower = [row.tokens for row in self.rows if row.over_bf16 <= 1]
        faster = [row.tokens for row in self.rows if row.tokens > max(slower, default=0)]
        return min(faster, default=None)


def figures_of(folder: Path, group: int, head_size: int) -> Timed | None:
    """The newest figures of models with so many query heads a KV head, and heads of that size;
    None where nothing was measured."""
    for source in Published(folder).of(DECODE):
        ours = [cell for cell in source.figures if _is_wanted(cell, group, head_size)]
        rows = [row for cell in ours if (row := _row(source, cell)) is not None]
        if rows:
            rows.sort(key=lambda row: (row.tokens, row.batch))
            return Timed(rows, ours[0].shape.geometry, source)
    return None


def _is_wanted(cell: Cell, group: int, head_size: int) -> bool:
    geometry = cell.shape.geometry
    wanted = Cell(cell.shape, OURS, kept=KEPT)
    return cell == wanted and (geometry.group, geometry.head_size) == (group, head_size)


def _row(source: Source, cell: Cell) -> Row | None:
    us = source.figures[cell].us
    bf16, fp8 = (source.figures.get(Cell(cell.shape, peer)) for peer in (FA3_BF16, FA3_FP8))
    if bf16 is None:
        return None
    return Row(cell.shape.batch, cell.shape.seq_len, bf16.us / us, fp8 and fp8.us / us)

"""Launch parameters of the decode kernel, kept as data."""

from dataclasses import dataclass, replace
from functools import lru_cache

from ..runtime import HOPPER_SHARED_MEMORY


@dataclass(frozen=True)
class DecodeTuning:
    """How decode is cut over the GPU; any values give the same result up to rounding.

    Args:
        programs_per_processor: programs that run at a time on a multiprocessor where blocks are
            pruned; sizes the work items.
        dense_programs_per_processor: the same where nothing is.
        waves: how many times in a row, at most, the GPU is filled with work items.
        item_tokens: tokens of a work item, at most, as far as `waves` allow, where blocks are
            pruned: heads keep more or less, and a program that is done early takes the next item.
        share_item_tokens, dense_item_tokens: the same where blocks are drawn, and where nothing is
            pruned.
        min_blocks: work items have at least so many blocks.
        item_overhead: blocks that could be read in the time that an item costs beside its blocks.
        chunk_blocks: blocks that a program scans before it attends to those it keeps; a power of
            two, at most 128.
        scan_tokens: tokens of one step of the scan, for up to 8 query rows a KV head.
        scan_stages, attend_stages, share_stages, dense_stages: pipeline depths of the scan, of the
            attention that starts from its scores, of the one to a list of runs, and of the one
            to every block; the last two read the base.
        code_runs: runs of 4-bit codes whose places a program holds; a power of two, at most 128.
        code_stages: depth of the pipeline that reads them.
        code_parts: programs that share a work item while they read them.
        code_warps, code_registers: warps of such a program, registers of a thread, at most.
        merge_rows: partial results (a query row of an item, 128 elements) that a warp asks for at
            a time in the merge, a power of two.
        num_warps: warps of a program.
        max_registers: registers of a thread, at most; fewer let more programs run at a time.
        score_bytes: about the most memory for scores that the scan hands on.
    """

    programs_per_processor: int = 2
    dense_programs_per_processor: int = 2
    waves: int = 4
    item_tokens: int = 8192
    share_item_tokens: int = 16384
    dense_item_tokens: int = 2048
    min_blocks: int = 4
    item_overhead: int = 6
    chunk_blocks: int = 128
    scan_tokens: int = 256
    scan_stages: int = 3
    attend_stages: int = 3
    share_stages: int = 3
    dense_stages: int = 3
    code_runs: int = 128
    code_stages: int = 3
    code_parts: int = 4
    code_warps: int = 2
    code_registers: int = 128
    merge_rows: int = 16
    num_warps: int = 4
    max_registers: int = 255
    score_bytes: int = 320 << 20


DEFAULT = DecodeTuning()
"""For batches that fill the GPU, and for GPUs that nobody has measured."""

FEW = DecodeTuning(
    dense_programs_per_processor=1, waves=1, min_blocks=2, scan_tokens=128, chunk_blocks=64,
    share_stages=2, code_parts=2,
)
"""For batches that do not: latency counts there, and smaller steps of the scan start sooner."""

FP8_VALUES = replace(DEFAULT, waves=1)
"""Converting them takes longer in more and smaller items, by 2 to 6%."""

FEW_FP8_VALUES = replace(FEW, dense_programs_per_processor=2)
"""While one program converts values, the other reads."""


@dataclass(frozen=True)
class TuningClass:
    """What `tuning` holds for: batches of at most so many requests, values of so many bytes an
    element; None: any."""

    tuning: DecodeTuning
    num_reqs: int | None = None
    value_bytes: int | None = None

    def takes(self, num_reqs: int, value_bytes: int) -> bool:
        few = self.num_reqs is None or num_reqs <= self.num_reqs
        return few and self.value_bytes in (None, value_bytes)


TUNINGS: dict[tuple[int, int], tuple[TuningClass, ...]] = {
    (9, 0): (  # measured on an H200
        TuningClass(FEW_FP8_VALUES, num_reqs=2, value_bytes=1),
        TuningClass(FEW, num_reqs=2),
        TuningClass(FP8_VALUES, value_bytes=1),
        TuningClass(DEFAULT),
    ),
}
"""By compute capability; the first class that takes a batch has its parameters."""

HEAD_SIZE, BLOCK_SIZE = 128, 64
"""What the table was measured with; others have tiles and pipelines of about as many bytes."""

MAX_STAGES = 6

SCRATCH_BYTES = 6144
"""Shared memory of a program beside its pipelines, at most; from compiled kernels."""


@lru_cache
def decode_tuning(
    num_reqs: int,
    head_size: int,
    block_size: int,
    key_bytes: int = 1,
    value_bytes: int = 2,
    capability: tuple[int, int] = (9, 0),
    shared_memory: int = HOPPER_SHARED_MEMORY,
) -> DecodeTuning:
    """The parameters for a batch, a model and a GPU: pipelines as deep as fit the table's number
    of programs, as many programs as fit then.

    Args:
        num_reqs: requests of the batch.
        head_size: elements of a head.
        block_size: tokens that are kept or skipped together.
        key_bytes, value_bytes: of an element of K's base and of V.
        capability: compute capability.
        shared_memory: bytes that a program can have on this GPU.
    """
    classes = TUNINGS.get(capability, (TuningClass(DEFAULT),))
    tuning = next(c.tuning for c in classes if c.takes(num_reqs, value_bytes))
    padded = 1 << (head_size - 1).bit_length()
    scan_tokens = tuning.scan_tokens * HEAD_SIZE // (max(padded, HEAD_SIZE) * key_bytes)
    scan_tile = max(scan_tokens, block_size) * padded * key_bytes
    residual_bytes = 1 if key_bytes == 1 else 0
    row_bytes = padded * (residual_bytes + value_bytes)
    attend_tile = block_size * row_bytes
    dense_tile = block_size * (row_bytes + padded * key_bytes)
    tuned_block = BLOCK_SIZE * HEAD_SIZE
    scan_bytes = tuning.scan_stages * tuning.scan_tokens * HEAD_SIZE
    attend_bytes = tuning.attend_stages * tuned_block * 3
    dense_bytes = tuning.dense_stages * tuned_block * 4
    tuning = replace(
        tuning,
        scan_tokens=scan_tokens,
        scan_stages=_stages(scan_bytes, scan_tile, shared_memory),
        attend_stages=_stages(attend_bytes, attend_tile, shared_memory),
        share_stages=_stages(
            tuning.share_stages * tuned_block * 4, dense_tile, shared_memory
        ),
        dense_stages=_stages(dense_bytes, dense_tile, shared_memory),
    )
    pruned = max(
        tuning.scan_stages * scan_tile,
        tuning.attend_stages * attend_tile,
        tuning.share_stages * dense_tile,
    )
    dense = tuning.dense_stages * dense_tile
    return replace(
        tuning,
        programs_per_processor=min(
            tuning.programs_per_processor, _programs_that_fit(pruned, shared_memory)
        ),
        dense_programs_per_processor=min(
            tuning.dense_programs_per_processor, _programs_that_fit(dense, shared_memory)
        ),
    )


def _stages(tuned_bytes: int, tile: int, shared_memory: int) -> int:
    """As many bytes in flight as in the table, two stages at least where they fit."""
    deepest = min(max(tuned_bytes // tile, 2), MAX_STAGES)
    return next((n for n in range(deepest, 1, -1) if n * tile + SCRATCH_BYTES <= shared_memory), 1)


def _programs_that_fit(pipelines: int, shared_memory: int) -> int:
    return max(1, shared_memory // (pipelines + SCRATCH_BYTES))

"""Launch parameters of the decode kernels, kept as data."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class DecodeTuning:
    """How decode is cut over the GPU; any values give the same result up to rounding.

    Args:
        programs_per_processor: programs that run at a time on a multiprocessor; sizes the work
            items of a batch that fits into one wave.
        waves: how many such waves a long batch may have, for balance.
        min_blocks, max_blocks: work items have at least `min_blocks` blocks, and more than
            `max_blocks` only when the waves are used up.
        chunk_blocks: blocks that a program scans before it attends to those it keeps; at most 32.
        scan_tokens: tokens of one step of the scan.
        scan_stages, attend_stages, dense_stages: pipeline depths of the scan, of the attention
            that starts from its scores, and of the one that reads the base.
        merge_rows, merge_stages: query rows of partial results in one step of the merge, and its
            pipeline depth.
        num_warps: warps of a program.
        max_registers: registers of a thread, at most; fewer let more programs run at a time.
        score_bytes: about the most memory for scores that the scan hands on.
    """

    programs_per_processor: int = 4
    waves: int = 4
    min_blocks: int = 4
    max_blocks: int = 32
    chunk_blocks: int = 32
    scan_tokens: int = 64
    scan_stages: int = 4
    attend_stages: int = 2
    dense_stages: int = 2
    merge_rows: int = 32
    merge_stages: int = 3
    num_warps: int = 4
    max_registers: int = 128
    score_bytes: int = 128 << 20


DEFAULT = DecodeTuning()

HOPPER_SHARED_MEMORY = 232_448
"""Bytes that a program can have on compute capability 9.0."""


def decode_tuning(
    head_size: int,
    block_size: int,
    key_bytes: int = 1,
    shared_memory: int = HOPPER_SHARED_MEMORY,
) -> DecodeTuning:
    """The parameters for a model and a GPU: the default, with as deep pipelines as fit.

    Args:
        head_size: elements of a head.
        block_size: tokens that are kept or skipped together.
        key_bytes: bytes of an element of the key plane: 1 for E4M3, else 2.
        shared_memory: bytes that a program can have on this GPU.
    """
    padded = 1 << (head_size - 1).bit_length()
    block = block_size * padded
    scan_tile = max(DEFAULT.scan_tokens, block_size) * padded * key_bytes
    attend_tile, dense_tile = 3 * block, 4 * block  # residual + V; and the base
    return replace(
        DEFAULT,
        scan_stages=_stages_that_fit(DEFAULT.scan_stages, scan_tile, shared_memory),
        attend_stages=_stages_that_fit(DEFAULT.attend_stages, attend_tile, shared_memory),
        dense_stages=_stages_that_fit(DEFAULT.dense_stages, dense_tile, shared_memory),
    )


def pipeline_bytes(stages: int, tile: int) -> int:
    """An upper bound, from compiled kernels, of the shared memory that a loop of two or more
    stages over tiles of so many bytes takes: a buffer a stage but the last, and some scratch."""
    return (stages - 1) * tile + tile // 4 + 9216


def _stages_that_fit(most: int, tile: int, shared_memory: int) -> int:
    deeper = range(most, 1, -1)
    return next((n for n in deeper if pipeline_bytes(n, tile) <= shared_memory), 1)

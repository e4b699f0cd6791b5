"""Launch parameters of the decode kernels, kept as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeTuning:
    """How decode is cut over the GPU; any values give the same result up to rounding.

    Args:
        programs_per_processor: programs that run at a time on a multiprocessor; sizes the work
            items of a batch that fits into one wave.
        waves: how many such waves a long batch may have, for balance.
        min_blocks, max_blocks: work items have at least `min_blocks` blocks, and more than
            `max_blocks` only when the waves are used up.
        scan_tokens: tokens of one step of the scan.
        scan_stages, attend_stages, dense_stages: pipeline depths of the scan, of the attention
            that starts from its scores, and of the one that reads the base.
        scan_warps, attend_warps: warps of a program.
        overlap_launches: start a kernel while the one before it ends, where the GPU can.
        early_blocks: items of at most so many blocks let the next kernel start as soon as they
            run; in longer ones its waiting programs would be in the way.
        score_bytes: the most memory for scores that the scan hands on; requests beyond it have
            their base read twice.
    """

    programs_per_processor: int = 4
    waves: int = 4
    min_blocks: int = 4
    max_blocks: int = 32
    scan_tokens: int = 128
    scan_stages: int = 3
    scan_warps: int = 4
    attend_stages: int = 3
    dense_stages: int = 2
    attend_warps: int = 4
    overlap_launches: bool = True
    early_blocks: int = 16
    score_bytes: int = 128 << 20


DEFAULT = DecodeTuning()


def decode_tuning(head_size: int) -> DecodeTuning:
    """The parameters for heads of `head_size` elements."""
    return DEFAULT

"""Launch parameters of the projection and rotation kernels, kept as data."""

from dataclasses import dataclass

import torch
import triton

from ..runtime import HOPPER_SHARED_MEMORY

MAX_PROJECTED_TOKENS = 128
"""The largest batch that the projection kernel takes."""


@dataclass(frozen=True)
class RopeWriteTuning:
    """How `rope_and_write` is cut: a program takes `tokens` tokens of `heads` heads, both powers
    of two."""

    tokens: int
    heads: int
    warps: int = 4


def rope_write_tuning(num_tokens: int, batch_invariant: bool = False) -> RopeWriteTuning:
    """Few tokens: a program a head or four, so that the work spreads; many: wide rows.

    `batch_invariant`: the same for any number, since the cut decides in which order a norm sums.
    """
    if batch_invariant or num_tokens <= 64:
        return RopeWriteTuning(tokens=1, heads=4)
    return RopeWriteTuning(tokens=2, heads=8)


HIDDEN_BLOCK = 64
MAX_SPLITS = 32


@dataclass(frozen=True)
class ProjectionTuning:
    """How `project_rope_and_write` is cut; any values give the same result up to rounding.

    Args:
        splits: programs that share a head, each with a part of the hidden size.
        hidden_block: elements of the hidden size that a program takes at a time, a power of two.
        stages: depth of the pipeline of weight loads, as far as `shared_memory` allows.
        warps: warps of a program.
        finish_rows: the most tokens that the last program of a head finishes at a time, a power
            of two.
        shared_memory: bytes that a program can have on this GPU.
    """

    splits: int
    hidden_block: int = HIDDEN_BLOCK
    stages: int = 4
    warps: int = 4
    finish_rows: int = 16
    shared_memory: int = HOPPER_SHARED_MEMORY

    def launch(self, num_tokens: int, head_size: int) -> dict[str, int]:
        """The constexpr arguments and options of a launch."""
        padded_tokens = max(16, triton.next_power_of_2(num_tokens))
        padded_head = triton.next_power_of_2(head_size)
        stage = (padded_tokens + padded_head) * self.hidden_block * 2  # 16-bit elements
        # so many sums do not fit the registers of fewer warps
        wide = padded_tokens * padded_head > 8192
        return {
            "SPLITS": self.splits,
            "TOKENS": padded_tokens,
            "HIDDEN_BLOCK": self.hidden_block,
            "FINISH_ROWS": min(self.finish_rows, triton.next_power_of_2(num_tokens)),
            "STAGES": max(1, min(self.stages, self.shared_memory // stage)),
            "num_warps": max(self.warps, 8) if wide else self.warps,
        }


PROGRAMS_PER_PROCESSOR = 3
"""Programs that run at a time on a multiprocessor, by the shared memory of their pipelines."""


def projection_tuning(
    num_all_heads: int,
    hidden_size: int,
    num_processors: int = 132,
    shared_memory: int = HOPPER_SHARED_MEMORY,
) -> ProjectionTuning:
    """Splits so that one wave of programs fills the GPU.

    Args:
        num_all_heads: heads of Q, K and V together.
        hidden_size: elements of a hidden state.
        num_processors: multiprocessors of the GPU.
        shared_memory: bytes that a program can have on this GPU.
    """
    slots = num_processors * PROGRAMS_PER_PROCESSOR
    blocks = triton.cdiv(hidden_size, HIDDEN_BLOCK)
    splits = max(1, min(slots // num_all_heads, blocks, MAX_SPLITS))
    return ProjectionTuning(splits, shared_memory=shared_memory)


def projection_tuning_on(
    device: torch.device, num_all_heads: int, hidden_size: int
) -> ProjectionTuning:
    """`projection_tuning` with what the device has."""
    if device.type != "cuda":
        return projection_tuning(num_all_heads, hidden_size)
    properties = torch.cuda.get_device_properties(device)
    return projection_tuning(
        num_all_heads,
        hidden_size,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


PROJECTED_BATCHES = ((4096, 4), (None, 16))
"""Up to which hidden size (None: any) the projection kernel is the faster one, and up to how many
tokens; measured on an H200 with 4,096 and 8,192."""


def largest_projected_batch(hidden_size: int) -> int:
    """The most tokens for which `fused_kproj: auto` takes the projection kernel; beyond them the
    linear layer and `rope_and_write` are faster.

    Args:
        hidden_size: elements of a hidden state.
    """
    return next(n for most, n in PROJECTED_BATCHES if most is None or hidden_size <= most)

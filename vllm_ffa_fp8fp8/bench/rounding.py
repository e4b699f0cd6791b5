"""By how much a kernel's scores are off: Hopper adds E4M3 products to 14 bits of the largest."""

import math

import torch

from vllm_ffa_fp8fp8.bench.inputs import Inputs

LOG2_E = math.log2(math.e)
SCORE_ROUNDING, MOST_SCORE_ROUNDING = 2.0**-11, 2.0**-9
"""In the root mean square and at most, as a fraction of the sum of the products' sizes."""
LEAST_SCORE_ROUNDING = 1e-3
"""The same in log2 units, at least."""


def most_rounding(inputs: Inputs, scale: float, requests: int) -> float:
    """The most by which a score of the first requests is off, log2 units. `scale`: on q . k."""
    pages = inputs.block_table[:requests].long()
    key = inputs.key[pages].flatten(1, 2).abs()  # [requests, tokens, num_kv_heads, head_size]
    query = inputs.query[:requests].abs().unflatten(1, (key.shape[2], -1))
    size = torch.einsum("rhgd,rthd->rhgt", query.float(), key.float()).max().item()
    return size * scale * LOG2_E * MOST_SCORE_ROUNDING + LEAST_SCORE_ROUNDING

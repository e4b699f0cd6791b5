"""How long it takes to read the FP8 base alone: as decode's scan reads it, without the rest.

What decode takes beyond this is its own; what this takes beyond the floor is the memory's.
"""

import torch
import triton
import triton.language as tl

from vllm_ffa_fp8fp8.bench.cells import Shape
from vllm_ffa_fp8fp8.bench.decoder import CheckFailed, Decoder
from vllm_ffa_fp8fp8.bench.inputs import Inputs
from vllm_ffa_fp8fp8.bench.timing import time_graph
from vllm_ffa_fp8fp8.kernels.cache.page_layout import KVPlanes
from vllm_ffa_fp8fp8.kernels.cache.paged_cache import paged_plane, plane_of_head, row_tile
from vllm_ffa_fp8fp8.kernels.cache.paged_rows import block_shape, load_places, tile_pointers
from vllm_ffa_fp8fp8.kernels.decode.plan import load_item

CHUNK_BLOCKS = 128


@triton.jit
def _base_read_kernel(
    sums_ptr,
    work_ptr,
    key,
    block_table_ptr,
    block_table_stride,
    KEY_STRIDE: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    ROW_WORDS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK_BLOCKS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: a work item and KV head of `decode_kernel`; adds up its words of 32 bits."""
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    request, index, num_items, seq_len = load_item(work_ptr, item)
    num_items = tl.maximum(num_items, 1)
    BLOCK_SIZE: tl.constexpr = BLOCK.BLOCK_SIZE
    TILE: tl.constexpr = TILE_BLOCKS * BLOCK_SIZE
    tokens = tl.arange(0, TILE)
    columns = tl.arange(0, ROW_WORDS_PADDED)
    sums = tl.zeros([TILE, ROW_WORDS_PADDED], tl.int32)
    num_blocks = tl.where(request < 0, 0, (seq_len + BLOCK_SIZE - 1) // BLOCK_SIZE)
    row_ptr = block_table_ptr + request.to(tl.int64) * block_table_stride
    key = plane_of_head(key, kv_head.to(tl.int64))
    for chunk in range(index, num_blocks, CHUNK_BLOCKS * num_items):
        places = load_places(row_ptr, chunk, num_items, seq_len, BLOCK, CHUNK_BLOCKS)
        count = tl.minimum((num_blocks - chunk + num_items - 1) // num_items, CHUNK_BLOCKS)
        for first in tl.range(0, count, TILE_BLOCKS, num_stages=STAGES):
            rows = tile_pointers(key, places, first, tokens, KEY_STRIDE, BLOCK, TILE)
            exists = (first + tokens // BLOCK_SIZE < count)[:, None] & (columns < ROW_WORDS)
            sums += tl.load(row_tile(rows, columns), mask=exists, other=0)
    tl.store(sums_ptr + item * tl.num_programs(0) + kv_head, tl.sum(sums))


def time_base_read(shape: Shape, sets: list[Inputs], planes: list[KVPlanes]) -> float:
    """Microseconds of one launch. Raises CheckFailed where it does not read everything."""
    decoder = Decoder(shape, True, {}, str(sets[0].query.device))
    work, limits = decoder.plan.work, decoder.plan.limits
    heads = shape.geometry.num_kv_heads
    sums = torch.zeros(len(work), heads, dtype=torch.int32, device=work.device)
    keys = [p.key.view(torch.int32) for p in planes]

    def launch(inputs: Inputs, key: torch.Tensor) -> None:
        _base_read_kernel[(heads, decoder.plan.num_items)](
            sums, work, paged_plane(key), inputs.block_table, inputs.block_table.stride(0),
            KEY_STRIDE=key.stride(2),
            ROW_WORDS=key.shape[3],
            ROW_WORDS_PADDED=triton.next_power_of_2(key.shape[3]),
            BLOCK=block_shape(limits.block_size, limits.block_size),
            CHUNK_BLOCKS=CHUNK_BLOCKS,
            TILE_BLOCKS=limits.tile_blocks(shape.batch),
            STAGES=limits.tuning_of(shape.batch).scan_stages,
        )  # fmt: skip

    launch(sets[0], keys[0])
    read, stored = (int(t.sum(dtype=torch.int64)) % (1 << 32) for t in (sums, keys[0]))
    if read != stored:
        raise CheckFailed(f"{shape}: the words of the base add up to {stored}, not to {read}")
    return time_graph(
        [lambda i=inputs, k=key: launch(i, k) for inputs, key in zip(sets, keys, strict=True)]
    )

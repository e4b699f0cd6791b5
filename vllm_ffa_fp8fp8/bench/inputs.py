"""Decode batches with a planted fraction of hot blocks."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_ffa_fp8fp8.bench.cells import NEWEST, SPREAD, UNEVEN, Shape
from vllm_ffa_fp8fp8.kernels.cache.key_codes import encode_keys
from vllm_ffa_fp8fp8.kernels.cache.kv_write import write_kv
from vllm_ffa_fp8fp8.kernels.cache.page_layout import KVPlanes, PageLayout

L2_BYTES = 160e6  # the bases of all sets exceed the L2 cache, so that no replay finds them there
MOST_SETS = 48
DELTA = 5.0
"""log2 units; hot tokens score about 16 at head size 128, all others below 3."""


@dataclass
class Inputs:
    """One launch's inputs, as FlashAttention takes them."""

    query: torch.Tensor  # [batch, num_heads, head_size]
    key: torch.Tensor  # [num_pages, page_size, num_kv_heads, head_size]
    value: torch.Tensor  # like `key`
    block_table: torch.Tensor  # int32 [batch, pages]
    seq_lens: torch.Tensor  # int32 [batch]
    num_kept: int | None  # blocks to keep, of all requests and KV heads, where that is known

    @cached_property
    def newest(self) -> "NewestTokens":
        page_size = self.key.shape[1]
        last = self.seq_lens.long() - 1
        pages = self.block_table.gather(1, (last // page_size)[:, None])[:, 0].long()
        rows = last % page_size
        slots = pages * page_size + rows
        return NewestTokens(self.key[pages, rows], self.value[pages, rows], slots)


@dataclass
class NewestTokens:
    """The last token of every request, as a layer writes it to the cache."""

    key: torch.Tensor  # [batch, num_kv_heads, head_size]
    value: torch.Tensor  # like `key`
    slot_mapping: torch.Tensor  # int64 [batch]


def num_sets(shape: Shape) -> int:
    """How many sets of inputs together exceed the L2 cache."""
    return max(1, min(MOST_SETS, round(L2_BYTES / shape.floor_bytes(0))))


def make_inputs(
    shape: Shape, kept: float, seed: int, device: str = "cuda", hot: str = SPREAD
) -> Inputs:
    """Random keys of small scores; the first token and one token in each hot block score high.

    With `DELTA` exactly `shape.kept_blocks(kept)` blocks of a request and KV head are kept (that is
    their mean where `hot` is uneven, up to `kept` 0.5): the first, the last and the hot ones, since
    all query heads of a group share a direction that only those tokens point to. `hot`: where these
    blocks are, see `HOT`.
    """
    geometry, dtype = shape.geometry, torch.bfloat16
    num_kv_heads, head_size = geometry.num_kv_heads, geometry.head_size
    generator = torch.Generator(device).manual_seed(seed)
    options = {"generator": generator, "device": device}
    num_pages = shape.batch * shape.pages
    size = (num_pages, geometry.page_size, num_kv_heads, head_size)
    key = torch.randn(size, **options, dtype=dtype).mul_(0.3)
    value = torch.randn(size, **options, dtype=dtype)
    order = torch.randperm(num_pages, **options).to(torch.int32)
    block_table = order.view(shape.batch, shape.pages)

    direction = torch.randn(shape.batch, num_kv_heads, head_size, **options)
    direction *= math.sqrt(head_size) / direction.norm(dim=-1, keepdim=True)
    rank = torch.rand(shape.batch, num_kv_heads, shape.pages, **options)
    if hot == NEWEST:
        rank = torch.linspace(1, 0, shape.pages, device=device).expand_as(rank).clone()
    rank[..., -1] = 2.0  # kept without being hot
    rank[..., 0] = -1.0
    blocks = torch.full((shape.batch, num_kv_heads), shape.kept_blocks(kept), device=device)
    if hot == UNEVEN:
        order = torch.rand(blocks.shape, **options).argsort(dim=-1).argsort(dim=-1)
        blocks.fill_(shape.kept_blocks(2 * kept))[2 * order >= num_kv_heads] = shape.kept_blocks(0)
    is_hot = rank.argsort(dim=-1).argsort(dim=-1) < blocks[..., None] - 1
    is_hot[..., 0] = True
    request, head, page = is_hot.nonzero(as_tuple=True)
    row = torch.randint(0, geometry.page_size, page.shape, **options)
    row[page == 0] = 0
    key[block_table[request, page].long(), row, head] = direction[request, head].to(dtype)

    query = direction.repeat_interleave(geometry.group, dim=1)
    query = (query + 0.3 * torch.randn(query.shape, **options)).to(dtype)
    seq_lens = torch.full((shape.batch,), shape.seq_len, dtype=torch.int32, device=device)
    return Inputs(query, key, value, block_table, seq_lens, int(blocks.sum()))


def write_cache(
    inputs: Inputs, value_dtype: str, residual: bool = True, key_code: bool = False
) -> KVPlanes:
    """The keys and values in our cache, V in `value_dtype`: auto or fp8; with `key_code` keys in 4
    bits, too."""
    num_pages, page_size, num_kv_heads, head_size = inputs.key.shape
    layout = PageLayout(
        head_size, inputs.key.dtype, residual=residual, fp8_value=value_dtype == "fp8",
        key_code=key_code,
    )  # fmt: skip
    device = inputs.key.device
    cache = torch.empty(
        (num_pages, num_kv_heads, page_size, layout.bytes_per_token),
        dtype=torch.uint8, device=device,
    )  # fmt: skip
    planes = layout.split(cache)
    slots = torch.arange(num_pages * page_size, device=device)
    for begin in range(0, len(slots), 1 << 20):
        tokens = slice(begin, begin + (1 << 20))
        write_kv(
            inputs.key.flatten(0, 1)[tokens], inputs.value.flatten(0, 1)[tokens], planes,
            slots[tokens],
        )  # fmt: skip
    num_reqs, seq_len = len(inputs.seq_lens), int(inputs.seq_lens.max())
    lengths = torch.arange(num_reqs + 1, dtype=torch.int32, device=device) * seq_len
    encode_keys(planes, inputs.block_table, lengths, lengths, seq_len, behind=0)
    return planes

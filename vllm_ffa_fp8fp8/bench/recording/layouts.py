"""The same queries, keys and values as they are recorded, dense, and in pages."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vllm_ffa_fp8fp8.bench.recording.store import RecordedRequest
from vllm_ffa_fp8fp8.kernels.cache.kv_write import write_kv
from vllm_ffa_fp8fp8.kernels.cache.page_layout import KVPlanes, PageLayout
from vllm_ffa_fp8fp8.kernels.cache_reference import gather_kv_reference, write_kv_reference

FIRST_TOKENS = 64
"""Of a context that is cut: these stay, among them what models use as a sink."""
WRITTEN_TOKENS = 1 << 20


class Dense(NamedTuple):
    """Decode steps of one length, in the layout of `attn_forward_decode_fp8fp8`."""

    query: torch.Tensor  # [batch, 1, num_heads, head_size]
    key: torch.Tensor  # [batch, seq_len, num_kv_heads, head_size]
    value: torch.Tensor  # like `key`


def decode_step(request: RecordedRequest, step: int, length: int | None = None) -> Dense:
    """One decode step and the tokens that it saw, a batch of one.

    With `length` the context is cut to so many tokens: the first FIRST_TOKENS and the newest.
    Raises ValueError where there are fewer, or no such step.
    """
    if not 0 <= step < request.steps:
        raise ValueError(f"there are decode steps 0 to {request.steps - 1}, not {step}")
    seen = request.prompt_tokens + 1 + step
    length = seen if length is None else length
    if not 0 < length <= seen:
        raise ValueError(f"a context of {seen:,} tokens cannot be cut to {length:,}")
    first = min(FIRST_TOKENS, length // 2)
    newest = slice(seen - (length - first), seen)
    key, value = (
        torch.cat([rows[:first], rows[newest]])[None] if length < seen else rows[:seen][None]
        for rows in (request.key, request.value)
    )
    return Dense(request.query[step][None, None], key, value)


def stack(steps: Sequence[Dense]) -> Dense:
    """Steps of one length as one batch."""
    return Dense(*(torch.cat(tensors) for tensors in zip(*steps, strict=True)))


def as_requests(steps: Dense) -> list[RecordedRequest]:
    """A request of one decode step for each row of the batch: `decode_step` backwards."""
    return [
        RecordedRequest(query, key, value, None) for query, key, value in zip(*steps, strict=True)
    ]


def shuffled_table(batch: int, seq_len: int, page_size: int, seed: int, device) -> torch.Tensor:
    """A block table, int32 `[batch, pages]`, that names every page once in random order."""
    pages = -(-seq_len // page_size)
    generator = torch.Generator(device).manual_seed(seed)
    order = torch.randperm(batch * pages, generator=generator, device=device)
    return order.to(torch.int32).view(batch, pages)


def slots_of(block_table: torch.Tensor, seq_len: int, page_size: int) -> torch.Tensor:
    """Where each token lies in the pages, int64 `[batch, seq_len]`."""
    tokens = torch.arange(seq_len, device=block_table.device)
    return block_table.long()[:, tokens // page_size] * page_size + tokens % page_size


def to_pages(rows: torch.Tensor, block_table: torch.Tensor, page_size: int) -> torch.Tensor:
    """Keys or values `[batch, seq_len, num_kv_heads, head_size]` in pages `[num_pages, page_size,
    num_kv_heads, head_size]`, as FlashAttention takes them; rows beyond `seq_len` are zero."""
    slots = slots_of(block_table, rows.shape[1], page_size)
    pages = rows.new_zeros(block_table.numel() * page_size, *rows.shape[2:])
    pages[slots.flatten()] = rows.flatten(0, 1)
    return pages.unflatten(0, (-1, page_size))


def from_pages(pages: torch.Tensor, block_table: torch.Tensor, seq_len: int) -> torch.Tensor:
    """`to_pages` backwards."""
    return pages.flatten(0, 1)[slots_of(block_table, seq_len, pages.shape[1])]


def to_planes(key: torch.Tensor, value: torch.Tensor, layout: PageLayout) -> KVPlanes:
    """Keys and values in pages, `to_pages`, as they lie in our cache: written there by the kernel
    on a GPU and by its oracle on the CPU."""
    num_pages, page_size, num_kv_heads, _ = key.shape
    size = (num_pages, num_kv_heads, page_size, layout.bytes_per_token)
    planes = layout.split(torch.empty(size, dtype=torch.uint8, device=key.device))
    write = write_kv if key.is_cuda else write_kv_reference
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    slots = torch.arange(len(key), device=key.device)
    for tokens in slots.split(WRITTEN_TOKENS):
        write(key[tokens[0] : tokens[-1] + 1], value[tokens[0] : tokens[-1] + 1], planes, tokens)
    return planes


def from_planes(
    planes: KVPlanes, block_table: torch.Tensor, seq_len: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[batch, seq_len, num_kv_heads, head_size]` from our cache, in `dtype`: what
    went into `to_pages` and `to_planes`, up to what the cache's format rounds."""
    rows = (gather_kv_reference(planes, table, seq_len, dtype) for table in block_table)
    key, value = (torch.stack(tensors) for tensors in zip(*rows, strict=True))
    return key, value

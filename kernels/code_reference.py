"""PyTorch oracle of keys in 4 bits; the CPU path runs on it, too."""

import torch

from .cache.page_layout import CODE_TOKENS, KVPlanes
from .cache_reference import gather_kv_reference


def codes_of_keys_reference(
    key: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, 0 to 15, of runs of keys, float32 `[..., CODE_TOKENS, head_size]`, and each channel's
    step and offset, float16 `[..., head_size]`: see `encode_words`."""
    low, high = key.amin(-2), key.amax(-2)
    step = ((high - low) * (1.0 / 15.0)).half()
    offset = (low - 16.0 * step.float()).half()
    is_held = (key.abs() <= 65504).all(-2) & offset.isfinite()
    inverse = torch.where(step > 0, 1 / step.float(), 0)
    code = (key - offset[..., None, :].float()).double() * inverse[..., None, :].double() - 15.5
    code = code.float().floor().clamp(0, 15).masked_fill(~is_held[..., None, :], 0)
    return code.to(torch.int32), step, offset.masked_fill(~is_held, torch.nan)


def encode_run_reference(planes: KVPlanes, page: int, run: int, key: torch.Tensor) -> None:
    """Writes the codes of run `run` of `page`, whose keys are `key`, float32 `[CODE_TOKENS,
    num_kv_heads, head_size]`."""
    code, step, offset = codes_of_keys_reference(key.transpose(0, 1).float())
    parts = code.unflatten(-1, (4, -1)).unbind(-2)
    words = sum(part << 4 * place for place, part in enumerate(parts))
    tokens = slice(run * CODE_TOKENS, (run + 1) * CODE_TOKENS)
    planes.key_code[page, :, tokens] = words.to(torch.int16)
    planes.code_range[page, :, run] = torch.cat([step, offset], dim=-1)


def encode_keys_reference(
    planes: KVPlanes, block_table_row: torch.Tensor, first_token: int, seq_len: int
) -> None:
    """Writes the codes of a request's complete runs of CODE_TOKENS keys, from the one that holds
    `first_token` on."""
    first = first_token // CODE_TOKENS
    end = seq_len // CODE_TOKENS
    if planes.key_code is None or first >= end:
        return
    runs = planes.page_size // CODE_TOKENS
    pages = block_table_row[first // runs : -(-end // runs)]
    skipped = first // runs * runs  # runs of the pages before
    key, _ = gather_kv_reference(planes, pages, (end - skipped) * CODE_TOKENS, torch.float32)
    for run in range(first, end):
        tokens = slice((run - skipped) * CODE_TOKENS, (run - skipped + 1) * CODE_TOKENS)
        encode_run_reference(planes, int(block_table_row[run // runs]), run % runs, key[tokens])


def decode_codes_reference(
    words: torch.Tensor, ranges: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The keys, `[..., tokens, head_size]`, of `words`, int16 `[..., tokens, head_size / 4]`, and
    of `ranges`, float16 `[..., tokens / CODE_TOKENS, 2 * head_size]`; rounded to float16 as those
    are that the scan multiplies."""
    code = torch.cat([words.int() >> 4 * place & 15 for place in range(4)], dim=-1)
    step, offset = ranges.float().repeat_interleave(CODE_TOKENS, dim=-2).chunk(2, dim=-1)
    return ((16 + code) * step + offset).half().to(dtype)


def num_coded_tokens(seq_len: int, query_len: int, code_lag: int) -> int:
    """How many of a request's tokens a step scans by their codes."""
    return max(seq_len - query_len + 1 - code_lag, 0) // CODE_TOKENS * CODE_TOKENS

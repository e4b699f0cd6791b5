"""PyTorch oracles of the cache's format: split, cache write and gather. They share no code with the
kernels; the CPU path runs on those of write and gather."""

import torch

from .cache.page_layout import RESIDUAL_SCALE, KVPlanes


def widen(key: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`key.to(dtype)`, except that an E4M3 NaN, which no finite key is stored as, becomes 480.

    PyTorch's own conversion from E4M3 is slow on the CPU. Its bits, moved to where float16 has
    sign, exponent and mantissa, are a number 2^8 times smaller.
    """
    if key.dtype != torch.float8_e4m3fn:
        return key.to(dtype)
    bits = key.view(torch.int8).to(torch.int16) << 7  # the sign stands in bits 15 and 14
    return (bits & ~0x4000).view(torch.float16).to(dtype) * 256


def power_of_two(exponent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`2^(exponent - 127)`: the exponents are E8M0."""
    return exponent.view(torch.float8_e8m0fnu).to(dtype)


def _scale_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows`, float32, times a power of two that brings each row's largest element into
    [2^7, 2^8), and the exponents that undo it, uint8 `[..., 1]`."""
    rows = rows.float()
    largest = rows.abs().amax(-1, keepdim=True)
    _, exponent = torch.frexp(largest)  # largest in [2^(e-1), 2^e)
    exponent = torch.where(largest > 0, exponent - 8, -126).clamp(min=-126)
    exponent = (exponent + 127).to(torch.uint8)
    return rows / power_of_two(exponent, torch.float32), exponent


def split_key_reference(
    key: torch.Tensor, residual_scale: float = RESIDUAL_SCALE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Base and residual, E4M3 `[..., head_size]`, and exponent, uint8 `[..., 1]`, of `key`."""
    scaled, exponent = _scale_rows(key)
    base = scaled.to(torch.float8_e4m3fn)
    residual = (scaled - widen(base, torch.float32)) * residual_scale
    return base, residual.to(torch.float8_e4m3fn), exponent


def join_key_reference(
    base: torch.Tensor,
    residual: torch.Tensor | None,
    exponent: torch.Tensor | None,
    residual_scale: float = RESIDUAL_SCALE,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The key that base, residual and exponent stand for, in `dtype`."""
    key = widen(base, dtype)
    if residual is not None:
        key = key + widen(residual, dtype) / residual_scale
    if exponent is not None:
        key = key * power_of_two(exponent, dtype)
    return key


def round_value_reference(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 `[..., head_size]` and exponent, uint8 `[..., 1]`, of `value`."""
    scaled, exponent = _scale_rows(value)
    return scaled.to(torch.float8_e4m3fn), exponent


def join_value_reference(
    value: torch.Tensor, exponent: torch.Tensor | None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The value that the rows of its planes stand for, in `dtype`."""
    value = widen(value, dtype)
    return value if exponent is None else value * power_of_two(exponent, dtype)


def write_kv_reference(
    key: torch.Tensor, value: torch.Tensor, planes: KVPlanes, slot_mapping: torch.Tensor
) -> None:
    """`write_kv` in PyTorch."""
    slots = slot_mapping.long()
    rows = (slots >= 0).nonzero().squeeze(1)
    slots = slots[rows]
    page, offset = slots // planes.page_size, slots % planes.page_size
    key, value = key[rows], value[rows]  # [rows, num_kv_heads, head_size]
    if planes.value_exponent is not None:
        value, exponent = round_value_reference(value)
        planes.value_exponent[page, :, offset] = exponent
    planes.value[page, :, offset] = value
    if planes.key_exponent is None:
        planes.key[page, :, offset] = key
        return
    base, residual, exponent = split_key_reference(key, planes.residual_scale)
    planes.key[page, :, offset] = base
    planes.key_exponent[page, :, offset] = exponent
    if planes.key_residual is not None:
        planes.key_residual[page, :, offset] = residual


def tokens_of(plane: torch.Tensor | None, pages: torch.Tensor, seq_len: int) -> torch.Tensor | None:
    """A request's rows of a plane, `[num_kv_heads, seq_len, width]`."""
    if plane is None:
        return None
    return plane[pages.long()].transpose(0, 1).flatten(1, 2)[:, :seq_len]


def gather_kv_reference(
    planes: KVPlanes,
    block_table_row: torch.Tensor,
    seq_len: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One request's first `seq_len` keys and values, `[seq_len, num_kv_heads, head_size]`."""
    pages = block_table_row[: -(-seq_len // planes.page_size)]
    key = join_key_reference(
        tokens_of(planes.key, pages, seq_len),
        tokens_of(planes.key_residual, pages, seq_len),
        tokens_of(planes.key_exponent, pages, seq_len),
        planes.residual_scale,
    )
    value = join_value_reference(
        tokens_of(planes.value, pages, seq_len), tokens_of(planes.value_exponent, pages, seq_len)
    )
    return key.transpose(0, 1).to(dtype), value.transpose(0, 1).to(dtype)

"""PyTorch oracles of the projection and rotation kernels; the CPU path runs on that of rotation."""

import torch
import torch.nn.functional as F

from ..cache.page_layout import KVPlanes
from ..cache_reference import write_kv_reference
from .qkv_heads import QKVHeads


def rotate_reference(
    x: torch.Tensor,
    positions: torch.Tensor,
    heads: QKVHeads,
    norm: torch.Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Norm and rotation of `x`, `[num_tokens, any heads, head_size]`; computed and returned in
    `dtype`."""
    x = x.to(dtype)
    if norm is not None:
        x = x * (x.square().mean(-1, keepdim=True) + heads.epsilon).rsqrt() * norm.to(dtype)
    cos, sin = heads.cos_sin_cache[positions.long()].to(dtype)[:, None].chunk(2, dim=-1)
    rotary, rest = x.split([heads.rotary_dim, heads.head_size - heads.rotary_dim], dim=-1)
    if heads.is_neox_style:
        first, second = rotary.chunk(2, dim=-1)
    else:
        first, second = rotary[..., ::2], rotary[..., 1::2]
    pair = first * cos - second * sin, second * cos + first * sin
    if heads.is_neox_style:
        rotary = torch.cat(pair, dim=-1)
    else:
        rotary = torch.stack(pair, dim=-1).flatten(-2)
    return torch.cat((rotary, rest), dim=-1)


def rope_and_write_reference(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    heads: QKVHeads,
    planes: KVPlanes | None,
    slot_mapping: torch.Tensor | None,
    rotated: torch.Tensor,
) -> None:
    """`rope_and_write` in PyTorch."""
    sizes = [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads]
    query, key, value = qkv.unflatten(-1, (-1, heads.head_size)).split(sizes, dim=1)
    query = rotate_reference(query, positions, heads, heads.query_norm)
    key = rotate_reference(key, positions, heads, heads.key_norm).to(qkv.dtype)
    if planes is not None and slot_mapping is not None:
        num_slots = slot_mapping.shape[0]
        write_kv_reference(key[:num_slots], value[:num_slots], planes, slot_mapping)
    size = heads.query_size + heads.key_value_size
    rotated[:, :size] = torch.cat((query.to(qkv.dtype), key), dim=1).flatten(1)


def project_rope_and_write_reference(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    positions: torch.Tensor,
    heads: QKVHeads,
    planes: KVPlanes | None,
    slot_mapping: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """`project_rope_and_write` in PyTorch, with the projection rounded to the model's dtype as a
    linear layer does."""
    qkv = F.linear(hidden_states, weight, bias)
    rope_and_write_reference(qkv, positions, heads, planes, slot_mapping, qkv)
    output.copy_(qkv)

"""Triton kernels of FFA_FP8FP8 and their PyTorch oracles (`reference`). No vLLM in here."""

from .cache.key_codes import encode_keys
from .cache.kv_gather import gather_kv
from .cache.kv_write import write_kv
from .cache.page_layout import KVPlanes, PageLayout
from .decode.attention import decode_attention
from .decode.dense import attn_forward_decode_fp8fp8
from .decode.limits import DecodeLimits
from .decode.plan import DecodePlan, DecodeScratch
from .projection.project_write import ProjectionScratch, project_rope_and_write
from .projection.qkv_heads import QKVHeads
from .projection.rope_write import rope_and_write

__all__ = [
    "DecodeLimits",
    "DecodePlan",
    "DecodeScratch",
    "KVPlanes",
    "PageLayout",
    "ProjectionScratch",
    "QKVHeads",
    "attn_forward_decode_fp8fp8",
    "decode_attention",
    "encode_keys",
    "gather_kv",
    "project_rope_and_write",
    "rope_and_write",
    "write_kv",
]

"""Triton kernels of FFA_FP8FP8 and their PyTorch oracles (`reference`). No vLLM in here."""

from .decode_attention import decode_attention
from .decode_dense import attn_forward_decode_fp8fp8
from .decode_plan import DecodeLimits, DecodePlan, DecodeScratch
from .kv_gather import gather_kv
from .kv_write import write_kv
from .page_layout import KVPlanes, PageLayout
from .project_write import ProjectionScratch, project_rope_and_write
from .qkv_heads import QKVHeads
from .rope_write import rope_and_write

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
    "gather_kv",
    "project_rope_and_write",
    "rope_and_write",
    "write_kv",
]

"""One attention layer of the CUDA path, metadata builder and kernels included, on the CPU: the
interpreter runs the kernels, and PyTorch stands in for FlashAttention."""

import dataclasses
import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_ffa_fp8fp8.attention.backend import FFAFP8FP8Backend
from vllm_ffa_fp8fp8.attention.cuda_ops import CudaOps
from vllm_ffa_fp8fp8.attention.geometry import page_layout
from vllm_ffa_fp8fp8.attention.impl import FFAFP8FP8Impl
from vllm_ffa_fp8fp8.attention.metadata import FFAFP8FP8MetadataBuilder
from vllm_ffa_fp8fp8.config import FFAConfig
from vllm_ffa_fp8fp8.kernels.counters import new_counters
from vllm_ffa_fp8fp8.kernels.decode.limits import DecodeLimits
from vllm_ffa_fp8fp8.kernels.reference import prefill_attention_reference

HEAD_SIZE = 16
MAX_REQS, MAX_LEN, NUM_PAGES = 8, 192, 48
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """A layer, its options, and how its work is cut. `drafts`: the most a request has."""

    options: dict
    page_size: int
    group: int
    num_kv_heads: int
    dtype: torch.dtype
    drafts: int
    num_processors: int
    min_blocks: int
    chunk_blocks: int
    scan_tokens: int

    @property
    def config(self) -> FFAConfig:
        return FFAConfig.load("exact", self.options)

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group


class InterpretedOps(CudaOps):
    """What handed from program to program is poison at first; outputs are float32, since casts to
    16 bits truncate in the interpreter."""

    def __init__(self, impl: FFAFP8FP8Impl, vllm_config, shape: Shape):
        self.impl, self.vllm_config, self.shape = impl, vllm_config, shape
        self.device, self.dtype = CPU, torch.float32
        self.max_model_len = MAX_LEN
        self.batch_invariant = False

    def compile(self, planes) -> None:
        pass

    def decode_limits(self, block_size: int) -> DecodeLimits:
        shape, limits = self.shape, super().decode_limits(block_size)
        limits = dataclasses.replace(limits, num_processors=shape.num_processors)
        tuning = dataclasses.replace(
            limits.tuning_of(MAX_REQS),
            min_blocks=shape.min_blocks,
            chunk_blocks=shape.chunk_blocks,
            scan_tokens=shape.scan_tokens,
        )
        return dataclasses.replace(limits, tuning=tuning)

    def flash_attention(self, query, key, value, cu_query, cu_seq, max_q, max_s, scale, output):
        """Like FlashAttention on packed requests, causal with the last query at the last key."""
        queries, seqs = cu_query.tolist(), cu_seq.tolist()
        for request in range(len(queries) - 1):
            new = slice(queries[request], queries[request + 1])
            seen = slice(seqs[request], seqs[request + 1])
            rows = (part.float() for part in (query[new], key[seen], value[seen]))
            output[new] = prefill_attention_reference(*rows, scale)

    @staticmethod
    def _workspace(device, *shapes_and_dtypes) -> list[torch.Tensor]:
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes_and_dtypes]
        return [t.fill_(math.nan if t.is_floating_point() else -7) for t in tensors]


def make_layer(shape: Shape) -> tuple[FFAFP8FP8Impl, FFAFP8FP8MetadataBuilder]:
    """An impl as it is after loading, and the builder of its metadata."""
    speculative = None
    if shape.drafts:
        speculative = SimpleNamespace(num_speculative_tokens=shape.drafts)
    impl = object.__new__(FFAFP8FP8Impl)
    layer = SimpleNamespace(impl=impl, get_attn_backend=lambda: FFAFP8FP8Backend)
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=shape.dtype, max_model_len=MAX_LEN),
        cache_config=SimpleNamespace(
            block_size=shape.page_size, user_specified_block_size=True, num_gpu_blocks=NUM_PAGES
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=MAX_REQS),
        speculative_config=speculative,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        compilation_config=SimpleNamespace(static_forward_context={"layers.0": layer}),
    )
    vars(impl).update(
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_size=HEAD_SIZE,
        scale=HEAD_SIZE**-0.5,
        config=shape.config,
        layout=page_layout(HEAD_SIZE, shape.dtype, shape.config),
        ops=InterpretedOps(impl, vllm_config, shape),
        is_dense=False,
        sinks=None,
        logits_soft_cap=None,
        layer_index=0,
        counters=new_counters(shape.num_kv_heads, CPU),
        fused_qkv=None,
    )
    spec = FullAttentionSpec(
        block_size=shape.page_size,
        num_kv_heads=shape.num_kv_heads,
        head_size=HEAD_SIZE,
        dtype=shape.dtype,
    )
    return impl, FFAFP8FP8MetadataBuilder(spec, ["layers.0"], vllm_config, CPU)

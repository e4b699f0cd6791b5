"""One attention layer: writes the cache, then attends for decodes and for prefills."""

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_ffa_fp8fp8.attention.fused_qkv import FusedQKV, fuse
from vllm_ffa_fp8fp8.attention.geometry import page_layout, read_engine_config
from vllm_ffa_fp8fp8.attention.metadata import FFAFP8FP8Metadata
from vllm_ffa_fp8fp8.integration import patches
from vllm_ffa_fp8fp8.integration.refusals import check_impl_arguments
from vllm_ffa_fp8fp8.kernels.cache.page_layout import KVPlanes
from vllm_ffa_fp8fp8.kernels.counters import new_counters


class FFAFP8FP8Impl(AttentionImpl[FFAFP8FP8Metadata]):
    """The same on every platform; `self.ops` does the work with Triton and FlashAttention, or
    with PyTorch on the CPU."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra_impl_args,
    ) -> None:
        check_impl_arguments(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            attn_type=attn_type,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            **extra_impl_args,
        )
        self.sinks: torch.Tensor | None = extra_impl_args.get("sinks")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.logits_soft_cap = logits_soft_cap or None  # vLLM says 0 for none, too
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = None
        self.config = read_engine_config()
        self.vllm_config = vllm_config = get_current_vllm_config()
        self.layout = page_layout(head_size, vllm_config.model_config.dtype, self.config)
        if current_platform.is_cuda():
            from vllm_ffa_fp8fp8.attention.cuda_ops import CudaOps as Ops
        else:
            from vllm_ffa_fp8fp8.attention.cpu_ops import CpuOps as Ops
        self.ops = Ops(self, vllm_config)
        self.is_dense: bool | None = None
        self.layer_index = 0
        self.counters: torch.Tensor | None = None  # of `decode_attention`
        if self.config.counts_blocks:
            device = current_platform.device_type
            with torch.inference_mode(False):  # or they can be changed in it alone
                self.counters = new_counters(self.num_kv_heads, torch.device(device))
        self.fused_qkv: FusedQKV | None = None
        self.attention: torch.nn.Module | None = None  # the module that holds this layer
        self.is_loaded = False
        if self.config.fused_kproj != "off":
            patches.note_attention_modules(type(self))

    def planes(self, kv_cache: torch.Tensor) -> KVPlanes:
        """The planes of `kv_cache`, uint8 `[num_blocks, num_kv_heads, page_size, bytes]`."""
        # with the tensor, since whoever keeps them keeps the cache's memory
        planes = getattr(kv_cache, "ffa_planes", None)
        if planes is None:
            planes = kv_cache.ffa_planes = self.layout.split(kv_cache)
            self.ops.compile(planes)
        return planes

    def planes_to_be(self, page_size: int) -> KVPlanes:
        """The planes of a cache that there is not yet, on the meta device."""
        shape = (1, self.num_kv_heads, page_size, self.layout.bytes_per_token)
        return self.layout.split(torch.empty(shape, dtype=torch.uint8, device="meta"))

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Fuses the attention module's forward, where that can be: only now it is complete."""
        self.register_counters()
        if self.attention is not None and self.config.fused_kproj != "off":
            self.fused_qkv = fuse(self, self.attention, self.vllm_config)
        self.is_loaded = True
        self.ops.compile_early()

    def register_counters(self) -> None:
        """As a buffer of their layer: of what layers have, vLLM's second level of sleep keeps
        nothing else."""
        if self.counters is None:
            return
        for layer in self.vllm_config.compilation_config.static_forward_context.values():
            if getattr(layer, "impl", None) is self:
                layer.register_buffer("ffa_counters", self.counters, persistent=False)

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,  # int64 [<= num_tokens], -1 for padding
    ) -> None:
        self.ops.write(key, value, self.planes(kv_cache), slot_mapping)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        kv_cache: torch.Tensor,
        attn_metadata: FFAFP8FP8Metadata | None,
        output: torch.Tensor,  # [num_tokens, num_heads, head_size]
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.is_dense is None:
            self.layer_index = extract_layer_index(layer.layer_name)
            self.is_dense = self.layer_index in self.config.dense_layers
        if attn_metadata is None:  # the profiling run
            self.ops.reserve_scratch()
            return output.fill_(0)
        planes = self.planes(kv_cache)
        num_decode_tokens = attn_metadata.num_decode_tokens
        if attn_metadata.prefill is not None and planes.key_code is not None and not self.is_dense:
            # before decode, which may share pages with a prefill of the same step
            self.ops.encode(planes, attn_metadata.prefill, attn_metadata.code_lag)
        if num_decode_tokens:
            limit = None if self.is_dense else attn_metadata.limit
            new = slice(num_decode_tokens)
            self.ops.decode(query[new], planes, attn_metadata, limit, output[new])
        if attn_metadata.prefill is not None:
            new = slice(num_decode_tokens, attn_metadata.num_actual_tokens)
            self.ops.prefill(
                query[new], key[new], value[new], planes, attn_metadata.prefill, output[new]
            )
        return output

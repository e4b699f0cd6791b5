"""The layer's work on CUDA: Triton kernels for cache and decode, FlashAttention for prefill."""

import torch
from vllm.v1.worker.workspace import current_workspace_manager

from vllm_ffa_fp8fp8 import envs
from vllm_ffa_fp8fp8.attention import warmup
from vllm_ffa_fp8fp8.attention.geometry import decode_query_len, pruning_block_size
from vllm_ffa_fp8fp8.attention.metadata import FFAFP8FP8Metadata, PrefillBatch
from vllm_ffa_fp8fp8.attention.resources import check_triton_cache, naming_what_to_lower
from vllm_ffa_fp8fp8.integration.compat import load_flash_attention
from vllm_ffa_fp8fp8.kernels.cache.key_codes import encode_keys
from vllm_ffa_fp8fp8.kernels.cache.kv_gather import gather_kv
from vllm_ffa_fp8fp8.kernels.cache.kv_write import write_kv
from vllm_ffa_fp8fp8.kernels.cache.page_layout import KVPlanes
from vllm_ffa_fp8fp8.kernels.decode.attention import decode_attention
from vllm_ffa_fp8fp8.kernels.decode.limits import DecodeLimits
from vllm_ffa_fp8fp8.kernels.decode.plan import DecodePlan, DecodeScratch
from vllm_ffa_fp8fp8.kernels.projection.project_write import (
    ProjectionScratch,
    project_rope_and_write,
)
from vllm_ffa_fp8fp8.kernels.projection.qkv_heads import QKVHeads
from vllm_ffa_fp8fp8.kernels.projection.rope_write import rope_and_write
from vllm_ffa_fp8fp8.kernels.projection.tuning import (
    MAX_PROJECTED_TOKENS,
    ProjectionTuning,
    largest_projected_batch,
    projection_tuning_on,
    rope_write_tuning,
)
from vllm_ffa_fp8fp8.option_values import RULES


class CudaOps:
    """Scratch comes from vLLM's workspace, which all layers share."""

    def __init__(self, impl, vllm_config):
        check_triton_cache()
        self.impl = impl
        self.vllm_config = vllm_config
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.max_model_len = vllm_config.model_config.max_model_len
        self.dtype = vllm_config.model_config.dtype
        self.arrived: torch.Tensor | None = None  # counters of `project_rope_and_write`
        self.projection_tuning: ProjectionTuning | None = None
        self.batch_invariant = envs.batch_invariant()
        self.flash_attention = load_flash_attention(
            impl.head_size, self.batch_invariant, impl.sinks, impl.logits_soft_cap
        )

    def decode_limits(self, block_size: int) -> DecodeLimits:
        impl = self.impl
        return DecodeLimits.on_device(
            self.device,
            num_reqs=self.vllm_config.scheduler_config.max_num_seqs,
            seq_len=self.max_model_len,
            num_heads=impl.num_heads,
            num_kv_heads=impl.num_kv_heads,
            head_size=impl.head_size,
            block_size=block_size,
            query_len=decode_query_len(self.vllm_config),
            batch_invariant=self.batch_invariant,
            rule=impl.config.rule if impl.config.prunes else "none",
            key_dtype=impl.layout.plane("key").dtype,
            value_dtype=impl.layout.plane("value").dtype,
        )

    def make_plan(self, block_size: int) -> DecodePlan:
        return DecodePlan.allocate(self.decode_limits(block_size), self.device)

    def reserve_scratch(self) -> None:
        """Grows the workspace to what any step can need, before vLLM measures and locks it."""
        page_size = self.vllm_config.cache_config.block_size
        limits = self.decode_limits(pruning_block_size(page_size, self.impl.config))
        fused = self.impl.fused_qkv
        with naming_what_to_lower(self.vllm_config):
            self._workspace(self.device, *limits.scratch_shapes)
            self._context(self.max_model_len)
            if fused is not None and (largest := fused.largest_projected_batch):
                self._projection_scratch(largest, fused.heads, fused.hidden_size, self.device)

    def compile_early(self) -> None:
        """Begins to compile what steps will launch, when the last layer is loaded."""
        warmup.compile_early(self.vllm_config)

    def compile(self, planes: KVPlanes) -> None:
        """Compiles what any step can launch on a cache like `planes`."""
        warmup.wait_for_early()
        warmup.compile_kernels(self.impl, planes)

    def write(self, key, value, planes: KVPlanes, slot_mapping: torch.Tensor) -> None:
        write_kv(key, value, planes, slot_mapping)

    def encode(self, planes: KVPlanes, prefill: PrefillBatch, code_lag: int) -> None:
        """Writes the codes of keys that prefills complete."""
        encode_keys(
            planes, prefill.block_table, prefill.query_start_loc, prefill.cu_seq_lens,
            max(prefill.query_lens_host), code_lag,
        )  # fmt: skip

    def largest_projected_batch(self, hidden_size: int) -> int:
        """The most tokens that `project_rope_and_write` is to take."""
        if self.batch_invariant:
            return 0  # larger batches are the linear layer's, which rounds otherwise
        if self.impl.config.fused_kproj == "on":
            return MAX_PROJECTED_TOKENS
        return largest_projected_batch(hidden_size)

    def rope_and_write(self, qkv, positions, heads: QKVHeads, planes, slot_mapping, rotated):
        if planes is None:  # the profiling run, which attends to nothing
            return
        tuning = rope_write_tuning(qkv.shape[0], self.batch_invariant)
        rope_and_write(qkv, positions, heads, planes, slot_mapping, rotated, tuning)

    def project_rope_and_write(
        self,
        hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
        linear: torch.nn.Module,
        positions: torch.Tensor,
        heads: QKVHeads,
        planes: KVPlanes | None,
        slot_mapping: torch.Tensor | None,
        output: torch.Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_size]
    ) -> None:
        if planes is None:  # the profiling run, which attends to nothing
            return
        num_tokens, hidden_size = hidden_states.shape
        scratch = self._projection_scratch(num_tokens, heads, hidden_size, hidden_states.device)
        project_rope_and_write(
            hidden_states, linear.weight, linear.bias, positions, heads, planes, slot_mapping,
            output, scratch, self.projection_tuning,
        )  # fmt: skip

    def decode(
        self,
        query: torch.Tensor,  # [num_decode_tokens, num_heads, head_size]
        planes: KVPlanes,
        metadata: FFAFP8FP8Metadata,
        limit: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        decode_attention(
            query,
            planes,
            metadata.block_table,
            metadata.seq_lens,
            metadata.plan,
            DecodeScratch(*self._workspace(query.device, *metadata.plan.limits.scratch_shapes)),
            output,
            scale=self.impl.scale,
            sinks=self.impl.sinks,
            logits_soft_cap=self.impl.logits_soft_cap,
            layer=self.impl.layer_index,
            **{RULES[self.impl.config.rule]: limit},
            query_start_loc=metadata.query_start_loc,
            query_len=metadata.query_len,
            min_context=self.impl.config.min_context,
            precomputed_threshold=self.impl.config.precomputed_threshold,
            counters=self.impl.counters,
            launch_pdl=True,  # the kernel ahead is the layer's cache write or threshold kernel
        )

    def prefill(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        value: torch.Tensor,
        planes: KVPlanes,
        prefill: PrefillBatch,
        output: torch.Tensor,
    ) -> None:
        """FlashAttention on the new keys, or, if any request has cached ones, on all of them
        gathered from the cache, as many requests at a time as the workspace holds.

        Batch invariant prefills always read the cache, so that neither other requests nor where
        a prompt was cut into steps decides which keys are the rounded ones."""
        starts, query_lens = prefill.query_start_loc_host, prefill.query_lens_host
        if not (prefill.has_context or self.batch_invariant):
            self.flash_attention(
                query, key, value, prefill.query_start_loc, prefill.query_start_loc,
                max(query_lens), max(query_lens), self.impl.scale, output,
            )  # fmt: skip
            return
        for first, end in context_chunks(prefill.seq_lens_host, self.max_model_len):
            tokens = slice(starts[first], starts[end])
            seq_lens = prefill.seq_lens_host[first:end]
            cu_query_lens = prefill.query_start_loc[first : end + 1] - starts[first]
            cu_seq_lens = prefill.cu_seq_lens[first : end + 1] - prefill.cu_seq_lens[first]
            key, value = self._context(sum(seq_lens))
            block_table = prefill.block_table[first:end]
            gather_kv(planes, block_table, cu_seq_lens, max(seq_lens), key, value)
            self.flash_attention(
                query[tokens], key, value, cu_query_lens, cu_seq_lens,
                max(query_lens[first:end]), max(seq_lens), self.impl.scale, output[tokens],
            )  # fmt: skip

    def _projection_scratch(
        self, num_tokens: int, heads: QKVHeads, hidden_size: int, device: torch.device
    ) -> ProjectionScratch:
        num_heads = heads.num_all_heads
        if self.projection_tuning is None:
            self.projection_tuning = projection_tuning_on(self.device, num_heads, hidden_size)
        if self.arrived is None and device == self.device:
            # in the profiling run: no graph may capture its making
            self.arrived = torch.zeros(num_heads, dtype=torch.int32, device=device)
        shape = ProjectionScratch.sums_shape(num_tokens, heads, self.projection_tuning)
        (sums,) = self._workspace(device, (shape, torch.float32))
        arrived = self.arrived
        if device.type == "meta":
            arrived = torch.empty(num_heads, dtype=torch.int32, device=device)
        return ProjectionScratch(sums, arrived)

    def _context(self, num_tokens: int) -> list[torch.Tensor]:
        shape = (num_tokens, self.impl.num_kv_heads, self.impl.head_size)
        return self._workspace(self.device, (shape, self.dtype), (shape, self.dtype))

    @staticmethod
    def _workspace(device: torch.device, *shapes_and_dtypes) -> list[torch.Tensor]:
        """Tensors of the workspace; of no memory on the meta device, for what only compiles."""
        if device.type == "meta":
            return [torch.empty(s, dtype=d, device=device) for s, d in shapes_and_dtypes]
        return current_workspace_manager().get_simultaneous(*shapes_and_dtypes)


def context_chunks(seq_lens: list[int], capacity: int) -> list[tuple[int, int]]:
    """Cuts requests into runs `(first, end)` whose lengths add up to at most `capacity` tokens;
    every request alone fits."""
    chunks, first, total = [], 0, 0
    for index, seq_len in enumerate(seq_lens):
        if total + seq_len > capacity and index > first:
            chunks.append((first, index))
            first, total = index, 0
        total += seq_len
    return [*chunks, (first, len(seq_lens))]

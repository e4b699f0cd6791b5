"""The layer's work on the CPU: the kernels' PyTorch oracles, and SDPA's kernel for prefill."""

from itertools import product

import torch

from vllm_ffa_fp8fp8.attention.metadata import FFAFP8FP8Metadata, PrefillBatch
from vllm_ffa_fp8fp8.kernels.cache.page_layout import KVPlanes
from vllm_ffa_fp8fp8.kernels.cache_reference import gather_kv_reference, write_kv_reference
from vllm_ffa_fp8fp8.kernels.code_reference import encode_keys_reference
from vllm_ffa_fp8fp8.kernels.projection.qkv_heads import QKVHeads
from vllm_ffa_fp8fp8.kernels.projection.reference import rope_and_write_reference
from vllm_ffa_fp8fp8.kernels.reference import decode_attention_reference
from vllm_ffa_fp8fp8.option_values import RULES


class CpuOps:
    def __init__(self, impl, vllm_config):
        self.impl = impl

    def make_plan(self, block_size: int) -> None:
        return None

    def reserve_scratch(self) -> None:
        pass

    def compile_early(self) -> None:
        pass

    def compile(self, planes: KVPlanes) -> None:
        pass

    def write(self, key, value, planes: KVPlanes, slot_mapping: torch.Tensor) -> None:
        write_kv_reference(key, value, planes, slot_mapping)

    def encode(self, planes: KVPlanes, prefill: PrefillBatch, code_lag: int) -> None:
        lengths = zip(prefill.seq_lens_host, prefill.query_lens_host, strict=True)
        for row, (seq_len, query_len) in zip(prefill.block_table, lengths, strict=True):
            encode_keys_reference(planes, row, max(seq_len - query_len - code_lag, 0), seq_len)

    def largest_projected_batch(self, hidden_size: int) -> int:
        """No batch: vLLM's linear layer packs its weights for this CPU."""
        return 0

    def rope_and_write(self, qkv, positions, heads: QKVHeads, planes, slot_mapping, rotated):
        rope_and_write_reference(qkv, positions, heads, planes, slot_mapping, rotated)

    def decode(
        self,
        query: torch.Tensor,  # [num_decode_tokens, num_heads, head_size]
        planes: KVPlanes,
        metadata: FFAFP8FP8Metadata,
        limit: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        if planes.key_code is not None and limit is not None:
            self._encode_new(planes, metadata)
        result, _ = decode_attention_reference(
            query,
            planes,
            metadata.block_table,
            metadata.seq_lens,
            block_size=metadata.block_size,
            scale=self.impl.scale,
            sinks=self.impl.sinks,
            logits_soft_cap=self.impl.logits_soft_cap,
            layer=self.impl.layer_index,
            **{RULES[self.impl.config.rule]: limit},
            query_start_loc=metadata.query_start_loc,
            min_context=self.impl.config.min_context,
            counters=self.impl.counters,
            code_lag=metadata.code_lag,
        )
        output.copy_(result)

    @staticmethod
    def _encode_new(planes: KVPlanes, metadata: FFAFP8FP8Metadata) -> None:
        """Writes the codes of keys that the last steps completed."""
        starts = metadata.query_start_loc
        query_lens = [1] * metadata.num_decodes if starts is None else starts.diff().tolist()
        lengths = zip(metadata.seq_lens.tolist(), query_lens, strict=True)
        for row, (seq_len, query_len) in zip(metadata.block_table, lengths, strict=True):
            certain = seq_len - query_len + 1
            encode_keys_reference(planes, row, max(certain - metadata.code_lag, 0), certain)

    def prefill(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        value: torch.Tensor,
        planes: KVPlanes,
        prefill: PrefillBatch,
        output: torch.Tensor,
    ) -> None:
        # float32: without AMX its matrix products take half the time of bfloat16's
        query, key, value = query.float(), key.float(), value.float()
        starts = prefill.query_start_loc_host
        for request, seq_len in enumerate(prefill.seq_lens_host):
            tokens = slice(starts[request], starts[request + 1])
            context_len = seq_len - (tokens.stop - tokens.start)
            context = None
            if context_len:
                context = gather_kv_reference(
                    planes, prefill.block_table[request], context_len, torch.float32
                )
            output[tokens] = prefill_attention(
                query[tokens], key[tokens], value[tokens], context, self.impl.scale,
                self.impl.sinks, self.impl.logits_soft_cap,
            )  # fmt: skip


def prefill_attention(
    query: torch.Tensor,  # [query_len, num_heads, head_size]
    key: torch.Tensor,  # [query_len, num_kv_heads, head_size]
    value: torch.Tensor,
    context: tuple[torch.Tensor, torch.Tensor]
    | None,  # each [context_len, num_kv_heads, head_size]
    scale: float,
    sinks: torch.Tensor | None = None,  # [num_heads]
    logits_soft_cap: float | None = None,
) -> torch.Tensor:
    """Causal attention of a request's newest tokens to each other, and to all of their `context`:
    earlier keys and values, each `[context_len, num_kv_heads, head_size]`. `sinks` are scores of
    each head that have no value; those of keys are under the cap, if there is one.

    Two passes without a mask, which costs SDPA more than all else, merged by log-sum-exp.
    """
    output, log_sum = _attend(query, key, value, scale, logits_soft_cap, is_causal=True)
    if context is not None:
        context_output, context_log_sum = _attend(
            query, *context, scale, logits_soft_cap, is_causal=False
        )
        weight = torch.sigmoid(context_log_sum - log_sum)[..., None]
        output = torch.lerp(output, context_output, weight)
        log_sum = torch.logaddexp(log_sum, context_log_sum)
    if sinks is not None:
        output = output * torch.sigmoid(log_sum - _of_heads(sinks, log_sum))[..., None]
    return output.permute(2, 0, 1, 3).flatten(1, 2)


def _of_heads(sinks: torch.Tensor, log_sum: torch.Tensor) -> torch.Tensor:
    """`sinks` beside `log_sum`, `[num_kv_heads, group, query_len]`."""
    return sinks.to(log_sum).view(*log_sum.shape[:2], 1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    soft_cap: float | None,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[num_kv_heads, group, query_len, head_size]` and its log-sum-exp."""
    num_kv_heads = key.shape[1]
    rows = query.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
    if soft_cap:
        return _attend_capped(rows, key, value, scale, soft_cap, is_causal)
    key, value = (
        tensor.transpose(0, 1)[:, None].expand(-1, rows.shape[1], -1, -1) for tensor in (key, value)
    )
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows, key, value, is_causal=is_causal, scale=scale
    )


def _attend_capped(
    rows: torch.Tensor,  # [num_kv_heads, group, query_len, head_size]
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    soft_cap: float,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_attend` under a soft cap, which SDPA does not know."""
    output, log_sum = torch.empty_like(rows), torch.empty_like(rows[..., 0])
    for kv_head, head in product(range(rows.shape[0]), range(rows.shape[1])):
        scores = rows[kv_head, head] @ key[:, kv_head].mT * (scale / soft_cap)
        scores = soft_cap * scores.tanh_()
        if is_causal:
            scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu_(1), -torch.inf)
        log_sum[kv_head, head] = scores.logsumexp(-1)
        output[kv_head, head] = scores.softmax(-1) @ value[:, kv_head]
    return output, log_sum

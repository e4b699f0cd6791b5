"""What a step needs to know of its batch: decodes first, planned on the device, then prefills."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from vllm.logger import init_logger
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from vllm_ffa_fp8fp8.attention import worker_metrics
from vllm_ffa_fp8fp8.attention.geometry import (
    PREFERRED_PAGE_SIZE,
    decode_query_len,
    pruning_block_size,
)
from vllm_ffa_fp8fp8.attention.limit_rows import LimitRows
from vllm_ffa_fp8fp8.integration.refusals import OTHER_BACKEND, check_kv_cache_spec, refuse
from vllm_ffa_fp8fp8.integration.request_limits import worker_limits
from vllm_ffa_fp8fp8.kernels.cache.page_layout import PageLayout
from vllm_ffa_fp8fp8.kernels.decode.limits import code_lag
from vllm_ffa_fp8fp8.kernels.decode.plan import DecodePlan

logger = init_logger(f"vllm.{__name__}")


@dataclass
class PrefillBatch:
    """The prefills of a step, which follow its decodes.

    `query_start_loc` is relative to the first prefill token; `cu_seq_lens` are the exclusive
    sums of `seq_lens`. The lists are those numbers on the host.
    """

    query_start_loc: torch.Tensor  # int32 [num_prefills + 1]
    cu_seq_lens: torch.Tensor  # int32 [num_prefills + 1]
    block_table: torch.Tensor  # int32 [num_prefills, max_pages]
    query_start_loc_host: list[int]
    seq_lens_host: list[int]  # on a GPU upper bounds, where drafts are verified

    @cached_property
    def query_lens_host(self) -> list[int]:
        starts = self.query_start_loc_host
        return [end - start for start, end in zip(starts, starts[1:], strict=False)]

    @cached_property
    def has_context(self) -> bool:
        """Whether any request has tokens in the cache from before this step."""
        return self.query_lens_host != self.seq_lens_host


@dataclass
class FFAFP8FP8Metadata(AttentionMetadata):
    """One step's batch, the same for all layers of a KV cache group."""

    num_decodes: int
    num_decode_tokens: int
    query_len: int  # the most tokens of a decode
    query_start_loc: torch.Tensor | None  # int32 [num_decodes + 1]; None: all decodes have one
    num_actual_tokens: int
    seq_lens: torch.Tensor  # int32 [num_decodes], query tokens included, 0 in padding rows
    block_table: torch.Tensor  # int32 [num_decodes, max_pages]
    block_size: int
    code_lag: int  # of kernels.decode.limits
    limit: torch.Tensor | None  # float32 [num_decodes], delta or tau; None: nothing is pruned
    plan: DecodePlan | None  # None on the CPU and without decodes
    prefill: PrefillBatch | None


class FFAFP8FP8MetadataBuilder(AttentionMetadataBuilder[FFAFP8FP8Metadata]):
    """Builds the metadata without waiting for the device."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        """Drafts can be verified in a graph where the decode kernel takes all of them."""
        if decode_query_len(vllm_config) > 1:
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    @classmethod
    def get_varlen_cudagraph_max_query_len(cls, vllm_config, kv_cache_spec) -> int:
        """A graph of a batch with drafts takes each request's number of them from the device."""
        return decode_query_len(vllm_config)

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        check_kv_cache_spec(kv_cache_spec)
        self._init_reorder_batch_threshold(decode_query_len(vllm_config))
        impl = vllm_config.compilation_config.static_forward_context[layer_names[0]].impl
        page_size = kv_cache_spec.block_size
        if page_size < PREFERRED_PAGE_SIZE:
            logger.warning_once(
                "FFA_FP8FP8 reads pages of %d tokens, which other backends' layers or "
                "--block-size ask for; pages of %d are faster: set --block-size %d.",
                page_size, PREFERRED_PAGE_SIZE, PREFERRED_PAGE_SIZE,
            )  # fmt: skip
        self.block_size = pruning_block_size(page_size, impl.config)
        self.rule, self.limits = impl.config.rule, None
        if impl.config.prunes:
            most = vllm_config.scheduler_config.max_num_seqs
            self.limits = LimitRows(impl.config.limit, most, device)
        self.code_lag = code_lag(decode_query_len(vllm_config))
        self.plan = impl.ops.make_plan(self.block_size)
        if impl.config.metrics:
            worker_metrics.start(vllm_config, self.block_size)
        if impl.config.scans_codes:
            _tell_cost_of_codes(impl.layout, vllm_config.cache_config, page_size)
        for name in layer_names:
            impl = vllm_config.compilation_config.static_forward_context[name].impl
            impl.ops.compile(impl.planes_to_be(page_size))

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FFAFP8FP8Metadata:
        common = common_attn_metadata
        if common.causal is not True:
            refuse("non-causal attention", OTHER_BACKEND)
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            common, decode_threshold=self.reorder_batch_threshold
        )
        # two widths, so that few kernels are compiled: a token each, or as many as there can be
        query_len, query_start_loc = 1, None
        if min(self.reorder_batch_threshold, common.max_query_len) > 1:
            query_len = self.reorder_batch_threshold
            query_start_loc = common.query_start_loc[: num_decodes + 1]
        else:
            num_decode_tokens = num_decodes  # padding requests of a graph have a row each
        seq_lens = common.seq_lens[:num_decodes]
        limit = None
        if self.limits is not None:
            limit = self.limits.update(worker_limits.of_batch(common.req_idx))[:num_decodes]
        worker_metrics.tick()
        plan = None
        if self.plan is not None and num_decodes:
            plan = self.plan.update(seq_lens)
        return FFAFP8FP8Metadata(
            num_decodes=num_decodes,
            num_decode_tokens=num_decode_tokens,
            query_len=query_len,
            query_start_loc=query_start_loc,
            num_actual_tokens=common.num_actual_tokens,
            seq_lens=seq_lens,
            block_table=common.block_table_tensor[:num_decodes],
            block_size=self.block_size,
            code_lag=self.code_lag,
            limit=limit,
            plan=plan,
            prefill=_prefill_batch(common, num_decodes) if num_prefills else None,
        )


def _tell_cost_of_codes(layout: PageLayout, cache_config, page_size: int) -> None:
    """What scan: int4 costs, in tokens of the cache."""
    ours, without = layout.bytes_per_token, replace(layout, key_code=False).bytes_per_token
    tokens = (cache_config.num_gpu_blocks or 0) * page_size
    logger.info_once(
        "FFA_FP8FP8 scans keys of 4 bits, which take %d of %d bytes of a token and KV head: the "
        "cache holds %s where it would hold %s.",
        ours - without, ours,
        f"{tokens:,} tokens" if tokens else f"{without / ours:.0%} of the tokens",
        f"{tokens * ours // without:,}" if tokens else "all",
    )  # fmt: skip


def _seq_lens_host(seq_lens: torch.Tensor, upper_bound: torch.Tensor | None) -> torch.Tensor:
    """Lengths on the host, or upper bounds of them where asking the device would wait for it."""
    return seq_lens.cpu() if upper_bound is None or seq_lens.is_cpu else upper_bound


def _prefill_batch(common: CommonAttentionMetadata, num_decodes: int) -> PrefillBatch:
    seq_lens = common.seq_lens[num_decodes : common.num_reqs]
    cu_seq_lens = torch.zeros(len(seq_lens) + 1, dtype=torch.int32, device=seq_lens.device)
    torch.cumsum(seq_lens, dim=0, out=cu_seq_lens[1:])
    seq_lens_host = _seq_lens_host(common.seq_lens, common.seq_lens_cpu_upper_bound)
    starts = common.query_start_loc_cpu[num_decodes : common.num_reqs + 1].tolist()
    return PrefillBatch(
        query_start_loc=common.query_start_loc[num_decodes : common.num_reqs + 1] - starts[0],
        cu_seq_lens=cu_seq_lens,
        block_table=common.block_table_tensor[num_decodes : common.num_reqs],
        query_start_loc_host=[start - starts[0] for start in starts],
        seq_lens_host=seq_lens_host[num_decodes : common.num_reqs].tolist(),
    )

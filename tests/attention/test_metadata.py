"""How a step's batch becomes decodes and prefills, with drafts to verify and without."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_ffa_fp8fp8.attention import cuda_ops
from vllm_ffa_fp8fp8.attention.backend import FFAFP8FP8Backend
from vllm_ffa_fp8fp8.attention.cuda_ops import CudaOps, context_chunks
from vllm_ffa_fp8fp8.attention.geometry import decode_query_len
from vllm_ffa_fp8fp8.attention.metadata import FFAFP8FP8MetadataBuilder, _seq_lens_host
from vllm_ffa_fp8fp8.config import FFAConfig

SPEC = FullAttentionSpec(block_size=64, num_kv_heads=2, head_size=128, dtype=torch.bfloat16)


def layer(group: int, backend=FFAFP8FP8Backend) -> SimpleNamespace:
    ops = SimpleNamespace(make_plan=lambda block_size: None, compile=lambda planes: None)
    impl = SimpleNamespace(
        config=FFAConfig(),
        ops=ops,
        num_heads=2 * group,
        num_kv_heads=2,
        planes_to_be=lambda page_size: None,
    )
    return SimpleNamespace(impl=impl, get_attn_backend=lambda: backend)


def vllm_config(num_drafts=None, group=4, draft_group=None, dtype=torch.bfloat16):
    speculative = None
    if num_drafts is not None:
        speculative = SimpleNamespace(num_speculative_tokens=num_drafts)
    other = SimpleNamespace(get_name=lambda: "FLASH_ATTN")
    layers = {"layers.0": layer(group), "layers.1": layer(40, other), "experts": object()}
    if draft_group is not None:
        layers["draft.layers.0"] = layer(draft_group)
    return SimpleNamespace(
        model_config=SimpleNamespace(dtype=dtype),
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        speculative_config=speculative,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        compilation_config=SimpleNamespace(static_forward_context=layers),
    )


def build(config, query_lens: list[int], seq_lens: list[int], **more):
    """The metadata of a batch in vLLM's order: decodes first."""
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    lengths = torch.tensor(seq_lens, dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths + 3,  # as with drafts that may be refused
        num_reqs=len(query_lens),
        num_actual_tokens=sum(query_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        block_table_tensor=torch.arange(8 * len(query_lens), dtype=torch.int32).view(-1, 8),
        slot_mapping=torch.arange(sum(query_lens)),
        **more,
    )
    builder = FFAFP8FP8MetadataBuilder(SPEC, ["layers.0"], config, torch.device("cpu"))
    return builder.build(0, common)


@pytest.mark.parametrize(
    "num_drafts, query_lens, num_decodes, query_len",
    [
        (None, [1, 1, 1], 3, 1),
        (None, [1, 1, 7], 2, 1),
        (None, [5, 5], 0, 1),  # short prompts
        (None, [1, 1, 0], 3, 1),
        (4, [5, 5, 5], 3, 5),
        (4, [5, 5, 0], 3, 5),  # a padding row of a graph
        (4, [1, 1, 1], 3, 1),  # nothing was drafted
        (4, [5, 5, 1, 300], 3, 5),
        (4, [3, 5, 5], 3, 5),
        (4, [2, 1, 0, 0], 4, 5),
        (4, [1, 1, 250], 2, 5),
        (4, [6, 6], 0, 5),
        (8, [9, 9], 0, 1),  # more than the decode kernel takes
        (8, [1, 1, 9], 2, 1),
    ],
)
def test_decodes_and_prefills(num_drafts, query_lens, num_decodes, query_len):
    seq_lens = [100 * (place + 1) if count else 0 for place, count in enumerate(query_lens)]
    metadata = build(vllm_config(num_drafts), query_lens, seq_lens)
    assert (metadata.num_decodes, metadata.query_len) == (num_decodes, query_len)
    assert metadata.seq_lens.tolist() == seq_lens[:num_decodes]
    assert len(metadata.block_table) == num_decodes
    if query_len == 1:  # a row each, padding requests of a graph too
        assert metadata.query_start_loc is None and metadata.num_decode_tokens == num_decodes
    else:
        assert metadata.query_start_loc.diff().tolist() == query_lens[:num_decodes]
        assert metadata.num_decode_tokens == sum(query_lens[:num_decodes])
    if num_decodes == len(query_lens):
        assert metadata.prefill is None
        return
    assert metadata.prefill.query_lens_host == query_lens[num_decodes:]
    assert metadata.prefill.seq_lens_host == seq_lens[num_decodes:]  # exact on the CPU
    assert metadata.prefill.query_start_loc[0] == 0 and metadata.prefill.has_context
    assert metadata.prefill.block_table[0, 0] == 8 * num_decodes


@pytest.mark.parametrize(
    "config, query_len",
    [
        (vllm_config(), 1),
        (vllm_config(4), 5),
        (vllm_config(7, group=8), 8),
        (vllm_config(8), 1),  # nine tokens
        (vllm_config(4, group=16), 1),  # 80 rows
        (vllm_config(3, group=16), 4),
        (vllm_config(4, group=4, draft_group=16), 1),
        (vllm_config(4, group=8, dtype=torch.float16), 1),  # 40 rows of four parts each
        (vllm_config(3, group=8, dtype=torch.float16), 4),
    ],
)
def test_graphs_of_drafts_are_promised_where_the_kernel_takes_them(config, query_len):
    """Declaring more than the kernels do would make vLLM replay graphs for the wrong batches."""
    assert decode_query_len(config) == query_len
    support = FFAFP8FP8MetadataBuilder.get_cudagraph_support(config, SPEC)
    expected = (
        AttentionCGSupport.UNIFORM_BATCH
        if query_len > 1
        else AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )
    assert support == expected
    assert FFAFP8FP8MetadataBuilder.get_varlen_cudagraph_max_query_len(config, SPEC) == query_len
    builder = FFAFP8FP8MetadataBuilder(SPEC, ["layers.0"], config, torch.device("cpu"))
    assert builder.reorder_batch_threshold == query_len


def test_non_causal_batches_are_refused():
    for causal in (False, torch.tensor([True, False])):
        with pytest.raises(ValueError, match="does not support non-causal attention"):
            build(vllm_config(), [1, 1], [70, 80], causal=causal)


def test_lengths_on_the_host_wait_for_no_device():
    lengths, bounds = torch.tensor([70, 80]), torch.tensor([73, 83])
    assert _seq_lens_host(lengths, bounds) is lengths
    assert _seq_lens_host(lengths, None) is lengths
    assert _seq_lens_host(lengths.to("meta"), bounds) is bounds


def test_pages():
    assert [FFAFP8FP8Backend.get_preferred_block_size(size) for size in (16, 128)] == [64, 128]


def test_small_pages_of_other_backends_are_said(monkeypatch):
    said = []
    monkeypatch.setattr(
        "vllm_ffa_fp8fp8.attention.metadata.logger.warning_once",
        lambda message, *values: said.append(message % values),
    )
    for page_size in (64, 16):
        spec = replace(SPEC, block_size=page_size)
        FFAFP8FP8MetadataBuilder(spec, ["layers.0"], vllm_config(), torch.device("cpu"))
    (message,) = said
    assert "pages of 16 tokens" in message and "set --block-size 64" in message


@pytest.mark.parametrize(
    "seq_lens, chunks",
    [
        ([100], [(0, 1)]),
        ([60, 40, 1], [(0, 2), (2, 3)]),
        ([100, 100, 5, 95], [(0, 1), (1, 2), (2, 4)]),
        ([1, 100, 1], [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_prefills_are_cut_to_the_workspace(seq_lens, chunks):
    assert context_chunks(seq_lens, 100) == chunks


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_batch_invariant_norms_are_cut_alike(monkeypatch, batch_invariant):
    """Whatever number of tokens a step has."""
    ops, tunings = object.__new__(CudaOps), set()
    ops.batch_invariant = batch_invariant
    monkeypatch.setattr(cuda_ops, "rope_and_write", lambda *given: tunings.add(given[6]))
    for num_tokens in (1, 64, 65, 4096):
        ops.rope_and_write(torch.empty(num_tokens, 0), None, None, object(), None, None)
    assert None not in tunings and (len(tunings) == 1) == batch_invariant

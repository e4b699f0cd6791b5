"""Attention modules of vLLM's models with random weights, run fused and by their own forward."""

import torch
from processes import MODEL
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.models.llama import LlamaAttention
from vllm.model_executor.models.qwen2 import Qwen2Attention
from vllm.model_executor.models.qwen2_moe import Qwen2MoeAttention

from vllm_ffa_fp8fp8.attention.metadata import FFAFP8FP8Metadata, PrefillBatch
from vllm_ffa_fp8fp8.kernels.cache_reference import gather_kv_reference

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE = 256, 4, 2, 64
TOKENS, PAGE_SIZE, NUM_PAGES = 7, 16, 3
MAX_MODEL_LEN = 4096


def make_config(**options):
    config = EngineArgs(
        model=str(MODEL),
        attention_backend="FFA_FP8FP8",
        additional_config={"ffa_fp8fp8": options},
        gpu_memory_utilization=0.1,
        max_model_len=MAX_MODEL_LEN,
    ).create_engine_config()
    config.model_config.hf_config.head_dim = HEAD_SIZE
    return config


def make_attention(attention_class, vllm_config, **more) -> torch.nn.Module:
    """A module with random weights, loaded as vLLM loads one."""
    torch.manual_seed(0)
    hf_config = vllm_config.model_config.hf_config
    arguments = {"rope_parameters": hf_config.rope_parameters, "head_dim": HEAD_SIZE}
    if attention_class is Qwen2Attention:
        del arguments["head_dim"]
    if attention_class is Qwen2MoeAttention:
        arguments = {"rope_parameters": hf_config.rope_parameters}
    if issubclass(attention_class, LlamaAttention):
        arguments = {"config": hf_config}
    arguments |= {"hidden_size": HIDDEN, "num_heads": HEADS, "num_kv_heads": KV_HEADS}
    layer = len(vllm_config.compilation_config.static_forward_context)
    prefix = f"model.layers.{layer}.self_attn"
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with set_current_vllm_config(vllm_config):
            attention = attention_class(**arguments | more, prefix=prefix)
    finally:
        torch.set_default_dtype(dtype)
    for name, parameter in attention.named_parameters():
        scale = HIDDEN**-0.5 if parameter.dim() == 2 else 0.3
        parameter.data.normal_().mul_(scale).add_(1.0 if "norm" in name else 0.0)
    for linear in (attention.qkv_proj, attention.o_proj):
        linear.quant_method.process_weights_after_loading(linear)
    with set_current_vllm_config(vllm_config):
        attention.attn.process_weights_after_loading(torch.bfloat16)
    return attention


def run(attention, vllm_config, slots) -> tuple[torch.Tensor, ...]:
    """Output, and the cached K and V of one prompt."""
    layout = attention.attn.impl.layout
    shape = (NUM_PAGES, KV_HEADS, PAGE_SIZE, layout.bytes_per_token)
    cache = attention.attn.kv_cache = torch.zeros(shape, dtype=torch.uint8)
    starts = torch.tensor([0, TOKENS], dtype=torch.int32)
    pages = torch.arange(NUM_PAGES, dtype=torch.int32)
    prefill = PrefillBatch(starts, starts, pages[None], [0, TOKENS], [TOKENS])
    metadata = FFAFP8FP8Metadata(
        num_decodes=0,
        num_decode_tokens=0,
        query_len=1,
        query_start_loc=None,
        num_actual_tokens=TOKENS,
        seq_lens=starts[:0],
        block_table=pages[:0, None],
        block_size=16,
        code_lag=2,
        limit=None,
        plan=None,
        prefill=prefill,
    )
    name = attention.attn.layer_name
    hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    with (
        torch.inference_mode(),
        set_current_vllm_config(vllm_config),
        set_forward_context(
            {name: metadata} if slots is not None else None,
            vllm_config,
            slot_mapping={name: slots} if slots is not None else {},
        ),
    ):
        output = attention(torch.arange(TOKENS) + 3, hidden.bfloat16())
    key, value = gather_kv_reference(
        layout.split(cache), pages, NUM_PAGES * PAGE_SIZE, torch.float32
    )
    return output.float(), key, value


def count_calls(monkeypatch, attention) -> list:
    ops, calls = attention.attn.impl.ops, []
    original = ops.rope_and_write

    def counted(qkv, *arguments):
        calls.append(qkv)
        original(qkv, *arguments)

    monkeypatch.setattr(ops, "rope_and_write", counted)
    return calls


def check_fused(attention, vllm_config, monkeypatch) -> None:
    """The fused way runs, and gives what the module's own forward gives."""
    calls = count_calls(monkeypatch, attention)
    slots = torch.tensor([20, 3, 4, -1, 5, 47, 7])
    fused = run(attention, vllm_config, slots)
    assert len(calls) == 1
    monkeypatch.setattr(attention, "fused_path", None)
    own = run(attention, vllm_config, slots)
    assert len(calls) == 1
    for ours, theirs in zip(fused, own, strict=True):
        assert theirs.abs().max() > 0.5
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < 2**-6, error  # roundings that the fused way has not
    assert (fused[1].abs().sum((1, 2)) > 0).nonzero().flatten().tolist() == [3, 4, 5, 7, 20, 47]

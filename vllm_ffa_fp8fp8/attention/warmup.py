"""Compiles whatever a step can launch, before the engine serves: in threads, while vLLM compiles
the model, and whatever is left when the cache is known."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Thread

import torch
import triton
from vllm.logger import init_logger

from vllm_ffa_fp8fp8 import envs
from vllm_ffa_fp8fp8.attention.geometry import (
    decode_query_len,
    layer_impls,
    preferred_page_size,
    pruning_block_size,
)
from vllm_ffa_fp8fp8.attention.metadata import FFAFP8FP8Metadata
from vllm_ffa_fp8fp8.kernels.cache.key_codes import encode_keys
from vllm_ffa_fp8fp8.kernels.cache.kv_gather import gather_kv
from vllm_ffa_fp8fp8.kernels.cache.page_layout import KVPlanes
from vllm_ffa_fp8fp8.kernels.decode.plan import DecodePlan
from vllm_ffa_fp8fp8.kernels.runtime import compile_only

logger = init_logger(f"vllm.{__name__}")

META = torch.device("meta")
_compiled: set[tuple] = set()
_early: list[Future] = []


def compile_early(vllm_config) -> None:
    """Begins to compile, in a thread, for pages of the size that vLLM is going to choose; once
    the last layer of FFA_FP8FP8 is loaded."""
    impls = layer_impls(vllm_config)
    if not all(impl.is_loaded for impl in impls):
        return
    device, page_size = torch.cuda.current_device(), preferred_page_size(vllm_config)
    done: Future = Future()

    def compile_all() -> None:
        torch.cuda.set_device(device)
        try:
            for impl in impls:
                compile_kernels(impl, impl.planes_to_be(page_size))
        except Exception:  # whatever it is comes again, for the page that vLLM has chosen
            logger.debug("Compiling ahead failed.", exc_info=True)
        finally:
            done.set_result(None)

    _early.append(done)
    Thread(target=compile_all, name="ffa_fp8fp8_compile", daemon=True).start()


def compile_kernels(impl, planes: KVPlanes) -> None:
    """Compiles what the layer of `impl` can launch on a cache like `planes`, which may be on the
    meta device, unless it was done for a layer of the same kind."""
    kind = _kind(impl, planes)
    if kind in _compiled:
        return
    with (
        ThreadPoolExecutor(envs.compile_threads()) as pool,
        triton.AsyncCompileMode(pool),
        compile_only(),
    ):
        launch_all(impl, planes)
    _compiled.add(kind)


def wait_for_early() -> None:
    """Until nothing compiles in other threads."""
    while _early:
        _early.pop().result()


def _kind(impl, planes: KVPlanes) -> tuple:
    """What decides which code a layer launches."""
    limits = impl.ops.decode_limits(pruning_block_size(planes.page_size, impl.config))
    fused = impl.fused_qkv
    strides = tuple(plane.stride() for plane in planes if isinstance(plane, torch.Tensor))
    scores = (impl.sinks is not None, impl.logits_soft_cap is not None)
    return limits, impl.config, impl.layout, fused and fused.kind, planes.page_size, strides, scores


def launch_all(impl, planes: KVPlanes) -> None:
    """Calls, with tensors on the meta device, everything that launches kernels in a step, for one
    batch of every kind."""
    max_tokens = impl.vllm_config.scheduler_config.max_num_batched_tokens
    config = impl.config
    if config.prunes:
        _launch_decode(impl, planes, prunes=True)
    if config.dense_layers or not config.prunes:
        _launch_decode(impl, planes, prunes=False)
    for num_tokens in token_counts(max_tokens):
        _launch_cache_write(impl, planes, num_tokens)
    key = _rows(impl, 16, impl.num_kv_heads)
    lengths, block_table = _empty(2, dtype=torch.int32), _empty(1, 16, dtype=torch.int32)
    gather_kv(planes, block_table, lengths, 16, key, key)
    if config.prunes:
        encode_keys(planes, block_table, lengths, lengths, 16, 1)


def token_counts(max_tokens: int) -> Iterator[int]:
    """One number of tokens of each kind for which a cache write has other code: the kinds end at
    powers of two."""
    yield 1
    power = 1
    while power < max_tokens:
        yield power + 1
        power *= 2


def _launch_decode(impl, planes: KVPlanes, prunes: bool) -> None:
    block_size = pruning_block_size(planes.page_size, impl.config)
    limits = impl.ops.decode_limits(block_size)
    for num_reqs in limits.batch_classes():
        seq_lens = _empty(num_reqs, dtype=torch.int32)
        limit = _empty(num_reqs, dtype=torch.float32) if prunes else None
        plan = DecodePlan.allocate(limits, META).update(seq_lens)
        for query_len in {1, decode_query_len(impl.vllm_config)}:
            query = _rows(impl, num_reqs * query_len, impl.num_heads)
            starts = _empty(num_reqs + 1, dtype=torch.int32) if query_len > 1 else None
            batch = FFAFP8FP8Metadata(
                num_decodes=num_reqs,
                num_decode_tokens=len(query),
                query_len=query_len,
                query_start_loc=starts,
                num_actual_tokens=len(query),
                seq_lens=seq_lens,
                block_table=_empty(num_reqs, 16, dtype=torch.int32),
                block_size=block_size,
                code_lag=limits.code_lag,
                limit=limit,
                plan=plan,
                prefill=None,
            )
            impl.ops.decode(query, planes, batch, limit, query)


def _launch_cache_write(impl, planes: KVPlanes, num_tokens: int) -> None:
    slots, fused = _empty(num_tokens, dtype=torch.int64), impl.fused_qkv
    if fused is None:
        key = _rows(impl, num_tokens, impl.num_kv_heads)
        impl.ops.write(key, key, planes, slots)
        return
    heads = fused.heads
    qkv = _rows(impl, num_tokens, heads.num_all_heads).flatten(1)
    if fused.starts_projected:
        rotated = _empty(num_tokens, heads.query_size + heads.key_value_size, dtype=qkv.dtype)
        impl.ops.rope_and_write(qkv, slots, heads, planes, slots, rotated)
    elif num_tokens <= fused.largest_projected_batch:
        hidden = _empty(num_tokens, fused.hidden_size, dtype=qkv.dtype)
        linear = fused.attention.qkv_proj
        impl.ops.project_rope_and_write(hidden, linear, slots, heads, planes, slots, qkv)
    else:
        impl.ops.rope_and_write(qkv, slots, heads, planes, slots, qkv)


def _rows(impl, num_tokens: int, num_heads: int) -> torch.Tensor:
    return _empty(num_tokens, num_heads, impl.head_size, dtype=impl.layout.dtype)


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)

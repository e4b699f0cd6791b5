"""What the warm-up compiles is what steps launch, kernel by kernel: `python launched_variants.py`,
without TRITON_INTERPRET. Nothing is compiled: Triton's cache keys are compared."""

import dataclasses
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_ffa_fp8fp8.attention import cuda_ops, warmup
from vllm_ffa_fp8fp8.attention.backend import FFAFP8FP8Backend
from vllm_ffa_fp8fp8.attention.fused_qkv import FROM_HIDDEN_STATES, FROM_PROJECTIONS, FusedQKV
from vllm_ffa_fp8fp8.attention.impl import FFAFP8FP8Impl
from vllm_ffa_fp8fp8.attention.metadata import FFAFP8FP8MetadataBuilder
from vllm_ffa_fp8fp8.config import FFAConfig
from vllm_ffa_fp8fp8.kernels import PageLayout, QKVHeads, runtime
from vllm_ffa_fp8fp8.kernels.cache.key_codes import encode_keys
from vllm_ffa_fp8fp8.kernels.cache.kv_gather import gather_kv
from vllm_ffa_fp8fp8.kernels.counters import new_counters
from vllm_ffa_fp8fp8.kernels.decode.limits import code_lag

CPU = torch.device("cpu")
HIDDEN_SIZE, HEAD_SIZE = 256, 64
LONGEST, MAX_TOKENS = 131_072, 4096
MOST_REQUESTS = 700  # scans take smaller chunks from a few hundred requests on


@dataclasses.dataclass(frozen=True)
class Engine:
    """An engine of one layer."""

    options: dict = dataclasses.field(default_factory=dict)
    num_heads: int = 8
    num_kv_heads: int = 2
    dtype: torch.dtype = torch.bfloat16
    page_size: int = 64
    num_drafts: int = 0
    fused_path: str | None = FROM_HIDDEN_STATES
    norm: bool = False
    bias: bool = False
    batch_invariant: bool = False
    logits_soft_cap: float | None = None


ENGINES = (
    Engine({"delta": 10}),
    Engine({"delta": None}, fused_path=None),
    Engine({"tau": 0.03, "dense_layers": [0]}, fused_path=None, logits_soft_cap=50.0),
    Engine(
        {"delta": 10, "dense_layers": [0], "record_skip_ratio": True},
        num_drafts=4,
        fused_path=FROM_PROJECTIONS,
    ),  # fmt: skip
    Engine({"v_cache_dtype": "fp8", "fused_kproj": "on"}, norm=True, page_size=128),
    Engine(
        {"delta": 10, "precomputed_threshold": True}, dtype=torch.float16, num_kv_heads=1, bias=True
    ),
    Engine({"use_fp8_residual": False, "block_size": 16}, page_size=48, num_kv_heads=1),
    Engine({"delta": 10}, batch_invariant=True),
    Engine({"tau": 0.03, "scan": "int4"}, num_kv_heads=1, fused_path=None, num_drafts=2),
)


def make_layer(engine: Engine) -> tuple[SimpleNamespace, SimpleNamespace]:
    """The impl of an engine's layer, as far as its work on CUDA goes, and the VllmConfig."""
    speculative = SimpleNamespace(num_speculative_tokens=engine.num_drafts)
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=engine.dtype, max_model_len=LONGEST),
        cache_config=SimpleNamespace(num_gpu_blocks=1000),
        scheduler_config=SimpleNamespace(
            max_num_seqs=MOST_REQUESTS, max_num_batched_tokens=MAX_TOKENS
        ),
        speculative_config=speculative if engine.num_drafts else None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    options = FFAConfig.load("balanced", engine.options, num_layers=1)
    counters = new_counters(engine.num_kv_heads, "cpu")
    impl = SimpleNamespace(
        num_heads=engine.num_heads,
        num_kv_heads=engine.num_kv_heads,
        head_size=HEAD_SIZE,
        scale=0.125,
        sinks=None,
        logits_soft_cap=engine.logits_soft_cap,
        layer_index=0,
        config=options,
        vllm_config=config,
        counters=counters if options.record_skip_ratio else None,
        layout=PageLayout(
            HEAD_SIZE,
            engine.dtype,
            residual=options.use_fp8_residual,
            fp8_value=options.v_cache_dtype == "fp8",
        ),
    )
    impl.planes_to_be = lambda page_size: FFAFP8FP8Impl.planes_to_be(impl, page_size)
    impl.ops = cuda_ops.CudaOps(impl, config)
    impl.ops.device, impl.ops.batch_invariant = CPU, engine.batch_invariant
    impl.ops.compile = lambda planes: None
    impl.fused_qkv = make_fused(engine, impl) if engine.fused_path else None
    layer = SimpleNamespace(impl=impl, get_attn_backend=lambda: FFAFP8FP8Backend)
    config.compilation_config.static_forward_context["layers.0"] = layer
    return impl, config


def make_fused(engine: Engine, impl) -> FusedQKV:
    norms = [torch.ones(HEAD_SIZE, dtype=engine.dtype)] * 2 if engine.norm else []
    heads = QKVHeads(
        engine.num_heads, engine.num_kv_heads, HEAD_SIZE, torch.zeros(64, HEAD_SIZE), True, *norms
    )
    width = heads.num_all_heads * HEAD_SIZE
    linear = torch.nn.Linear(HIDDEN_SIZE, width, bias=engine.bias, dtype=engine.dtype)
    attention = SimpleNamespace(qkv_proj=linear.requires_grad_(False), fused_path=engine.fused_path)
    largest = 0
    if engine.fused_path == FROM_HIDDEN_STATES:
        largest = impl.ops.largest_projected_batch(HIDDEN_SIZE)
    return FusedQKV(attention, heads, HIDDEN_SIZE, largest, places=None)


def cut(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that begins and has its rows at odd places of a larger one."""
    if len(shape) == 1:
        return torch.zeros(shape[0] + 1, dtype=dtype)[1:]
    wider = torch.zeros(shape[0] + 1, *shape[1:-1], shape[-1] + 1, dtype=dtype)
    return wider[1:, ..., : shape[-1]]


def decode_steps(engine: Engine, impl, config, planes) -> None:
    spec = FullAttentionSpec(
        block_size=engine.page_size,
        num_kv_heads=engine.num_kv_heads,
        head_size=HEAD_SIZE,
        dtype=engine.dtype,
    )
    builder = FFAFP8FP8MetadataBuilder(spec, ["layers.0"], config, CPU)
    width = engine.num_heads + 2 * engine.num_kv_heads
    most = 1 + engine.num_drafts
    rows = torch.empty(MOST_REQUESTS * most, width, HEAD_SIZE, dtype=engine.dtype)
    for num_reqs in range(1, MOST_REQUESTS + 1):
        for query_lens in ({1}, {most, 1}, {most}) if num_reqs > 1 else ({1}, {most}):
            lens = torch.tensor((list(query_lens) * num_reqs)[:num_reqs], dtype=torch.int32)
            starts = torch.cat([lens.new_zeros(1), lens.cumsum(0, dtype=torch.int32)])
            common = CommonAttentionMetadata(
                query_start_loc=starts,
                query_start_loc_cpu=starts,
                seq_lens=torch.full((num_reqs,), 100, dtype=torch.int32),
                num_reqs=num_reqs,
                num_actual_tokens=int(starts[-1]),
                max_query_len=max(query_lens),
                max_seq_len=100,
                block_table_tensor=cut(num_reqs, 3 + num_reqs % 2, dtype=torch.int32),
                slot_mapping=torch.zeros(0),
            )
            metadata = builder.build(0, common)
            assert metadata.num_decodes == num_reqs and metadata.prefill is None
            query = rows[: metadata.num_decode_tokens, : engine.num_heads]
            output = torch.empty_like(query, memory_format=torch.contiguous_format)
            for limit in {metadata.limit, None} if impl.config.dense_layers else {metadata.limit}:
                impl.ops.decode(query, planes, metadata, limit, output)


def cache_steps(engine: Engine, impl, planes) -> None:
    fused = impl.fused_qkv
    for num_tokens in (*range(1, 300), 1023, 1024, 1025, 2048, 2049, MAX_TOKENS):
        slots = cut(num_tokens - num_tokens // 9, dtype=torch.int64)
        positions = cut(num_tokens, dtype=torch.int64)
        width = engine.num_heads + 2 * engine.num_kv_heads
        qkv = torch.empty(num_tokens, width, HEAD_SIZE, dtype=engine.dtype)
        if fused is None:
            key, value = qkv[:, engine.num_heads :].split(engine.num_kv_heads, dim=1)
            impl.ops.write(key, value, planes, slots)
            continue
        qkv, heads = qkv.flatten(1), fused.heads
        if fused.starts_projected:
            rotated = qkv.new_empty(num_tokens, heads.query_size + heads.key_value_size)
            impl.ops.rope_and_write(qkv, positions, heads, planes, slots, rotated)
        elif num_tokens <= fused.largest_projected_batch:
            hidden, linear = qkv.new_empty(num_tokens, HIDDEN_SIZE), fused.attention.qkv_proj
            impl.ops.project_rope_and_write(hidden, linear, positions, heads, planes, slots, qkv)
        else:
            impl.ops.rope_and_write(qkv, positions, heads, planes, slots, qkv)
    for num_reqs, max_seq_len in ((1, 1), (2, 17), (5, 2048)):
        key = torch.empty(num_reqs * 16, engine.num_kv_heads, HEAD_SIZE, dtype=engine.dtype)
        table = cut(num_reqs, 2 + num_reqs, dtype=torch.int32)
        lengths = torch.zeros(num_reqs + 1, dtype=torch.int32)
        gather_kv(planes, table, lengths, max_seq_len, key, key)
        encode_keys(planes, table, lengths, lengths, max_seq_len, code_lag(1 + engine.num_drafts))


class Recorder:
    """Stands in for JITFunction.run."""

    def __init__(self):
        self.backend, self.binders, self.keys = make_backend(GPUTarget("cuda", 90, 32)), {}, set()

    def run(self, kernel: JITFunction, *args, grid, warmup: bool, **kwargs) -> None:
        if kernel not in self.binders:
            self.binders[kernel] = create_function_from_signature(
                kernel.signature, kernel.params, self.backend
            )
        _, specialization, options = self.binders[kernel](*args, **kwargs)
        self.keys.add((kernel.fn.__name__, str(specialization), str(options)))


def main() -> None:
    recorder = Recorder()
    JITFunction.run = lambda *args, **kwargs: recorder.run(*args, **kwargs)
    runtime.supports_pdl = lambda device: True
    torch.cuda.current_device = lambda: 0
    cuda_ops.load_flash_attention = lambda *given: None
    cuda_ops.current_workspace_manager = lambda: SimpleNamespace(
        get_simultaneous=lambda *wanted: [torch.empty(s, dtype=d) for s, d in wanted]
    )
    for engine in ENGINES:
        impl, config = make_layer(engine)
        pages = (3, engine.num_kv_heads, engine.page_size, impl.layout.bytes_per_token)
        planes = impl.layout.split(torch.zeros(pages, dtype=torch.uint8))
        recorder.keys = compiled = set()
        warmup.compile_kernels(impl, impl.planes_to_be(engine.page_size))
        recorder.keys = launched = set()
        decode_steps(engine, impl, config, planes)
        cache_steps(engine, impl, planes)
        names = sorted(name for name, *_ in launched)
        assert launched == compiled, (engine, launched - compiled, compiled - launched)
        print({name: names.count(name) for name in dict.fromkeys(names)}, flush=True)


if __name__ == "__main__":
    main()

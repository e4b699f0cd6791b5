"""Times decode attention beside FlashAttention 3 with a bf16 and an fp8 cache, on planted skips.

    python -m vllm_ffa_fp8fp8.bench_decode [--shapes 1x32768 8x131072] [--kept 1.0 0.1]

Checks every output against a float32 reference before it times it.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton

from .kernels.decode_attention import decode_attention
from .kernels.decode_plan import DecodeLimits, DecodePlan, DecodeScratch
from .kernels.kv_write import write_kv
from .kernels.page_layout import KVPlanes, PageLayout
from .kernels.reference import decode_attention_reference
from .kernels.tuning import DecodeTuning, decode_tuning

L2_BYTES = 160e6  # inputs of all sets together exceed this, so that no replay finds them in L2
DELTA = 5.0


@dataclass(frozen=True)
class Shape:
    """One decode batch: `batch` requests of `seq_len` tokens, of whose blocks `kept` are hot."""

    batch: int
    seq_len: int
    kept: float
    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    page_size: int = 64

    def floor_bytes(self, kept: float) -> float:
        """Least bytes: base of all blocks; residual and 16-bit V of the kept ones."""
        elements = self.batch * self.seq_len * self.num_kv_heads * self.head_size
        return elements * (1 + 3 * kept)


@dataclass
class Case:
    """Inputs of one launch: our cache, and the same keys and values for FlashAttention."""

    query: torch.Tensor
    planes: KVPlanes
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    key: torch.Tensor  # [num_pages, page_size, num_kv_heads, head_size]
    value: torch.Tensor


def make_case(shape: Shape, seed: int) -> Case:
    """Random keys of small scores; the first token and one token in each hot block score high.

    With delta = 5 exactly the hot blocks, the first and the last one are kept, since all query
    heads of a group share a direction that only those tokens point to.
    """
    device, dtype = torch.device("cuda"), torch.bfloat16
    generator = torch.Generator(device).manual_seed(seed)
    pages_per_request = -(-shape.seq_len // shape.page_size)
    num_pages = shape.batch * pages_per_request
    size = (num_pages, shape.page_size, shape.num_kv_heads, shape.head_size)
    options = {"generator": generator, "device": device}
    key = torch.randn(size, **options, dtype=dtype).mul_(0.3)
    value = torch.randn(size, **options, dtype=dtype)
    order = torch.randperm(num_pages, **options).to(torch.int32)
    block_table = order.view(shape.batch, pages_per_request)
    direction = torch.randn(shape.batch, shape.num_kv_heads, shape.head_size, **options)
    direction *= math.sqrt(shape.head_size) / direction.norm(dim=-1, keepdim=True)
    hot = torch.rand(shape.batch, pages_per_request, shape.num_kv_heads, **options) < shape.kept
    hot[:, 0] = True
    for request in range(shape.batch):
        page, head = hot[request].nonzero(as_tuple=True)
        row = torch.randint(0, shape.page_size, page.shape, **options)
        row[page == 0] = 0
        key[block_table[request, page].long(), row, head] = direction[request, head].to(dtype)
    group = shape.num_heads // shape.num_kv_heads
    query = direction.repeat_interleave(group, dim=1)
    query = (query + 0.3 * torch.randn(query.shape, **options)).to(dtype)

    layout = PageLayout(shape.head_size, dtype)
    cache = torch.empty(
        (num_pages, shape.num_kv_heads, shape.page_size, layout.bytes_per_token),
        dtype=torch.uint8, device=device,
    )  # fmt: skip
    planes = layout.split(cache)
    slots = torch.arange(num_pages * shape.page_size, device=device)
    for begin in range(0, len(slots), 1 << 20):
        tokens = slice(begin, begin + (1 << 20))
        write_kv(key.flatten(0, 1)[tokens], value.flatten(0, 1)[tokens], planes, slots[tokens])
    seq_lens = torch.full((shape.batch,), shape.seq_len, dtype=torch.int32, device=device)
    return Case(query, planes, block_table, seq_lens, key, value)


def make_cases(shape: Shape) -> list[Case]:
    """So many sets of inputs that together they exceed the L2 cache."""
    bytes_each = shape.floor_bytes(shape.kept)
    return [make_case(shape, seed) for seed in range(max(1, min(16, round(L2_BYTES / bytes_each))))]


def time_graph(launches, repeats: int = 40) -> float:
    """Median microseconds of one of `launches`, replayed together in one CUDA graph."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2] * 1e3 / len(launches)


class Decoder:
    """Our decode over the cases of one shape."""

    def __init__(self, shape: Shape, tuning: DecodeTuning, delta: float | None = DELTA, **options):
        device = torch.device("cuda")
        self.shape, self.options = shape, options
        limits = DecodeLimits(
            shape.batch, shape.seq_len, shape.num_heads, shape.num_kv_heads, shape.head_size,
            shape.page_size, torch.cuda.get_device_properties(0).multi_processor_count, tuning=tuning,
        )  # fmt: skip
        self.delta = None if delta is None else torch.tensor([delta], device=device)
        self.scratch = DecodeScratch.allocate(limits, device)
        seq_lens = torch.full((shape.batch,), shape.seq_len, device=device, dtype=torch.int32)
        self.plan = DecodePlan.allocate(limits, device).update(seq_lens)

    def launch(self, case: Case, output: torch.Tensor, counters: torch.Tensor | None = None):
        decode_attention(
            case.query, case.planes, case.block_table, case.seq_lens, self.plan, self.scratch,
            output, scale=case.query.shape[-1] ** -0.5, delta=self.delta, counters=counters,
            **self.options,
        )  # fmt: skip

    def check(self, case: Case) -> tuple[float, float]:
        """Relative error against the reference on two requests, and the measured kept fraction."""
        output = torch.full_like(case.query, float("nan"))
        counters = torch.zeros(2, dtype=torch.int64, device="cuda")
        self.launch(case, output, counters)
        some = slice(0, min(2, self.shape.batch))
        expected, _ = decode_attention_reference(
            case.query[some], case.planes, case.block_table[some], case.seq_lens[some],
            block_size=self.shape.page_size, scale=case.query.shape[-1] ** -0.5, delta=self.delta,
        )  # fmt: skip
        error = (output[some].float() - expected).norm() / expected.norm()
        assert error < 1e-2 and output.isfinite().all(), f"wrong output: error {error:.1e}"
        kept, total = counters.tolist()
        return error.item(), kept / total

    def profile(self, cases: list[Case]) -> str:
        """Mean microseconds of each kernel."""
        output = torch.empty_like(cases[0].query)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for case in cases * max(1, 8 // len(cases)):
                self.launch(case, output)
            torch.cuda.synchronize()
        return ", ".join(
            f"{event.key.removesuffix('_kernel')} {event.device_time_total / event.count:.1f}"
            for event in profiler.key_averages()
        )

    def time(self, cases: list[Case]) -> float:
        outputs = [torch.empty_like(case.query) for case in cases]
        return time_graph(
            [lambda c=c, o=o: self.launch(c, o) for c, o in zip(cases, outputs, strict=True)]
        )


def time_flash_attention(shape: Shape, cases: list[Case], fp8: bool) -> float:
    """FlashAttention 3 as vLLM calls it in decode; the better of its own and vLLM's schedule."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    device = torch.device("cuda")
    cu_query_lens = torch.arange(shape.batch + 1, dtype=torch.int32, device=device)
    descale = torch.ones(shape.batch, shape.num_kv_heads, device=device) if fp8 else None
    inputs = [
        (c.query.to(dtype), c.key.to(dtype), c.value.to(dtype), c.block_table, c.seq_lens)
        for c in cases
    ]
    outputs = [torch.empty_like(c.query) for c in cases]

    def launch(query, key, value, block_table, seq_lens, output, **schedule):
        flash_attn_varlen_func(
            query, key, value, 1, cu_query_lens, shape.seq_len, seqused_k=seq_lens,
            softmax_scale=shape.head_size**-0.5, causal=True, block_table=block_table, out=output,
            fa_version=3, q_descale=descale, k_descale=descale, v_descale=descale, **schedule,
        )  # fmt: skip

    times = []
    for splits in (0, 32):
        schedule = {}
        if splits:
            metadata = get_scheduler_metadata(
                batch_size=shape.batch, max_seqlen_q=1, max_seqlen_k=shape.seq_len,
                num_heads_q=shape.num_heads, num_heads_kv=shape.num_kv_heads,
                headdim=shape.head_size, cache_seqlens=cases[0].seq_lens, qkv_dtype=dtype,
                cu_seqlens_q=cu_query_lens, page_size=shape.page_size, causal=True,
                num_splits=splits,
            )  # fmt: skip
            schedule = {"scheduler_metadata": metadata, "num_splits": splits}
        launches = [
            lambda i=i, o=o, s=schedule: launch(*i, o, **s)
            for i, o in zip(inputs, outputs, strict=True)
        ]
        times.append(time_graph(launches))
    return min(times)


def read_bandwidth() -> float:
    """Bytes per microsecond that a large sum reads."""
    data = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    return data.nbytes / time_graph([lambda: data.sum()], repeats=10)


def environment() -> dict[str, str]:
    import vllm

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vllm": vllm.__version__,
    }


def bench(shape: Shape, bandwidth: float, tunings: dict[str, DecodeTuning], peers: bool) -> dict:
    """Times one shape; returns its row."""
    cases = make_cases(shape)
    row = {"shape": asdict(shape), "sets": len(cases), "us": {}, "error": {}}
    for name, tuning in tunings.items():
        decoder = Decoder(shape, tuning)
        row["error"][name], row["kept"] = decoder.check(cases[0])
        row["us"][name] = decoder.time(cases)
        row.setdefault("kernels", {})[name] = decoder.profile(cases)
    row["floor_us"] = shape.floor_bytes(row["kept"]) / bandwidth
    if peers:
        row["us"]["exact"] = Decoder(shape, next(iter(tunings.values())), delta=None).time(cases)
        row["us"]["fa3_bf16"] = time_flash_attention(shape, cases, fp8=False)
        row["us"]["fa3_fp8"] = time_flash_attention(shape, cases, fp8=True)
    return row


def _compiled() -> list[str]:
    """Registers, spills and shared memory of every compiled variant of the kernels."""
    from .kernels.decode_attend import decode_attend_kernel
    from .kernels.decode_scan import decode_scan_kernel

    return [
        f"{name} registers {k.n_regs} spills {k.n_spills} shared {k.metadata.shared} warps "
        f"{k.metadata.num_warps}"
        for name, kernel in (("scan", decode_scan_kernel), ("attend", decode_attend_kernel))
        for k in next(iter(kernel.device_caches.values()))[0].values()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["1x8192", "1x32768", "8x32768", "8x131072"])
    parser.add_argument("--kept", nargs="+", type=float, default=[0.1])
    parser.add_argument("--num-heads", type=int, default=32)
    parser.add_argument("--num-kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--vary", nargs="*", default=[], help="name=value,... of DecodeTuning")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    base = decode_tuning(args.head_size, args.page_size)
    tunings = {"ours": base}
    for text in args.vary:
        changes = {n: int(v) for n, v in (item.split("=") for item in text.split(","))}
        tunings[text] = replace(base, **changes)
    bandwidth = read_bandwidth()
    print(environment(), f"read bandwidth {bandwidth / 1e6:.2f} TB/s")
    rows = []
    for text in args.shapes:
        batch, seq_len = map(int, text.split("x"))
        for kept in args.kept:
            shape = Shape(
                batch, seq_len, kept, args.num_heads, args.num_kv_heads, args.head_size,
                args.page_size,
            )  # fmt: skip
            row = bench(shape, bandwidth, tunings, not args.no_peers)
            rows.append(row)
            times = "  ".join(
                f"{name} {us:.1f} ({row['floor_us'] / us:.2f})" for name, us in row["us"].items()
            )
            print(
                f"{text} kept {row['kept']:.3f} floor {row['floor_us']:.1f} us: {times}", flush=True
            )
            for name, kernels in row["kernels"].items():
                print(f"    {name}: {kernels}")
            torch.cuda.empty_cache()
    for kernel in _compiled():
        print(kernel)
    if args.json:
        args.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

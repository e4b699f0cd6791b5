"""Projection to cache write, checked and timed: vLLM's linear and rotary kernel with our cache
write, the linear with one kernel for the rest, and one kernel for all."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from vllm_ffa_fp8fp8.bench.inputs import L2_BYTES
from vllm_ffa_fp8fp8.bench.model_shapes import PROJECTIONS
from vllm_ffa_fp8fp8.bench.sweep import parse_tuning
from vllm_ffa_fp8fp8.bench.timing import time_graph
from vllm_ffa_fp8fp8.kernels.cache.kv_write import write_kv
from vllm_ffa_fp8fp8.kernels.cache.page_layout import KVPlanes, PageLayout
from vllm_ffa_fp8fp8.kernels.cache_reference import gather_kv_reference
from vllm_ffa_fp8fp8.kernels.projection.project_write import (
    ProjectionScratch,
    project_rope_and_write,
)
from vllm_ffa_fp8fp8.kernels.projection.qkv_heads import QKVHeads
from vllm_ffa_fp8fp8.kernels.projection.reference import rotate_reference
from vllm_ffa_fp8fp8.kernels.projection.rope_write import rope_and_write
from vllm_ffa_fp8fp8.kernels.projection.tuning import (
    ProjectionTuning,
    RopeWriteTuning,
    largest_projected_batch,
    projection_tuning_on,
    rope_write_tuning,
)

PAGE_SIZE = 64
HEAD_SIZE = 128
CHECKED_TOKENS = 128
ERROR = 1e-2  # of the largest element; bf16 rounds to 2^-8


@dataclass
class Case:
    """Inputs of one launch, and where it writes."""

    hidden: torch.Tensor  # [num_tokens, hidden_size]
    weight: torch.Tensor  # [width, hidden_size]
    positions: torch.Tensor
    slots: torch.Tensor
    planes: KVPlanes
    output: torch.Tensor  # [num_tokens, width]


class Bench:
    """The ways from hidden states to the cache, for one model and batch."""

    def __init__(self, model: str, num_tokens: int, weights: list[torch.Tensor]):
        self.hidden_size, num_heads, num_kv_heads = PROJECTIONS[model]
        device, dtype = torch.device("cuda"), torch.bfloat16
        frequency = 5e5 ** (-torch.arange(0, HEAD_SIZE, 2, device=device) / HEAD_SIZE)
        angles = torch.arange(131_072, device=device)[:, None] * frequency
        cos_sin = torch.cat((angles.cos(), angles.sin()), -1).to(dtype)
        self.heads = QKVHeads(num_heads, num_kv_heads, HEAD_SIZE, cos_sin)
        self.width = self.heads.num_all_heads * HEAD_SIZE
        self.num_tokens = num_tokens
        self.layout = PageLayout(HEAD_SIZE, dtype)
        self.num_pages = -(-num_tokens // PAGE_SIZE) * 2
        generator = torch.Generator(device).manual_seed(0)
        self.cases = [self._case(weight, generator) for weight in weights]

    def _case(self, weight: torch.Tensor, generator: torch.Generator) -> Case:
        options = {"generator": generator, "device": "cuda"}
        shape = (self.num_pages, self.heads.num_kv_heads, PAGE_SIZE, self.layout.bytes_per_token)
        cache = torch.zeros(shape, dtype=torch.uint8, device="cuda")
        slots = torch.randperm(self.num_pages * PAGE_SIZE, **options)
        if self.num_tokens > PAGE_SIZE:  # a prompt's tokens lie in order in their pages
            pages = torch.randperm(self.num_pages, **options)[:, None] * PAGE_SIZE
            slots = (pages + torch.arange(PAGE_SIZE, device="cuda")).flatten()
        return Case(
            torch.randn(self.num_tokens, self.hidden_size, **options, dtype=torch.bfloat16),
            weight,
            torch.randint(0, 131_072, (self.num_tokens,), **options),
            slots[: self.num_tokens],
            self.layout.split(cache),
            torch.empty(self.num_tokens, self.width, dtype=torch.bfloat16, device="cuda"),
        )

    def unfused(self, case: Case) -> torch.Tensor:
        qkv = torch.nn.functional.linear(case.hidden, case.weight)
        self.unfused_rest(case, qkv)
        return qkv

    def unfused_rest(self, case: Case, qkv: torch.Tensor) -> None:
        from vllm import _custom_ops as ops

        query, key, value = qkv.split(
            [self.heads.query_size, self.heads.key_value_size, self.heads.key_value_size], -1
        )
        ops.rotary_embedding(case.positions, query, key, HEAD_SIZE, self.heads.cos_sin_cache, True)
        key, value = (t.unflatten(1, (-1, HEAD_SIZE)) for t in (key, value))
        write_kv(key, value, case.planes, case.slots)

    def linear_and_one_kernel(
        self, tuning: RopeWriteTuning | None = None
    ) -> Callable[[Case], torch.Tensor]:
        def launch(case: Case) -> torch.Tensor:
            qkv = torch.nn.functional.linear(case.hidden, case.weight)
            rope_and_write(qkv, case.positions, self.heads, case.planes, case.slots, qkv, tuning)
            return qkv

        return launch

    def one_kernel(self, tuning: ProjectionTuning) -> Callable[[Case], torch.Tensor]:
        scratch = ProjectionScratch.allocate(self.num_tokens, self.heads, tuning)

        def launch(case: Case) -> torch.Tensor:
            project_rope_and_write(
                case.hidden, case.weight, None, case.positions, self.heads, case.planes,
                case.slots, case.output, scratch, tuning,
            )  # fmt: skip
            return case.output

        return launch

    def check(self, launch: Callable[[Case], torch.Tensor], case: Case) -> float:
        """The largest error of Q, K, V and of the cached K and V, relative to the largest
        element; asserts that it is small."""
        for plane in (case.planes.key, case.planes.value):
            plane.view(torch.uint8).zero_()
        some = slice(None, None, max(1, self.num_tokens // CHECKED_TOKENS))
        output = launch(case)[some]
        exact = case.hidden[some].double() @ case.weight.double().T
        count, groups = self.heads.num_heads, self.heads.num_kv_heads
        expected = exact.unflatten(1, (-1, HEAD_SIZE)).split([count, groups, groups], 1)
        positions = case.positions[some]
        query, key = (
            rotate_reference(x, positions, self.heads, None, torch.float64) for x in expected[:2]
        )
        expected = torch.cat((query, key, expected[2]), 1)
        found = output.unflatten(1, (-1, HEAD_SIZE)).double()
        pages = torch.arange(self.num_pages, device="cuda")
        cached = gather_kv_reference(case.planes, pages, self.num_pages * PAGE_SIZE, torch.float64)
        cached = torch.cat([plane[case.slots[some]] for plane in cached], 1)
        errors = (found - expected, cached - expected[:, count:])
        error = max(difference.abs().max() for difference in errors) / expected.abs().max()
        assert error < ERROR, f"wrong output: error {error:.1e}"
        return error.item()

    def time(self, launch: Callable[[Case], torch.Tensor]) -> float:
        return time_graph([lambda case=case: launch(case) for case in self.cases])


def make_weights(model: str) -> list[torch.Tensor]:
    """So many weight matrices that together they exceed the L2 cache."""
    hidden_size, num_heads, num_kv_heads = PROJECTIONS[model]
    width = (num_heads + 2 * num_kv_heads) * HEAD_SIZE
    count = 1 + int(L2_BYTES / (width * hidden_size * 2))
    shape = (count, width, hidden_size)
    weights = torch.randn(shape, dtype=torch.bfloat16, device="cuda").mul_(hidden_size**-0.5)
    return list(weights)


def varied(base, texts: list[str]) -> dict[str, object]:
    """`base` under the name "default", and with each text's name=value,... changed."""
    return {"default": base} | {t: replace(base, **parse_tuning(t, type(base))) for t in texts}


def bench_decode_step(model, num_tokens, weights, bandwidth, vary) -> dict:
    bench = Bench(model, num_tokens, weights)
    launches = {"unfused": bench.unfused, "linear + kernel": bench.linear_and_one_kernel()}
    base = projection_tuning_on(torch.device("cuda"), bench.heads.num_all_heads, bench.hidden_size)
    tunings = varied(base, vary)
    for name, tuning in tunings.items():
        launches[f"one kernel, {name}"] = bench.one_kernel(tuning)
    errors = {name: bench.check(launch, bench.cases[0]) for name, launch in launches.items()}
    times = {name: bench.time(launch) for name, launch in launches.items()}
    # a second round, so that drift of the clocks is seen by all
    times = {name: min(us, bench.time(launches[name])) for name, us in times.items()}
    floor = bench.cases[0].weight.nbytes / bandwidth
    return {
        "model": model, "hidden_size": bench.hidden_size, "tokens": num_tokens,
        "floor_us": round(floor, 2), "us": rounded(times),
        "error": {name: float(f"{error:.2g}") for name, error in errors.items()},
        "auto": num_tokens <= largest_projected_batch(bench.hidden_size),
        "tunings": {name: asdict(tuning) for name, tuning in tunings.items()},
    }  # fmt: skip


def bench_prefill(model, num_tokens, weights, copy_bandwidth, vary) -> dict:
    """Rotation, split and write of projections that are there."""
    bench = Bench(model, num_tokens, weights[:2])
    tunings = varied(rope_write_tuning(num_tokens), vary)
    for check in (bench.unfused, *map(bench.linear_and_one_kernel, tunings.values())):
        bench.check(check, bench.cases[0])
    for case in bench.cases:
        torch.nn.functional.linear(case.hidden, case.weight, out=case.output)
    launches = {"unfused": lambda case: bench.unfused_rest(case, case.output)}
    for name, tuning in tunings.items():

        def launch(case: Case, tuning: RopeWriteTuning = tuning) -> None:
            rope_and_write(
                case.output, case.positions, bench.heads, case.planes, case.slots, case.output,
                tuning,
            )  # fmt: skip

        launches[f"one kernel, {name}"] = launch
    heads = bench.heads
    rotated = 2 * (heads.query_size + heads.key_value_size)
    cached = heads.num_kv_heads * bench.layout.bytes_per_token
    moved = num_tokens * (2 * bench.width + rotated + cached + 2 * HEAD_SIZE + 16)
    times = {name: bench.time(launch) for name, launch in launches.items()}
    times = {name: min(us, bench.time(launches[name])) for name, us in times.items()}
    floor = moved / copy_bandwidth
    return {
        "model": model, "tokens": num_tokens, "bytes": moved, "floor_us": round(floor, 2),
        "us": rounded(times),
    }  # fmt: skip


def rounded(times: dict[str, float]) -> dict[str, float]:
    return {name: round(us, 2) for name, us in times.items()}

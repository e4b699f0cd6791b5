"""The ways in which the launchers call the kernels, with tensors of the CPU in place of a GPU's."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from cases import Case, empty_cache, own_layer
from qkv_cases import QKVCase

from vllm_ffa_fp8fp8.bench import base_read
from vllm_ffa_fp8fp8.bench.cells import Geometry, Shape
from vllm_ffa_fp8fp8.bench.inputs import Inputs
from vllm_ffa_fp8fp8.kernels import (
    DecodeLimits,
    DecodePlan,
    DecodeScratch,
    KVPlanes,
    ProjectionScratch,
    attn_forward_decode_fp8fp8,
    decode_attention,
    encode_keys,
    gather_kv,
    project_rope_and_write,
    rope_and_write,
    write_kv,
)
from vllm_ffa_fp8fp8.kernels.counters import new_counters
from vllm_ffa_fp8fp8.kernels.decode import dense
from vllm_ffa_fp8fp8.kernels.projection.tuning import (
    MAX_PROJECTED_TOKENS,
    PROGRAMS_PER_PROCESSOR,
    projection_tuning,
)

from .launches import Variant

MAIN, SHAPES, ALL = "main", "shapes", "all"
EXTENTS = (MAIN, SHAPES, ALL)
"""The main shape in its main ways; the largest shapes beside it; all that compiles otherwise."""

CPU = torch.device("cpu")
SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes that a program can have, by compute capability."""
NUM_PAGES, MAX_PAGES = 4, 128
HIDDEN_SIZE = 4096


@dataclass(frozen=True)
class DecodeCall:
    """A call of `decode_attention`. `threshold`: as its `precomputed_threshold`, or "given"."""

    case: Case
    capability: int
    num_reqs: int = 8
    rule: str = "threshold"
    threshold: bool | str = False
    limit_of_each: bool = False
    counts: bool = False
    batch_invariant: bool = False
    uneven: bool = False  # query tokens
    sinks: bool = False
    logits_soft_cap: float | None = None

    @property
    def limits(self) -> DecodeLimits:
        case, planes = self.case, empty_planes(self.case)
        return DecodeLimits(
            self.num_reqs, MAX_PAGES * case.page_size, case.num_kv_heads * case.group,
            case.num_kv_heads, case.head_size, case.block_size, 132, case.query_len,
            self.batch_invariant, self.rule, planes.key.itemsize, planes.value.itemsize,
            divmod(self.capability, 10), SHARED_MEMORY[self.capability],
        )  # fmt: skip

    @property
    def programs(self) -> int:
        tuning = self.limits.tuning_of(self.num_reqs)
        if self.rule == "none":
            return tuning.dense_programs_per_processor
        return tuning.programs_per_processor

    def __call__(self) -> None:
        case, limits, num_reqs = self.case, self.limits, self.num_reqs
        query = packed_heads(case, num_reqs * case.query_len)[:, : case.group * case.num_kv_heads]
        seq_lens = torch.ones(num_reqs, dtype=torch.int32)
        limit = torch.ones(num_reqs if self.limit_of_each else 1)
        given = torch.zeros(query.shape[:2]) if self.threshold == "given" else self.threshold
        decode_attention(
            query,
            empty_planes(case),
            torch.zeros(num_reqs, MAX_PAGES, dtype=torch.int32),
            seq_lens,
            DecodePlan.allocate(limits, CPU).update(seq_lens),
            DecodeScratch.allocate(limits, CPU),
            torch.empty(query.shape, dtype=query.dtype),
            scale=case.scale,
            delta=limit if self.rule == "threshold" else None,
            tau=limit if self.rule == "share" else None,
            query_start_loc=torch.zeros(num_reqs + 1, dtype=torch.int32) if self.uneven else None,
            query_len=case.query_len,
            sinks=torch.zeros(query.shape[1], dtype=case.dtype) if self.sinks else None,
            logits_soft_cap=self.logits_soft_cap,
            min_context=1024,
            precomputed_threshold=given,
            counters=new_counters(case.num_kv_heads, CPU) if self.counts else None,
            launch_pdl=True,
        )


def empty_planes(case: Case) -> KVPlanes:
    return case.layout.split(own_layer(empty_cache(case, NUM_PAGES), case.interleaved))


def packed_heads(case: Case, num_tokens: int) -> torch.Tensor:
    """Q, K and V as a projection gives them, `[num_tokens, heads, head_size]`."""
    num_heads = (case.group + 2) * case.num_kv_heads
    return torch.zeros(num_tokens, num_heads, case.head_size, dtype=case.dtype)


def write(case: Case, num_tokens: int) -> None:
    num_heads = case.group * case.num_kv_heads
    key, value = packed_heads(case, num_tokens)[:, num_heads:].split(case.num_kv_heads, 1)
    write_kv(key, value, empty_planes(case), torch.arange(num_tokens))


def gather(case: Case) -> None:
    key, value = torch.empty(2, 64, case.num_kv_heads, case.head_size, dtype=case.dtype)
    block_table = torch.zeros(2, MAX_PAGES, dtype=torch.int32)
    gather_kv(empty_planes(case), block_table, torch.zeros(3, dtype=torch.int32), 64, key, value)


def rotate(case: QKVCase, in_place: bool = True, writes: bool = True) -> None:
    qkv = packed_heads(case, case.num_tokens).flatten(1)
    planes, slots = empty_planes(case), torch.arange(case.num_tokens)
    rope_and_write(
        qkv, torch.zeros_like(slots), case.heads("cpu"), planes if writes else None,
        slots if writes else None, qkv if in_place else torch.empty_like(qkv),
    )  # fmt: skip


def project(case: QKVCase, shared_memory: int, writes: bool = True) -> None:
    heads, slots = case.heads("cpu"), torch.arange(case.num_tokens)
    tuning = projection_tuning(heads.num_all_heads, case.hidden_size, shared_memory=shared_memory)
    hidden = torch.zeros(case.num_tokens, case.hidden_size, dtype=case.dtype)
    weight = torch.zeros(case.width, case.hidden_size, dtype=case.dtype)
    bias = torch.zeros(case.width, dtype=case.dtype) if case.bias else None
    project_rope_and_write(
        hidden, weight, bias, torch.zeros_like(slots), heads,
        empty_planes(case) if writes else None, slots if writes else None,
        packed_heads(case, case.num_tokens).flatten(1),
        ProjectionScratch.allocate(case.num_tokens, heads, tuning), tuning,
    )  # fmt: skip


def encode(case: Case) -> None:
    starts, block_table = torch.zeros(3, dtype=torch.int32), torch.zeros(2, 4, dtype=torch.int32)
    encode_keys(empty_planes(case), block_table, starts, starts, 64, 2)


def read_base(case: Case) -> None:
    shape = Shape(Geometry(case.group * case.num_kv_heads, case.num_kv_heads), 8, case.page_size)
    block_table = torch.zeros(shape.batch, shape.pages, dtype=torch.int32)
    inputs = Inputs(packed_heads(case, shape.batch), None, None, block_table, None, 0)
    planes = case.layout.split(torch.zeros_like(own_layer(empty_cache(case, NUM_PAGES), False)))
    with patch.object(base_read, "time_graph", lambda launches: 0.0):
        base_read.time_base_read(shape, [inputs], [planes])


def attend_tensors(case: Case) -> None:
    query = torch.zeros(2, 1, case.group * case.num_kv_heads, case.head_size, dtype=case.dtype)
    key = torch.zeros(2, 256, case.num_kv_heads, case.head_size).to(torch.float8_e4m3fn)
    with patch.object(dense, "INTERPRETED", True):  # or it asks for a GPU
        attn_forward_decode_fp8fp8(query, key, key.to(case.dtype), k_residual=key)


def odd_cases(main: Case) -> dict[str, Case]:
    """Pages that are not of whole blocks, an odd group; less than a tile has."""
    odd = replace(main, head_size=96, group=7, num_kv_heads=1, page_size=48, block_size=32)
    return {"head size 96, pages of 48": odd, "head size 64": replace(main, head_size=64)}


def large_cases(main: Case) -> dict[str, Case]:
    """Most memory; the most query rows that the backend asks for."""
    wide = replace(main, head_size=256, num_kv_heads=1)
    long = replace(main, group=8, query_len=8)
    return {
        "head size 256, blocks of 128": replace(wide, page_size=128, block_size=128),
        "head size 80, 64 rows, FP8 V": replace(long, head_size=80, fp8_value=main.fp8_key),
        "head size 256, 64 rows": replace(wide, group=8, query_len=8),
        "float16, blocks of 16, 32 rows": replace(
            main, dtype=torch.float16, block_size=16, query_len=8
        ),
    }


def main_case(capability: int) -> Case:
    """32 query heads over 8 KV heads, pages and blocks of 64 tokens; no FP8 before 8.9."""
    fp8 = capability >= 89
    return Case(head_size=128, num_kv_heads=8, fp8_key=fp8, residual=fp8)


def decode_variants(capability: int, extent: str) -> Iterator[Variant]:
    main = main_case(capability)
    fp8_value = replace(main, fp8_value=main.fp8_key)

    def decode(name: str, case: Case = main, **options) -> Variant:
        call = DecodeCall(case, capability, **options)
        return Variant(f"decode {name}", call, call.programs)

    yield decode("pruned")
    yield decode("dense", rule="none")
    yield decode("pruned, FP8 V", fp8_value)
    yield decode("pruned, threshold kernel", threshold=True)
    small = replace(main, block_size=16)
    yield decode("share", rule="share")
    yield decode("share, blocks of 16", small, rule="share")
    yield decode("share, blocks of 16, codes", replace(small, key_code=True), rule="share")
    if extent == MAIN:
        return
    for name, case in large_cases(main).items():
        yield decode(f"pruned, {name}", case)
    if extent == SHAPES:
        return
    for name, case in odd_cases(main).items():
        yield decode(f"pruned, {name}", case)
    half, long = replace(main, dtype=torch.float16), replace(main, query_len=8)
    yield decode("pruned, few requests", num_reqs=1)
    yield decode("pruned, few requests, FP8 V", fp8_value, num_reqs=1)
    yield decode("pruned, many requests", num_reqs=256)
    yield decode("dense, few requests", rule="none", num_reqs=1)
    yield decode("dense, FP8 V", fp8_value, rule="none")
    yield decode("pruned, float16", half)
    yield decode("dense, float16", half, rule="none")
    yield decode("pruned, 4 query tokens", replace(main, query_len=4))
    yield decode("pruned, up to 8 query tokens", long, uneven=True)
    yield decode("dense, up to 8 query tokens", long, uneven=True, rule="none")
    yield decode("pruned, threshold given", threshold="given")
    yield decode("pruned, delta of each request, counted", limit_of_each=True, counts=True)
    yield decode("pruned, batch invariant", batch_invariant=True)
    for name, rule in {"pruned": "threshold", "share": "share", "dense": "none"}.items():
        yield decode(f"{name}, sinks", rule=rule, sinks=True)
        yield decode(f"{name}, soft cap", rule=rule, logits_soft_cap=50.0)
    yield decode("pruned, no residual", replace(main, residual=False))
    yield decode("share, few requests", rule="share", num_reqs=1)
    yield decode("share, blocks of 16, few requests", small, rule="share", num_reqs=1)
    yield decode("share, FP8 V", fp8_value, rule="share")
    yield decode("share, float16", half, rule="share")
    yield decode("share, up to 8 query tokens", long, rule="share", uneven=True)
    yield decode(
        "share, tau of each request, counted", small, rule="share", limit_of_each=True, counts=True
    )
    yield from (
        decode(f"share, codes, {name}", replace(case, key_code=True), rule="share", **options)
        for name, case, options in (
            ("few requests", small, {"num_reqs": 1}),
            ("head size 64", replace(small, head_size=64), {}),
            ("head size 80", replace(small, head_size=80), {}),
            ("head size 256", replace(small, head_size=256, num_kv_heads=1), {}),
            ("float16", replace(small, dtype=torch.float16), {}),
            ("up to 8 query tokens", replace(small, query_len=8), {"uneven": True}),
            ("blocks of 64, pages of 128", replace(main, page_size=128), {}),
        )
    )
    wide = large_cases(main)["head size 256, blocks of 128"]
    yield decode("dense, head size 256, blocks of 128", wide, rule="none")
    yield Variant("decode tensors", lambda: attend_tensors(main), 2)


def cache_variants(capability: int, extent: str) -> Iterator[Variant]:
    main = main_case(capability)
    caches = {"": main}
    if extent == ALL:
        caches[", FP8 V"] = replace(main, fp8_value=main.fp8_key)
        caches[", no residual"] = replace(main, residual=False)
        caches[", float16"] = replace(main, dtype=torch.float16)
        shapes = odd_cases(main) | large_cases(main)
        for name in ("head size 96, pages of 48", "head size 256, blocks of 128"):
            caches[f", {name}"] = shapes[name]
    for name, case in caches.items():
        yield Variant(f"write few tokens{name}", lambda case=case: write(case, 8))
        yield Variant(f"write many tokens{name}", lambda case=case: write(case, 2048))
        yield Variant(f"gather{name}", lambda case=case: gather(case))
    coded = replace(main, key_code=True)
    yield Variant("encode keys", lambda: encode(coded))
    if extent == ALL:
        yield Variant("encode keys, head size 80", lambda: encode(replace(coded, head_size=80)))
    if main.fp8_key:
        yield Variant("read the base", lambda: read_base(main), DecodeCall(main, 90).programs)


def projection_variants(capability: int, extent: str) -> Iterator[Variant]:
    shared = SHARED_MEMORY[capability]
    main = vars(main_case(capability)) | {"hidden_size": HIDDEN_SIZE}

    def rotates(name: str, *options, **shape) -> Variant:
        case = QKVCase(**main | shape)
        return Variant(f"rotate {name}", lambda: rotate(case, *options))

    def projects(num_tokens: int, name: str = "", writes: bool = True, **shape) -> Variant:
        case = QKVCase(**main | shape, num_tokens=num_tokens)
        programs = PROGRAMS_PER_PROCESSOR if num_tokens <= 16 and capability >= 90 else 1
        call = lambda: project(case, shared, writes)  # noqa: E731
        return Variant(f"project {num_tokens} tokens{name}", call, programs)

    yield rotates("few tokens")
    yield rotates("many tokens", num_tokens=256, norm=True)
    yield projects(1)
    yield projects(MAX_PROJECTED_TOKENS, ", norm, bias", norm=True, bias=True)
    if extent != ALL:
        return
    yield rotates("few tokens, not in place", False)
    yield rotates("few tokens, no cache", True, False)
    yield rotates("few tokens, norm", norm=True)
    yield rotates("many tokens", num_tokens=256)
    yield rotates("many tokens, FP8 V", num_tokens=256, fp8_value=capability >= 89)
    yield rotates("many tokens, pages of 48", num_tokens=256, page_size=48)
    yield projects(1, ", no cache", writes=False)
    yield projects(4)
    yield projects(16)
    yield projects(16, ", norm, bias", norm=True, bias=True)
    yield projects(16, ", FP8 V", fp8_value=capability >= 89)
    yield projects(16, ", head size 80", head_size=80, hidden_size=HIDDEN_SIZE - 96)


def variants(capability: int, extent: str = ALL) -> Iterator[Variant]:
    yield from decode_variants(capability, extent)
    yield from cache_variants(capability, extent)
    yield from projection_variants(capability, extent)

"""Decode in a CUDA graph, and plans that are used again."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from cases import Case, make_batch, poisoned_scratch
from truth import assert_within_budget, choose_delta, plain_attention, reference

from vllm_ffa_fp8fp8.kernels import DecodePlan, decode_attention


class Step:
    """One decode step over buffers that keep their addresses from batch to batch."""

    def __init__(self, case: Case, device: str):
        batch = make_batch(case)
        self.case, self.device = case, device
        self.storage = batch.storage.to(device)
        self.planes = case.layout.split(self.storage[1])
        self.limits = case.limits(132 if device == "cuda" else 2)
        self.plan = DecodePlan.allocate(self.limits, torch.device(device))
        self.scratch = poisoned_scratch(self.limits, device)
        self.query = batch.query().contiguous().to(device)
        dtype = case.dtype if device == "cuda" else torch.float32
        self.output = torch.empty_like(self.query, dtype=dtype)
        self.block_table = batch.block_table.to(device)
        self.seq_lens = batch.seq_lens.to(device)
        self.delta = choose_delta(batch).to(device)

    def load(self, batch) -> None:
        pages, columns = batch.storage.shape[1], batch.block_table.shape[1]
        self.storage[:, :pages] = batch.storage.to(self.device)
        self.query.copy_(batch.query())
        self.block_table[:, :columns] = batch.block_table.to(self.device)
        self.seq_lens.copy_(batch.seq_lens)
        self.delta.copy_(choose_delta(batch))

    def __call__(self) -> None:
        decode_attention(
            self.query,
            self.planes,
            self.block_table,
            self.seq_lens,
            self.plan.update(self.seq_lens),
            self.scratch,
            self.output,
            scale=self.case.scale,
            delta=self.delta,
        )

    def check(self, batch) -> None:
        delta = self.delta.cpu()
        exact, kept = reference(batch, delta)
        output = self.output.to("cpu", batch.case.dtype)
        assert_within_budget(output, exact, plain_attention(batch, kept))
        assert not self.plan.arrivals.any()


LARGEST = Case((260, 233, 260), block_size=16, num_kv_heads=1)
DRAFTS = dataclasses.replace(LARGEST, group=3, query_len=5)
MANY = Case((700,) * 64, block_size=64, query_len=2)  # a GPU's


def batches(largest: Case) -> list:
    """Batches within the largest one, padding and shortest requests among them."""
    count, longest, shortest = len(largest.lengths), max(largest.lengths), largest.query_len
    lengths = ((200, 0, 17), (shortest, longest, 0), (64, 63, 65), (0, 0, 0), (longest, 9, 233))
    return [
        make_batch(dataclasses.replace(largest, lengths=(one * count)[:count], seed=seed))
        for seed, one in enumerate(lengths)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("largest", [LARGEST, DRAFTS], ids=["one token", "five tokens"])
def test_a_plan_is_used_again(device, largest):
    step = Step(largest, device)
    addresses = [step.plan.work.data_ptr(), step.plan.arrivals.data_ptr()]
    for batch in batches(largest):
        step.load(batch)
        step()
        step.check(batch)
    plan = step.plan.update(step.seq_lens)
    assert [plan.work.data_ptr(), plan.arrivals.data_ptr()] == addresses


@pytest.mark.gpu
@pytest.mark.parametrize("largest", [LARGEST, DRAFTS, MANY], ids=["one token", "five", "many"])
def test_graph(largest):
    """Captured once, plan included; every batch replays it on buffers filled in place."""
    step = Step(largest, "cuda")
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for batch in batches(largest):
        step.load(batch)
        for _ in range(3):  # each leaves the arrivals as it found them
            step.output.fill_(float("nan"))
            graph.replay()
        step.check(batch)
        replayed = step.output.clone()
        step()
        assert torch.equal(step.output, replayed)


COPIED_WORDS = 16_384
"""Words that a program copies."""


@triton.jit
def _copy_late(target_ptr, source_ptr, num_words, BLOCK: tl.constexpr):
    """Lets the next kernel start, sleeps for 100 us, then copies."""
    tl.extra.cuda.gdc_launch_dependents()
    tl.inline_asm_elementwise(
        """{
        .reg .u64 begin, now; .reg .pred early;
        mov.u64 begin, %globaltimer;
        sleep: nanosleep.u32 1000;
        mov.u64 now, %globaltimer;
        sub.u64 now, now, begin;
        setp.lt.u64 early, now, 100000;
        @early bra sleep;
        mov.b32 $0, 0;
        }""",
        "=r", [], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    words = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(source_ptr + words, mask=words < num_words)
    tl.store(target_ptr + words, source, mask=words < num_words)


@pytest.mark.gpu
@pytest.mark.parametrize("late", ["query", "cache"])
@pytest.mark.parametrize("prune", [True, False], ids=["pruned", "dense"])
def test_an_early_launch_waits_for_what_the_kernel_ahead_writes(prune, late):
    case = Case((1000, 900, 300), num_kv_heads=3)  # of one or two, dense ones do not start early
    step = Step(case, "cuda")
    plan = step.plan.update(step.seq_lens)
    written = {"query": step.query, "cache": step.storage[1]}[late]
    words = written.flatten(2).view(torch.int32)
    programs = triton.cdiv(words.numel(), COPIED_WORDS)
    # decode starts on multiprocessors that have nothing to copy
    assert programs <= torch.cuda.get_device_properties("cuda").multi_processor_count // 2
    sources = [words.roll(turn, dims=1) for turn in range(3)]  # other heads' queries or cache

    def decode(output, **options) -> None:
        decode_attention(
            step.query, step.planes, step.block_table, step.seq_lens, plan, step.scratch, output,
            scale=case.scale, delta=step.delta if prune else None, **options,
        )  # fmt: skip

    expected, outputs = torch.empty(2, 3, *step.query.shape, dtype=case.dtype, device="cuda")
    for source, output in zip(sources, expected, strict=True):
        words.copy_(source)
        decode(output)
    assert not torch.equal(expected[0], expected[1]) and not torch.equal(expected[1], expected[2])

    def run() -> None:
        for source, output in zip(sources, outputs, strict=True):
            _copy_late[(programs,)](words, source, source.numel(), COPIED_WORDS, num_warps=16)
            decode(output, launch_pdl=True)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        outputs.fill_(float("nan"))
        graph.replay()
        assert torch.equal(outputs, expected)

"""Random layers and steps, and as many of them as are asked for."""

import os

import hypothesis
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer import MAX_REQS, Shape
from steps import Arrival, Engine, Step

CASES = int(os.environ.get("FFA_FUZZ_CASES", "40"))
SEED = int(os.environ.get("FFA_FUZZ_SEED", "0"))

PHASES = (hypothesis.Phase.generate, hypothesis.Phase.shrink)
PAGES_AND_BLOCKS = [(16, 16), (32, 16), (32, 32), (64, 32), (64, 64), (48, 16)]
OF_CODES = [(64, 16), (64, 64), (128, 32)]


@st.composite
def shapes(draw, limits) -> Shape:
    options = draw(limits)
    has_codes = "scan" in options
    page_size, block_size = draw(st.sampled_from(OF_CODES if has_codes else PAGES_AND_BLOCKS))
    options |= {
        "block_size": block_size,
        "min_context": draw(st.sampled_from([0, 40])),
        "use_fp8_residual": draw(st.sampled_from([True, True, False])),
        "v_cache_dtype": draw(st.sampled_from(["auto", "auto", "fp8"])),
    }
    if "delta" in options:
        options["precomputed_threshold"] = draw(st.booleans())
    return Shape(
        options,
        page_size,
        group=draw(st.sampled_from([1, 2, 3, 4])),
        num_kv_heads=draw(st.sampled_from([1, 1, 1, 2])),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.bfloat16, torch.float16])),
        drafts=draw(st.sampled_from([0, 0, 1, 3])),
        num_processors=draw(st.integers(1, 3)),
        min_blocks=draw(st.integers(1, 4)),
        chunk_blocks=draw(st.sampled_from([1, 2, 8])),
        scan_tokens=draw(st.sampled_from([32, 64])),
    )


@st.composite
def steps(draw, drafts: int, is_first: bool, has_codes: bool) -> Step:
    tokens, grown = st.integers(1, 40), st.integers(1, 24)
    if has_codes:  # of runs of 64 tokens: just before and behind their ends, and more at a time
        near = st.integers(-drafts - 2, 2)
        tokens = st.builds(lambda runs, by: 64 * runs + by, st.integers(1, 2), near)
        grown = st.integers(1, 70)
    arrival = st.builds(Arrival, tokens, st.integers(0, 2))
    verified = st.sampled_from([1, *range(2 + drafts)])
    growth = st.one_of(st.just(1), verified, grown)
    rows = {"min_size": MAX_REQS, "max_size": MAX_REQS}
    return Step(
        frozenset(draw(st.sets(st.integers(0, MAX_REQS), max_size=1))),
        tuple(draw(st.lists(arrival, min_size=3 * is_first, max_size=5 if is_first else 1))),
        tuple(draw(st.lists(growth if draw(st.booleans()) else verified, **rows))),
        tuple(draw(st.lists(st.integers(0, drafts), **rows))),
        draw(st.sampled_from([0, 0, 1, 3])),
    )


@st.composite
def traces(draw, limits) -> tuple[Shape, list[Step], int]:
    shape = draw(shapes(limits))
    has_codes = shape.config.scans_codes
    run = [draw(steps(shape.drafts, place == 0, has_codes)) for place in range(6)]
    return shape, run, draw(st.integers(0, 1 << 30))


def fuzz(limits, cases: int) -> dict[str, int]:
    """Checks at least so many requests, each in a step of an engine: a case. `limits`: a strategy
    of the options that say how much is skipped."""
    counted = {"cases": 0, "unsure": 0, "coded": 0, "engines": 0}
    engines = min(10, 1 + cases // 20)  # of a seed

    @settings(max_examples=engines, deadline=None, database=None, phases=PHASES)
    @given(trace=traces(limits))
    def check(trace):
        shape, run, seed = trace
        engine = Engine(shape, seed)
        for step in run:
            engine.run(step)
        counted["engines"] += 1
        counted["cases"] += engine.cases
        counted["unsure"] += engine.unsure
        counted["coded"] += engine.coded

    seed = SEED
    while counted["cases"] < cases:
        print(f"FFA_FUZZ_SEED={seed}", flush=True)
        hypothesis.seed(seed)(check)()
        seed += 1
    print(", ".join(f"{name} {count}" for name, count in counted.items()))
    return counted

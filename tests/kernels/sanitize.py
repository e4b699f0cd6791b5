"""Every kernel over small batches, against the oracles, for NVIDIA's sanitizer:

    python3 tests/kernels/sanitize.py          # first, so that compiling is not what takes long
    compute-sanitizer --tool memcheck --error-exitcode 1 python3 tests/kernels/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python3 tests/kernels/sanitize.py

Arguments pick parts (decode, write_and_gather, rotate_and_write, project_and_write), or add shapes
such as 1x1024: pruned decode as `bench decode` launches it, 32 heads over 8 KV heads of 128, 0.1 of
the blocks kept.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path

import torch
from cases import Case, make_batch
from qkv_cases import SHAPES, check_cache, check_rotation
from truth import choose_delta

from vllm_ffa_fp8fp8.kernels.decode.tuning import DEFAULT
from vllm_ffa_fp8fp8.kernels.runtime import INTERPRETED

ROOMS = [str(Path(__file__).parent / room) for room in ("cache", "decode", "projection")]
HALF = torch.float16
CUT = dataclasses.replace(DEFAULT, min_blocks=1, waves=30, item_tokens=16, scan_tokens=16)
DECODE = [
    (Case((300, 1, 63)), {}),
    (Case((150, 67), block_size=16, fp8_value=True), {"launch_pdl": True}),
    (Case((163, 66), head_size=96, group=7, num_kv_heads=1, page_size=48, block_size=32,
          query_len=3), {"launch_pdl": True}),
    (Case((130, 17), dtype=HALF, page_size=16), {"precomputed_threshold": True}),
    (Case((97, 0, 64, 31), dtype=HALF, fp8_key=False, residual=False, block_size=16), {}),
]  # fmt: skip
WRITTEN = [
    Case(head_size=96, page_size=48, interleaved=True),
    Case(head_size=80, page_size=32, dtype=HALF, fp8_value=True, residual=False),
    Case(page_size=16, fp8_key=False, residual=False),
]


def decode(device: str) -> None:
    from test_decode_attention import check

    for case, options in DECODE:
        batch = make_batch(case)
        delta = choose_delta(batch)
        kept, total = check(batch, device, delta, **options)[1]
        assert kept < total
        check(batch, device, None, launch_pdl=options.get("launch_pdl", False))
    case = Case((150, 100), block_size=16, num_kv_heads=1)
    batch, limits = make_batch(case), dataclasses.replace(case.limits(16), tuning=CUT)
    check(batch, device, choose_delta(batch), limits=limits)


def write_and_gather(device: str) -> None:
    from test_kv_gather import expected, gather
    from test_kv_write import keys_of_every_kind, write_and_compare

    for case in WRITTEN:
        key = keys_of_every_kind(case)
        write_and_compare(device, case, key, torch.arange(len(key)).flip(0))
        lengths = [100, 0, 17]
        batch = make_batch(dataclasses.replace(case, lengths=(130, 1, 17)))
        for ours, oracle in zip(
            gather(device, batch, lengths), expected(batch, lengths), strict=True
        ):
            assert torch.equal(ours, oracle)


def rotate_and_write(device: str) -> None:
    from test_rope_write import ERROR, run

    for name in ("qwen3", "half", "phi"):
        case = SHAPES[name]
        qkv, output, storage = run(case, device, in_place=name == "half")
        check_rotation(case, qkv, output, ERROR)
        check_cache(case, storage, output, qkv[:, -case.num_kv_heads * case.head_size :])


def project_and_write(device: str) -> None:
    from test_project_write import check, run

    for name in ("llama", "qwen2", "qwen3"):
        check(SHAPES[name], device, *run(SHAPES[name], device))


def decode_of_the_benchmark(text: str, device: str) -> None:
    from vllm_ffa_fp8fp8.bench.cells import Geometry, Shape
    from vllm_ffa_fp8fp8.bench.decoder import Decoder
    from vllm_ffa_fp8fp8.bench.inputs import make_inputs, write_cache

    shape = Shape.parse(text, Geometry())
    inputs = make_inputs(shape, 0.1, seed=0, device=device)
    planes, decoder = write_cache(inputs, "auto"), Decoder(shape, True, {}, device)
    output = torch.empty_like(inputs.query, dtype=torch.float32 if INTERPRETED else None)
    for _ in range(1 if INTERPRETED else 100):  # each may start before the one ahead has ended
        decoder.launch(inputs, planes, output)
    error, kept = decoder.check(inputs, planes)
    print(f"{shape}: relative error {error:.1e}, {kept:.2f} of the blocks kept")


PARTS = {p.__name__: p for p in (decode, write_and_gather, rotate_and_write, project_and_write)}


def main(wanted: list[str]) -> None:
    from vllm_ffa_fp8fp8.bench.decoder import compiled_kernels

    sys.path.extend(ROOMS)
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # nothing lies behind a tensor's end
    device, begin = "cpu" if INTERPRETED else "cuda", time.monotonic()
    for name in wanted or PARTS:
        if name in PARTS:
            PARTS[name](device)
        else:
            decode_of_the_benchmark(name, device)
        print(f"{name}: right ({time.monotonic() - begin:.0f} s)", flush=True)
    if not INTERPRETED:
        print(*compiled_kernels(), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])

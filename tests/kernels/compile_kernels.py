"""Compiles the kernels for GPUs that need not be there: `python compile_kernels.py 90`.

What the launchers would launch is compiled with the Triton that is found. Prints a line a kernel
and what is wrong with it: beyond the shared memory, a wait for the kernel ahead that comes too
late, and, for compute capability 9.0, what the speed rests on. Exits with 1 if anything is.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from cases import Case
from compiled.expectations import failures, programs_that_fit
from compiled.launches import Launch, compile_variants, compiled_instead
from compiled.ptx import Assembly, resources
from compiled.variants import (
    ALL,
    EXTENTS,
    SHARED_MEMORY,
    empty_planes,
    large_cases,
    main_case,
    odd_cases,
    variants,
)

from vllm_ffa_fp8fp8.kernels.cache import kv_gather, kv_write

HOPPER = 90


@dataclass
class Compiled:
    """What came out of one kernel: numbers by name, and what is wrong."""

    kernel: str
    variant: str
    numbers: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {number}" for name, number in self.numbers.items())
        lines = [f"{self.kernel} [{self.variant}] {numbers}"]
        return "\n  FAILED: ".join(lines + self.failures)


def check_wait(kernel: str, ptx: str) -> list[str]:
    """Nothing is written before the wait for the kernel ahead, and but for what decode finds its
    work with, nothing read; the next kernel may start only after it. What draws waits for arrivals
    instead, and for that kernel's end in the end."""
    if "griddepcontrol.wait" not in ptx:
        return ["does not wait for the kernel ahead"]
    draws = kernel == "draw_kernel"
    if draws and "griddepcontrol.launch_dependents" in ptx:
        return ["lets the next kernel start"]
    early, wait, _ = ptx.partition("ld.global.gpu.acquire" if draws else "griddepcontrol.wait")
    if not wait:
        return ["does not wait for arrivals"]
    late = ("st.global", "atom.", "red.global", "cp.async", "griddepcontrol.launch_dependents")
    if kernel not in ("decode_kernel", "weigh_kernel", "draw_kernel"):
        late += ("ld.global",)
    return [f"{operation} before the wait" for operation in late if operation in early]


def examine(launch: Launch, capability: int) -> Compiled:
    metadata, ptx = launch.compiled.metadata, launch.compiled.asm["ptx"]
    compiled = Compiled(launch.kernel, launch.variant.name)
    if metadata.shared > SHARED_MEMORY[capability]:
        compiled.failures.append(f"{metadata.shared} bytes of shared memory")
    if metadata.launch_pdl:
        compiled.failures += check_wait(launch.kernel, ptx)
    compiled.numbers["shared"] = metadata.shared
    if capability == HOPPER:
        assembly, used = Assembly(ptx), resources(launch.compiled.asm["cubin"])
        moves = [i.bytes for i in assembly.instructions if i.bytes]
        compiled.numbers |= {
            "registers": used.registers,
            "local": used.local,
            "programs": programs_that_fit(used, metadata.num_warps, metadata.shared),
            "barriers": assembly.count("bar.sync", "barrier.sync"),
            "shuffles": assembly.count("shfl."),
            "16 B copies": sum(i.bytes == 16 for i in assembly.starting("cp.async")),
            "narrow": sum(size <= 2 for size in moves),
            "wgmma": assembly.count("wgmma.mma"),
            "ldmatrix": assembly.count("ldmatrix"),
        }
        compiled.failures += failures(launch, assembly, used)
    return compiled


def check_compiled_once(case: Case, capability: int) -> list[str]:
    """Batches share one compilation of the gather, wherever a step's prefills begin in the block
    table, and one of the cache write."""
    planes = empty_planes(case)
    tokens = torch.zeros(64, case.num_kv_heads, case.head_size, dtype=case.dtype)
    with compiled_instead(capability) as launched:
        for pages in (3, 4):
            block_table, rows = torch.zeros(3, pages, dtype=torch.int32), tokens[pages:]
            for first in (0, 1):
                lengths = torch.zeros(4 - first, dtype=torch.int32)
                kv_gather.gather_kv(planes, block_table[first:], lengths, 1, rows, rows)
        for num_tokens in (1, 7, 16):
            kv_write.write_kv(tokens, tokens, planes, torch.arange(num_tokens))
    compilations = {id(compiled): kernel for kernel, compiled in launched}
    kernels = sorted(compilations.values())
    if len(kernels) == len(set(kernels)):
        return []
    return [f"batches share no compilation, {case}: {', '.join(kernels)}"]


@tl.core.builtin
def _as_it_is(tensor, values, _semantic=None):
    return tensor


@contextmanager
def forgotten_alignment() -> Iterator[None]:
    """What kernels say of the alignment of their pointers is not heard."""
    with (
        TemporaryDirectory() as folder,  # of what is compiled so, nothing is to be kept
        patch.object(triton.knobs.cache, "dir", folder),
        patch.object(tl, "multiple_of", _as_it_is),
        patch.object(tl, "max_contiguous", _as_it_is),
    ):
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capability", type=int, choices=SHARED_MEMORY)
    parser.add_argument("--only", help="variants with this in their names")
    parser.add_argument("--extent", choices=EXTENTS, default=ALL)
    parser.add_argument("--json", type=Path, help="a file for what came out")
    parser.add_argument(
        "--forget-alignment", action="store_true", help="compile without the hint, to see it fail"
    )
    arguments = parser.parse_args()
    capability = arguments.capability
    chosen = (
        variant
        for variant in variants(capability, arguments.extent)
        if arguments.only is None or arguments.only in variant.name
    )
    found = []
    with forgotten_alignment() if arguments.forget_alignment else nullcontext():
        for launch in compile_variants(chosen, capability):
            found.append(examine(launch, capability))
            print(found[-1], flush=True)
    wrong = [f"{c.kernel} [{c.variant}]: {f}" for c in found for f in c.failures]
    if not arguments.only:
        usual = main_case(capability)
        cases = (usual, *odd_cases(usual).values(), *large_cases(usual).values())
        for failure in (f for case in cases for f in check_compiled_once(case, capability)):
            wrong.append(failure)
            print(f"FAILED: {failure}")
    if arguments.json:
        record = {"kernels": [vars(compiled) for compiled in found], "failures": wrong}
        arguments.json.write_text(json.dumps(record))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

"""Runs the launchers for a GPU that need not be there: what they would launch is compiled."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from vllm_ffa_fp8fp8.kernels import runtime


@dataclass(frozen=True)
class Variant:
    """A call of a launcher, and how many of its programs are meant to run on a multiprocessor."""

    name: str
    call: Callable[[], object]
    programs: int = 1


@dataclass(frozen=True)
class Launch:
    """A kernel as a launcher asked for it. Equal arguments share one `compiled`."""

    kernel: str
    variant: Variant
    compiled: CompiledKernel


@dataclass(frozen=True)
class AbsentGPU:
    """What Triton asks of a driver to compile for `capability`, such as 90."""

    capability: int

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def compiled_instead(capability: int) -> Iterator[list[tuple[str, CompiledKernel]]]:
    """Launches in here run nothing: the kernels are compiled for `capability`, specialised to
    their arguments as Triton does it for a GPU, and appended to the list with their names."""
    launched: list[tuple[str, CompiledKernel]] = []
    run = JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        launched.append((kernel.__name__, compiled))
        return compiled

    triton.runtime.driver.set_active(AbsentGPU(capability))
    with (
        patch.object(JITFunction, "run", compile_only),
        patch.object(runtime, "supports_pdl", lambda device: capability >= 90),
    ):
        yield launched


def compile_variants(variants: Iterable[Variant], capability: int) -> Iterator[Launch]:
    """Every kernel that the variants launch, once, under the first variant that does."""
    seen = set()
    for variant in variants:
        with compiled_instead(capability) as launched:
            variant.call()
        for kernel, compiled in launched:
            if id(compiled) not in seen:
                seen.add(id(compiled))
                yield Launch(kernel, variant, compiled)

"""Compiles the kernels for a GPU that need not be there: `python compile_kernels.py 90`.

The launchers run on the CPU with recorders in the kernels' places; what they would have launched
is compiled. Prints a line a kernel: its name and the bytes of shared memory it takes, which have
to fit.
"""

import importlib
import sys

import torch
from cases import Case, make_batch, poisoned_scratch
from qkv_cases import QKVCase
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime.jit import MockTensor, create_function_from_signature

from vllm_ffa_fp8fp8.kernels import DecodeLimits, DecodePlan
from vllm_ffa_fp8fp8.kernels.projection.project_write import ProjectionScratch
from vllm_ffa_fp8fp8.kernels.projection.tuning import MAX_PROJECTED_TOKENS, projection_tuning

SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448}
KERNELS = {
    "decode.plan": ["_decode_plan_kernel"],
    "decode.attention": ["decode_threshold_kernel", "decode_kernel"],
    "cache.kv_write": ["_kv_write_kernel"],
    "cache.kv_gather": ["_kv_gather_kernel"],
    "projection.rope_write": ["_rope_write_kernel"],
    "projection.project_write": ["_project_write_kernel"],
}
TYPES = {
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Recorder:
    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))

    def warmup(self, *args, grid, **kwargs):
        self[grid](*map(MockTensor.wrap_dtype, args), **kwargs)


def compile_launch(kernel, args, kwargs, capability: int):
    """The compiled kernel, specialised to its arguments as at a launch."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    options = {name: values.pop(name) for name in kwargs if name not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif name in kwargs or value is None or value == 1:
            signature[name], constants[(index,)] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if signature[name][0] == "*" or (signature[name] == "i32" and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return compile(source, GPUTarget("cuda", capability, 32), options)


def record(case: Case, capability: int, every_way: bool) -> list:
    """What one batch launches: pruned, and with `every_way` as decode is called otherwise."""
    launches: list = []
    modules = {
        name: importlib.import_module(f"vllm_ffa_fp8fp8.kernels.{name}")
        for name in (*KERNELS, "runtime")
    }
    originals = {("runtime", "supports_pdl"): modules["runtime"].supports_pdl}
    modules["runtime"].supports_pdl = lambda device: capability >= 90
    for name, kernels in KERNELS.items():
        for kernel in kernels:
            originals[name, kernel] = getattr(modules[name], kernel)
            setattr(modules[name], kernel, Recorder(originals[name, kernel], launches))
    batch = make_batch(case)
    planes = case.layout.split(batch.storage[1])
    ways = [
        (3, torch.ones(1), False), (1, torch.ones(1), False), (3, torch.ones(1), True),
        (3, None, False), (1, None, False),
    ]  # fmt: skip
    if capability != 90:  # which alone has parameters of its own for few requests
        ways = [way for way in ways if way[0] > 2]
    for num_reqs, delta, precomputed in ways if every_way else ways[:1]:
        limits = DecodeLimits(
            len(case.lengths), 4096, case.num_kv_heads * case.group, case.num_kv_heads,
            case.head_size, case.block_size, 132, case.query_len, prunes=delta is not None,
            key_bytes=planes.key.itemsize, value_bytes=planes.value.itemsize,
            capability=(capability // 10, capability % 10),
            shared_memory=SHARED_MEMORY[capability],
        )  # fmt: skip
        query = batch.query()[: num_reqs * case.query_len]
        plan = DecodePlan.allocate(limits, torch.device("cpu"))
        modules["decode.attention"].decode_attention(
            query, planes, batch.block_table[:num_reqs], batch.seq_lens[:num_reqs],
            plan.update(batch.seq_lens[:num_reqs]), poisoned_scratch(limits, "cpu"),
            torch.empty_like(query), scale=case.scale, delta=delta,
            precomputed_threshold=precomputed, launch_pdl=True,
        )  # fmt: skip
    slots = torch.arange(batch.key.shape[0])
    modules["cache.kv_write"].write_kv(batch.key, batch.value, planes, slots)
    lengths = batch.seq_lens.cumsum(0, dtype=torch.int32)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths])
    key, value = torch.empty_like(batch.key), torch.empty_like(batch.key)
    modules["cache.kv_gather"].gather_kv(planes, batch.block_table, cu_seqlens, 512, key, value)
    if every_way or (capability == 90 and case.page_size % case.block_size):
        record_projections(case, planes, modules, SHARED_MEMORY[capability])
    for (name, kernel), original in originals.items():
        setattr(modules[name], kernel, original)
    return launches


def record_projections(case: Case, planes, modules, shared_memory: int) -> None:
    """One small and one large batch, with and without a norm."""
    for num_tokens, norm in ((1, False), (MAX_PROJECTED_TOKENS, True)):
        shape = {"num_tokens": num_tokens, "norm": norm, "bias": norm, "hidden_size": 256}
        qkv_case = QKVCase(**vars(case) | shape)
        heads = qkv_case.heads("cpu")
        qkv = torch.zeros(num_tokens, qkv_case.width, dtype=case.dtype)
        positions, slots = torch.zeros(num_tokens, dtype=torch.int64), torch.arange(num_tokens)
        for rotated in (qkv, torch.empty_like(qkv)):
            modules["projection.rope_write"].rope_and_write(qkv, positions, heads, planes, slots, rotated)
        hidden = torch.zeros(num_tokens, qkv_case.hidden_size, dtype=case.dtype)
        weight = torch.zeros(qkv_case.width, qkv_case.hidden_size, dtype=case.dtype)
        tuning = projection_tuning(
            heads.num_all_heads, qkv_case.hidden_size, shared_memory=shared_memory
        )
        modules["projection.project_write"].project_rope_and_write(
            hidden, weight, qkv[0] if norm else None, positions, heads, planes, slots, qkv,
            ProjectionScratch.allocate(num_tokens, heads, tuning), tuning,
        )  # fmt: skip


def cases(capability: int) -> list[Case]:
    """Variants that differ in code: dtypes, pages of whole blocks and not, groups, query tokens;
    the most query rows that the backend asks for."""
    fp8 = capability >= 89
    keys = {"lengths": (30, 8, 8), "residual": fp8, "fp8_key": fp8}
    return [
        Case(head_size=128, **keys),
        Case(head_size=96, group=7, num_kv_heads=1, page_size=48, block_size=32, **keys),
        Case(head_size=256, num_kv_heads=1, page_size=128, block_size=128, **keys),  # most memory
        Case(head_size=128, dtype=torch.float16, block_size=16, query_len=8, **keys),
        Case(head_size=80, group=8, fp8_value=fp8, query_len=8, **keys),
        Case(head_size=256, group=8, num_kv_heads=1, query_len=8, **keys),
    ]


def check_compiled_early(case: Case, capability: int) -> None:
    """What `compile_gather` compiles is what `gather_kv` launches, wherever a step's prefills
    begin in the block table; batches share one compilation of the cache write."""
    gather, write = (
        importlib.import_module(f"vllm_ffa_fp8fp8.kernels.{name}")
        for name in ("cache.kv_gather", "cache.kv_write")
    )
    kernels, launches = (gather._kv_gather_kernel, write._kv_write_kernel), []
    gather._kv_gather_kernel, write._kv_write_kernel = (Recorder(k, launches) for k in kernels)
    batch = make_batch(case)
    planes = case.layout.split(batch.storage[1])
    for pages in (3, 4):
        block_table = torch.zeros(3, pages, dtype=torch.int32)
        for first in (0, 1):
            cu_seqlens = torch.zeros(4 - first, dtype=torch.int32)
            key = torch.empty_like(batch.key[pages:])
            gather.gather_kv(planes, block_table[first:], cu_seqlens, 1, key, key)
    gather.compile_gather(planes, case.dtype)
    for num_tokens in (1, 7, 16):
        write.write_kv(batch.key, batch.value, planes, torch.arange(num_tokens))
    gather._kv_gather_kernel, write._kv_write_kernel = kernels
    backend = make_backend(GPUTarget("cuda", capability, 32))
    for kernel in kernels:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        found = {str(bind(*args, **kwargs)[1:]) for k, args, kwargs in launches if k is kernel}
        assert len(found) == 1, (kernel.__name__, case, found)


def check_wait(name: str, ptx: str) -> None:
    """Nothing is written before the wait for the kernel ahead, and but for what decode finds its
    work with, nothing read; the next kernel may start only after it."""
    early, wait, _ = ptx.partition("griddepcontrol.wait")
    assert wait, f"{name} does not wait"
    late = ("st.global", "atom.", "red.global", "cp.async", "griddepcontrol.launch_dependents")
    if name != "decode_kernel":
        late += ("ld.global",)
    assert not (found := [operation for operation in late if operation in early]), (name, found)


def main(capability: int) -> None:
    for number, case in enumerate(cases(capability)):
        check_compiled_early(case, capability)
        for kernel, args, kwargs in record(case, capability, every_way=number == 0):
            compiled = compile_launch(kernel, args, kwargs, capability)
            shared = compiled.metadata.shared
            print(kernel.__name__, shared, case, flush=True)
            assert shared <= SHARED_MEMORY[capability], (kernel.__name__, case, shared)
            if kwargs.get("PDL"):
                check_wait(kernel.__name__, compiled.asm["ptx"])


if __name__ == "__main__":
    main(int(sys.argv[1]))

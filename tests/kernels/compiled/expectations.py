"""What the speed of the kernels rests on, on compute capability 9.0, and whether it is so."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from .launches import Launch
from .ptx import Assembly, Resources

REGISTERS, SHARED_MEMORY, SHARED_MEMORY_APART = 65_536, 233_472, 1_024
"""Of a multiprocessor; the last is what every program takes beside its own."""

E4M3, ANY = "wgmma on E4M3", "any product"
ORDERED = {"acquire", "release", "acq_rel"}


@dataclass(frozen=True)
class Expectation:
    """What holds for a kernel.

    Args:
        moves: how many bytes a thread moves with one instruction, at least, by the function that
            moves them; "st:" or "cp:" before its name: of its stores or asynchronous copies alone.
            Elements of 64 bits are indices and do not count.
        exponents: instructions of these functions that move a byte nevertheless, at most.
        loops: what the innermost loops that multiply matrices do, in order. All get their rows by
            asynchronous copies if `pipelined`.
        local: bytes of local memory of a thread, at most: what does not fit its registers.
        programs: on a multiprocessor, at least; None: as many as the variant means to have.
        fences: atomics that wait for all that a thread has read and written, at most.
    """

    moves: Mapping[str, int] = field(default_factory=dict)
    exponents: int = 0
    loops: tuple[str, ...] = ()
    pipelined: bool = True
    local: int = 0
    programs: int | None = None
    fences: int = 1


FEW = {"store_key_rows": 4, "store_value_rows": 8}
"""Rows of four tokens, 128 elements each: a thread has four elements."""
MANY = {"store_key_rows": 16, "store_value_rows": 16}

EXPECTATIONS: tuple[tuple[str, str, dict], ...] = (
    ("decode_kernel", "", {"moves": {"load_rows": 16, "load_columns": 16, "load_query": 16}}),
    ("decode_kernel", "dense", {"loops": (E4M3,)}),
    ("decode_kernel", "pruned", {"loops": (E4M3, E4M3), "moves": {"load_scores": 16}}),
    # the second is for scores far above the anchors'
    ("decode_kernel", "tensors", {"loops": (E4M3, E4M3)}),
    ("decode_kernel", "no residual", {"loops": (E4M3, ANY)}),
    # operands of the second product: 8 elements in a row are a thread's
    ("decode_kernel", "FP8 V", {"moves": {"load_columns": 8}}),
    # so are keys that become float16
    ("decode_kernel", "float16", {"moves": {"load_rows": 8}}),
    ("decode_kernel", "dense, float16", {"loops": (ANY,)}),
    ("decode_kernel", "pruned, float16", {"loops": (ANY, ANY)}),
    # scores of 7 query heads have 28 bytes; wgmma takes no blocks of 32 tokens
    (
        "decode_kernel",
        "head size 96, pages of 48",
        {"moves": {"load_scores": 4}, "loops": (E4M3, ANY), "local": 256},
    ),
    ("decode_kernel", "pruned, FP8 V", {"local": 64}),  # Triton 3.9, outside of the loops
    ("decode_kernel", "pruned, head size 64", {"local": 16}),  # the same
    ("decode_kernel", "pruned, head size 256, blocks of 128", {"local": 64}),
    ("decode_kernel", "dense, head size 256, blocks of 128", {"local": 384, "pipelined": False}),
    ("decode_kernel", "64 rows", {"local": 704, "programs": 1}),
    ("weigh_kernel", "", {"moves": {"load_rows": 16, "load_query": 16}, "loops": (E4M3,)}),
    ("weigh_kernel", "float16", {"moves": {"load_rows": 8}, "loops": (ANY,)}),
    # a quarter of a query row and of its channels: few bytes a thread
    (
        "weigh_kernel",
        "codes",
        {
            "moves": {"score_run": 16, "load_query": 2},
            "loops": (ANY, ANY),
            "programs": 8,
            "local": 128,  # Triton 3.9, which no GPU build of vLLM has; 64 with 3.7
        },
    ),
    ("weigh_kernel", "codes, up to 8 query tokens", {"programs": 4}),
    ("weigh_kernel", "codes, head size 80", {"moves": {"score_run": 8}}),
    ("weigh_kernel", "codes, head size 256", {"programs": 4}),
    (
        "draw_kernel",
        "",
        {
            "moves": {"load_rows": 16, "load_columns": 16, "load_query": 16},
            "loops": (E4M3, E4M3),
        },
    ),
    ("draw_kernel", "FP8 V", {"moves": {"load_columns": 8}}),
    ("draw_kernel", "float16", {"moves": {"load_rows": 8}, "loops": (ANY,)}),
    ("draw_kernel", "codes, float16", {"local": 128}),  # blocks of 16, Triton 3.9
    ("draw_kernel", "head size 256", {"local": 64}),
    ("draw_kernel", "up to 8 query tokens", {"local": 256, "programs": 1}),
    ("decode_threshold_kernel", "", {"moves": {"load_rows": 16, "load_query": 16}}),
    ("_base_read_kernel", "", {"moves": {"cp:_base_read_kernel": 16}}),
    ("_kv_gather_kernel", "", {"moves": {"load_rows": 16, "st:_kv_gather_kernel": 16}}),
    ("_kv_write_kernel", "", {"exponents": 1}),
    ("_kv_write_kernel", "few tokens", {"moves": FEW | {"_kv_write_kernel": 8}}),
    ("_kv_write_kernel", "many tokens", {"moves": MANY | {"_kv_write_kernel": 16}}),
    ("_kv_write_kernel", "few tokens, FP8 V", {"moves": {"store_value_rows": 4}}),
    ("_kv_write_kernel", "FP8 V", {"exponents": 2}),
    ("_rope_write_kernel", "", {"exponents": 1}),
    (
        "_rope_write_kernel",
        "few tokens",
        {"moves": FEW | {"_load_rows": 8, "load_rotation": 8, "st:_rope_write_kernel": 8}},
    ),
    (
        "_rope_write_kernel",
        "many tokens",
        {"moves": MANY | {"_load_rows": 16, "load_rotation": 16, "st:_rope_write_kernel": 16}},
    ),
    ("_rope_write_kernel", "FP8 V", {"exponents": 2}),
    ("_project_write_kernel", "", {"moves": {"cp:_project_write_kernel": 16}, "loops": (ANY,)}),
    ("_project_write_kernel", "4 tokens", {"moves": FEW | {"_add_up": 16}, "exponents": 1}),
    ("_project_write_kernel", "16 tokens", {"moves": MANY | {"_add_up": 16}, "exponents": 1}),
    ("_project_write_kernel", "FP8 V", {"exponents": 2}),
    # a thread has 8 elements of a row
    (
        "_project_write_kernel",
        "128 tokens",
        {"moves": {"store_key_rows": 8, "store_value_rows": 16, "_add_up": 16}, "exponents": 1},
    ),
)
"""Of a kernel, in the variants that have all these words in their names; later ones win."""


def expectation_of(kernel: str, variant: str) -> Expectation:
    expectation = Expectation()
    for of_kernel, words, fields in EXPECTATIONS:
        if of_kernel == kernel and all(word in variant for word in words.split(", ")):
            moves = {**expectation.moves, **fields.get("moves", {})}
            expectation = replace(expectation, **fields | {"moves": moves})
    if "no cache" in variant:
        written = ("store_key_rows", "store_value_rows")
        moves = {name: n for name, n in expectation.moves.items() if name not in written}
        expectation = replace(expectation, moves=moves)
    return expectation


def programs_that_fit(resources: Resources, num_warps: int, shared: int) -> int:
    """Programs that run at a time on a multiprocessor."""
    registers = -(-resources.registers // 8) * 8 * 32 * num_warps
    return min(REGISTERS // registers, SHARED_MEMORY // (shared + SHARED_MEMORY_APART))


def failures(launch: Launch, assembly: Assembly, resources: Resources) -> Iterator[str]:
    """What of a launch on compute capability 9.0 is not as expected, a line each."""
    expected = expectation_of(launch.kernel, launch.variant.name)
    yield from _narrow_moves(expected, assembly)
    if len(assembly.product_loops) != len(expected.loops):
        found = len(assembly.product_loops)
        yield f"{found} innermost loops multiply matrices, not {len(expected.loops)}"
    for number, (loop, product) in enumerate(
        zip(assembly.product_loops, expected.loops, strict=False), start=1
    ):
        if product == E4M3 and not loop.multiplies_e4m3:
            yield f"loop {number} has no {E4M3}"
        if expected.pipelined and not loop.copies:
            yield f"loop {number} gets no rows by asynchronous copies"
    if resources.local > expected.local:
        yield f"{resources.local} bytes of local memory a thread, {expected.local} at most"
    fences = [i for i in assembly.starting("atom.") if ORDERED & {*i.text.split()[0].split(".")}]
    if len(fences) > expected.fences:
        lines = ", ".join(sorted({f"{i.file}:{i.line}" for i in fences}))
        yield f"{len(fences)} atomics order memory, {expected.fences} at most ({lines})"
    metadata = launch.compiled.metadata
    wanted = launch.variant.programs if expected.programs is None else expected.programs
    fit = programs_that_fit(resources, metadata.num_warps, metadata.shared)
    if fit < wanted:
        yield (
            f"{fit} programs fit a multiprocessor, not {wanted}: {resources.registers} registers, "
            f"{metadata.num_warps} warps, {metadata.shared} bytes of shared memory"
        )


def _narrow_moves(expected: Expectation, assembly: Assembly) -> Iterator[str]:
    exponents = 0
    for place, least in expected.moves.items():
        operation, _, function = place.rpartition(":")
        moves = [
            i
            for i in assembly.instructions
            if i.bytes and i.function == function and i.operation.startswith(operation)
        ]
        if not moves:
            yield f"nothing is moved by {place}"
        exponents += sum(i.bytes == 1 for i in moves)
        narrow = Counter(
            (i.bytes, i.text.split()[0], f"{i.file}:{i.line}")
            for i in moves
            if i.bytes < least and ".b64" not in i.text and (i.bytes > 1 or not expected.exponents)
        )
        for (size, opcode, source), count in sorted(narrow.items()):
            yield f"{size} B at a time, not {least}, in {function}: {count} x {opcode} ({source})"
    if expected.exponents and exponents > expected.exponents:
        yield f"{exponents} instructions move one byte, {expected.exponents} at most: exponents"

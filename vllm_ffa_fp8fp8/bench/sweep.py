"""Measures cells on the GPU, shape by shape, as far as the store does not have them."""

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields

import torch

from vllm_ffa_fp8fp8.bench.base_read import time_base_read
from vllm_ffa_fp8fp8.bench.cells import (
    BASE_READ,
    EXACT,
    FIXED,
    OURS,
    PEERS,
    SPREAD,
    VALUE_BYTES,
    WRITE,
    Cell,
    Figure,
    Figures,
)
from vllm_ffa_fp8fp8.bench.decoder import CHECKED_REQUESTS, Decoder, relative_error
from vllm_ffa_fp8fp8.bench.inputs import make_inputs, num_sets, write_cache
from vllm_ffa_fp8fp8.bench.peers import dense_reference, time_peer
from vllm_ffa_fp8fp8.bench.planted import make_planted
from vllm_ffa_fp8fp8.bench.store import Store, code_fingerprint
from vllm_ffa_fp8fp8.bench.timing import read_bandwidth
from vllm_ffa_fp8fp8.environment import stack
from vllm_ffa_fp8fp8.kernels.decode.tuning import DecodeTuning


def parse_tuning(text: str, parameters: type = DecodeTuning) -> dict[str, int]:
    """Changes to a dataclass of launch parameters from `name=value,...`; ValueError names what is
    wrong."""
    known = [field.name for field in fields(parameters)]
    changes = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in known:
            raise ValueError(f"no launch parameter {name!r} in {item!r}: {', '.join(known)}")
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = None
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{item!r} is not name=value with a whole number")
        changes[name] = value
    return changes


def environment() -> dict[str, str]:
    """What figures depend on besides our code."""
    return {"gpu": torch.cuda.get_device_name(), **stack()}


def sweep(
    cells: Iterable[Cell], store: Store, tell: Callable[[str], None], profile: bool = False
) -> Figures:
    """The figures of `cells`, from the store or measured now. Raises CheckFailed."""
    codes = {series: code_fingerprint(series) for series in (OURS, EXACT, *FIXED)}
    figures, bandwidth = {}, None
    by_shape: dict = {}
    for cell in cells:
        by_shape.setdefault(cell.shape, []).append(cell)
    for shape, wanted in by_shape.items():
        for cell in wanted:
            figures[cell] = store.get(cell, codes[cell.series])
        missing = [cell for cell in wanted if figures[cell] is None]
        if not missing:
            continue
        if bandwidth is None:
            bandwidth = read_bandwidth()
            tell(f"read bandwidth {bandwidth / 1e6:.2f} TB/s")
        tell(f"{shape}, {shape.geometry}: {len(missing)} of {len(wanted)} cells to measure")
        by_scores: dict = {}
        for cell in missing:
            by_scores.setdefault(cell.planted, []).append(cell)
        for planted, alike in by_scores.items():
            if planted:
                measured = measure_planted(alike, bandwidth, codes)
            else:
                measured = measure(alike, bandwidth, codes, tell if profile else None)
            for cell, figure in measured:
                figures[cell] = store.put(cell, figure)
            store.save(shape.geometry)
            torch.cuda.empty_cache()
    return figures


def measure(
    cells: list[Cell],
    bandwidth: float,
    codes: dict[str, str],
    tell_kernels: Callable[[str], None] | None = None,
):
    """Yields cells of one shape with their figures. Only `ours` depends on what is planted: the
    other series run on the first inputs that are made."""

    def figure(cell: Cell, us: float, kept: float = 1.0, error: float = 0.0) -> Figure:
        return Figure(us, cell.floor_bytes(kept) / bandwidth, kept, error, codes[cell.series])

    shape = cells[0].shape
    planted = sorted({(c.kept, c.hot) for c in cells if c.series == OURS}) or [(1.0, SPREAD)]
    for kept, hot in planted:
        due = [
            cell
            for cell in cells
            if (kept, hot) == ((cell.kept, cell.hot) if cell.series == OURS else planted[0])
        ]
        sets = [make_inputs(shape, kept, seed, hot=hot) for seed in range(num_sets(shape))]
        for value_dtype in VALUE_BYTES:
            ours = [c for c in due if c.series not in PEERS and c.value_dtype == value_dtype]
            planes = [write_cache(inputs, value_dtype) for inputs in sets] if ours else []
            for cell in ours:
                if cell.series == BASE_READ:
                    yield cell, figure(cell, time_base_read(shape, sets, planes))
                    continue
                decoder = Decoder(
                    shape,
                    cell.series == OURS,
                    parse_tuning(cell.tuning),
                    value_dtype=planes[0].value.dtype,
                    write=cell.ahead == WRITE,
                )
                error, measured_kept = decoder.check(sets[0], planes[0])
                us = decoder.time(sets, planes)
                yield cell, figure(cell, us, measured_kept, error)
                if tell_kernels:
                    tell_kernels(f"  {cell.series} {kept} {hot}: {decoder.profile(sets, planes)}")
            del planes
        for cell in due:
            if cell.series in PEERS:
                us, error = time_peer(shape, sets, cell.series, write=cell.ahead == WRITE)
                yield cell, figure(cell, us, error=error)
        del sets


def measure_planted(
    cells: list[Cell], bandwidth: float, codes: dict[str, str], device: str = "cuda"
) -> Iterator[tuple[Cell, Figure]]:
    """Yields cells of one shape and distribution of scores with their figures."""
    shape = cells[0].shape
    sets = [make_planted(shape, cells[0].planted, seed, device) for seed in range(num_sets(shape))]
    first, scale = sets[0], shape.geometry.head_size**-0.5
    exact = dense_reference(
        first.query, first.key, first.value, first.block_table, first.seq_lens, scale,
        requests=min(shape.batch, CHECKED_REQUESTS), dtype=torch.float64,
    )  # fmt: skip
    for cell in cells:
        delta, error, kept = None, 0.0, 1.0
        if cell.series in PEERS:
            us, exact_error = time_peer(shape, sets, cell.series, exact=exact)
        else:
            config = cell.config
            planes = [
                write_cache(s, config.v_cache_dtype, config.use_fp8_residual, config.scans_codes)
                for s in sets
            ]
            dtype = planes[0].value.dtype
            decoder = Decoder(shape, config.prunes, {}, device, value_dtype=dtype, config=config)
            if not cell.setting:
                delta = round(decoder.search(first, planes[0], cell.kept), 3)
            error, kept = decoder.check(first, planes[0])
            output, *_ = decoder.run(first, planes[0])
            exact_error = relative_error(output[: len(exact)], exact)
            us = decoder.time(sets, planes)
            del planes
        floor = cell.floor_bytes(kept) / bandwidth
        yield (
            cell,
            Figure(
                us, floor, kept, error, codes[cell.series], exact_error=exact_error, delta=delta
            ),
        )

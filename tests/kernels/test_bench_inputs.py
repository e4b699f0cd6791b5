"""What the decode benchmark plants, checks and varies, in the interpreter."""

import dataclasses

import pytest
import torch

from vllm_ffa_fp8fp8.bench import base_read, peers, sweep
from vllm_ffa_fp8fp8.bench import decoder as decoder_module
from vllm_ffa_fp8fp8.bench.cells import (
    EXACT,
    FA3_BF16,
    NEWEST,
    OURS,
    UNEVEN,
    Cell,
    Figure,
    Geometry,
    Shape,
)
from vllm_ffa_fp8fp8.bench.decoder import CheckFailed, Decoder, relative_error
from vllm_ffa_fp8fp8.bench.inputs import make_inputs, num_sets, write_cache
from vllm_ffa_fp8fp8.bench.store import Store
from vllm_ffa_fp8fp8.commands import bench_decode, bench_kproj
from vllm_ffa_fp8fp8.kernels.decode.tuning import DecodeTuning
from vllm_ffa_fp8fp8.kernels.projection.tuning import ProjectionTuning, RopeWriteTuning
from vllm_ffa_fp8fp8.kernels.reference import decode_attention_reference

SHAPE = Shape(Geometry(8, 2, 64, 64), 2, 500)
FEW_ITEMS = {"programs_per_processor": 1, "waves": 1}


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(SHAPE, 0.5, seed=0, device="cpu")


def kept_blocks(inputs) -> list[torch.Tensor]:
    """Of each request `[num_kv_heads, blocks]`: what the reference keeps."""
    _, blocks = decode_attention_reference(
        inputs.query, write_reference(inputs), inputs.block_table, inputs.seq_lens, block_size=64,
        scale=inputs.query.shape[-1] ** -0.5, delta=torch.tensor([decoder_module.DELTA]),
    )  # fmt: skip
    return blocks


@pytest.mark.parametrize("kept", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("head_size", [64, 128])
def test_planted_blocks_are_kept(kept, head_size):
    shape = Shape(Geometry(8, 2, head_size, 64), 3, 900)
    inputs = make_inputs(shape, kept, seed=1, device="cpu")
    for flags in kept_blocks(inputs):
        assert flags.sum(1).tolist() == [shape.kept_blocks(kept)] * 2


def test_newest_blocks_are_kept():
    shape = Shape(Geometry(8, 2, 64, 64), 2, 1000)
    inputs = make_inputs(shape, 0.3, seed=1, device="cpu", hot=NEWEST)
    for flags in kept_blocks(inputs):
        for head in flags:
            assert head.nonzero().flatten().tolist() == [0, 12, 13, 14, 15]


def test_half_of_the_heads_keep_twice_as_many():
    shape = Shape(Geometry(8, 4, 64, 64), 2, 1000)
    inputs = make_inputs(shape, 0.25, seed=1, device="cpu", hot=UNEVEN)
    counts = [sorted(flags.sum(1).tolist()) for flags in kept_blocks(inputs)]
    assert counts == [[2, 2, 8, 8]] * 2 and inputs.num_kept == 40


@pytest.mark.slow
def test_work_items_share_the_newest_blocks():
    """Contexts cut into runs would leave them all to the last item, and the others without any."""
    shape = Shape(Geometry(8, 2, 64, 64), 1, 1000)
    inputs = make_inputs(shape, 0.3, seed=1, device="cpu", hot=NEWEST)
    decoder = Decoder(shape, True, {"min_blocks": 4, "programs_per_processor": 4}, "cpu")
    decoder.scratch.partial_lse.fill_(float("nan"))
    error, kept = decoder.check(inputs, write_reference(inputs))
    assert error < 1e-3 and kept == 5 / 16
    num_items = int(decoder.plan.work[0, 2])
    assert num_items == 4
    lse = decoder.scratch.partial_lse.flatten()[: num_items * shape.geometry.num_heads]
    assert lse.isfinite().all()


def write_reference(inputs):
    from vllm_ffa_fp8fp8.kernels.cache.page_layout import PageLayout
    from vllm_ffa_fp8fp8.kernels.cache_reference import write_kv_reference

    num_pages, page_size, num_kv_heads, head_size = inputs.key.shape
    layout = PageLayout(head_size, inputs.key.dtype)
    cache = torch.empty(
        (num_pages, num_kv_heads, page_size, layout.bytes_per_token), dtype=torch.uint8
    )
    planes = layout.split(cache)
    slots = torch.arange(num_pages * page_size)
    write_kv_reference(inputs.key.flatten(0, 1), inputs.value.flatten(0, 1), planes, slots)
    return planes


@pytest.mark.slow
@pytest.mark.parametrize(("prune", "value_dtype"), [(True, "auto"), (False, "fp8")])
def test_check_measures_the_kept_fraction(inputs, prune, value_dtype):
    planes = write_cache(inputs, value_dtype)
    decoder = Decoder(SHAPE, prune, FEW_ITEMS, "cpu")
    error, kept = decoder.check(inputs, planes)
    assert error < 1e-3
    assert kept == (0.5 if prune else 1.0)
    if prune:
        with pytest.raises(CheckFailed, match="16 of 32 blocks kept"):
            decoder.check(dataclasses.replace(inputs, num_kept=15), planes)


@pytest.mark.slow
def test_newest_tokens_are_written_ahead(inputs):
    planes = write_reference(inputs)
    slots = inputs.newest.slot_mapping
    pages, rows = slots // 64, slots % 64
    assert pages.tolist() == inputs.block_table[:, 7].tolist() and rows.tolist() == [51, 51]
    for plane in (planes.key, planes.value):
        plane.view(torch.uint8)[pages, :, rows] = 0xFF  # NaN
    with pytest.raises(CheckFailed):
        Decoder(SHAPE, True, FEW_ITEMS, "cpu").check(inputs, planes)
    Decoder(SHAPE, True, FEW_ITEMS, "cpu", write=True).check(inputs, planes)


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [64, 96])
def test_the_bare_read_reads_every_word_once(monkeypatch, head_size):
    shape = Shape(Geometry(8, 2, head_size, 64), 2, 1000)
    inputs = make_inputs(shape, 0.5, seed=0, device="cpu")
    planes = write_reference(inputs)
    monkeypatch.setattr(base_read, "time_graph", lambda launches: [run() for run in launches] and 1)
    assert base_read.time_base_read(shape, [inputs], [planes]) == 1
    inputs.block_table[0, 3] = inputs.block_table[1, 4]
    with pytest.raises(CheckFailed, match="base add up"):
        base_read.time_base_read(shape, [inputs], [planes])


def test_check_rejects_a_wrong_output(inputs, monkeypatch):
    monkeypatch.setattr(Decoder, "launch", lambda self, i, p, output, counters: output.zero_())
    with pytest.raises(CheckFailed, match="error"):
        Decoder(SHAPE, True, {}, "cpu").check(inputs, write_reference(inputs))


def test_dense_reference_of_the_peers(inputs):
    planes = write_reference(inputs)
    expected, _ = decode_attention_reference(
        inputs.query[:1], planes, inputs.block_table[:1], inputs.seq_lens[:1],
        block_size=64, scale=0.125, delta=None,
    )  # fmt: skip
    tensors = [getattr(inputs, field.name) for field in dataclasses.fields(inputs)[:5]]
    assert relative_error(peers.dense_reference(*tensors, scale=0.125), expected) < 1e-4


def test_every_tuning_field_can_be_varied():
    for field in dataclasses.fields(DecodeTuning):
        value = getattr(DecodeTuning(), field.name)
        assert sweep.parse_tuning(f"{field.name}={value}") == {field.name: value}
    assert sweep.parse_tuning("") == {}
    assert sweep.parse_tuning("waves=8,num_warps=8") == {"waves": 8, "num_warps": 8}
    for wrong in ("wavs=8", "waves", "waves=many", "waves=-1", "waves=1.5", "waves='x'"):
        with pytest.raises(ValueError, match=wrong):
            sweep.parse_tuning(wrong)


@pytest.mark.parametrize(
    "named, parameters",
    [
        (bench_decode.TUNING_FIELDS, DecodeTuning),
        (bench_kproj.DECODE_FIELDS, ProjectionTuning),
        (bench_kproj.PREFILL_FIELDS, RopeWriteTuning),
    ],
)
def test_help_names_every_tuning_field(named, parameters):
    assert list(named) == [field.name for field in dataclasses.fields(parameters)]


def test_small_shapes_have_several_sets():
    assert num_sets(Shape(Geometry(), 8, 131_072)) == 1
    assert 1 < num_sets(Shape(Geometry(), 1, 32_768)) < num_sets(Shape(Geometry(), 1, 1024)) <= 48


@pytest.fixture
def timed_shapes(monkeypatch):
    """Sweeps without a GPU; what is measured is listed."""
    measured = []

    def measure(cells, bandwidth, codes, tell_kernels):
        measured.append([cell.series for cell in cells])
        for cell in cells:
            yield cell, Figure(10.0, 8.0, cell.kept, 1e-3, codes[cell.series])

    monkeypatch.setattr(sweep, "measure", measure)
    monkeypatch.setattr(sweep, "read_bandwidth", lambda: 3e6)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return measured


def test_sweep_measures_what_the_store_lacks(tmp_path, timed_shapes, monkeypatch):
    environment = {"gpu": "A GPU", "torch": "2.14.0", "triton": "3.8.0", "vllm": "0.33.0"}
    cells = [Cell(SHAPE, OURS, kept=0.5), Cell(SHAPE, EXACT), Cell(SHAPE, FA3_BF16)]
    lines = []
    first = sweep.sweep(cells, Store(tmp_path, environment), lines.append)
    assert timed_shapes == [[OURS, EXACT, FA3_BF16]]
    assert not any(figure.cached for figure in first.values())
    again = sweep.sweep(cells, Store(tmp_path, environment), lines.append)
    assert len(timed_shapes) == 1 and again == first
    assert all(figure.cached for figure in again.values())
    fresh = sweep.sweep(cells, Store(tmp_path, environment, fresh=True), lines.append)
    assert len(timed_shapes) == 2
    assert not any(figure.cached for figure in fresh.values())
    # other kernels: the peer's figure still stands
    known = sweep.code_fingerprint
    monkeypatch.setattr(
        sweep, "code_fingerprint", lambda s: known(s) if s == FA3_BF16 else "changed"
    )
    sweep.sweep(cells, Store(tmp_path, environment), lines.append)
    assert timed_shapes[2:] == [[OURS, EXACT]]

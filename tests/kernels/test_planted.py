"""Planted scores under a float64 softmax, and how the benchmark measures on them."""

import math

import pytest
import torch

from vllm_ffa_fp8fp8.bench import sweep
from vllm_ffa_fp8fp8.bench.cells import OURS, PLANTED, Geometry, Shape, describe, plan_planted
from vllm_ffa_fp8fp8.bench.decoder import CheckFailed, Decoder
from vllm_ffa_fp8fp8.bench.planted import SCORES, make_planted
from vllm_ffa_fp8fp8.config import FFAConfig
from vllm_ffa_fp8fp8.kernels.cache.page_layout import PageLayout
from vllm_ffa_fp8fp8.kernels.cache_reference import write_kv_reference
from vllm_ffa_fp8fp8.kernels.code_reference import encode_keys_reference
from vllm_ffa_fp8fp8.kernels.reference import decode_attention_reference
from vllm_ffa_fp8fp8.option_values import RULES

SHAPE = Shape(Geometry(8, 4, 64, 64), 1, 3000)
SMALL = Shape(Geometry(4, 2, 64, 64), 1, 600)


def rows_of(shape, name):
    """Inputs, query and keys of a request, `[num_kv_heads, group or tokens, head_size]`, and log2
    scores, all float64."""
    geometry = shape.geometry
    inputs = make_planted(shape, name, seed=3, device="cpu")
    query = inputs.query[0].double().view(geometry.num_kv_heads, geometry.group, -1)
    key = inputs.key[inputs.block_table[0].long()].flatten(0, 1)[: shape.seq_len]
    key = key.transpose(0, 1).double()
    return inputs, query, key, log2_scores(query, key)


def log2_scores(query, key):
    return query @ key.mT * query.shape[-1] ** -0.5 * math.log2(math.e)


def mass(scores):
    return torch.softmax(scores * math.log(2), dim=-1)


def write_cache(inputs, value_dtype="auto", residual=True, key_code=False):
    num_pages, page_size, num_kv_heads, head_size = inputs.key.shape
    fp8_value = value_dtype == "fp8"
    layout = PageLayout(
        head_size, inputs.key.dtype, residual=residual, fp8_value=fp8_value, key_code=key_code
    )
    size = (num_pages, num_kv_heads, page_size, layout.bytes_per_token)
    planes = layout.split(torch.empty(size, dtype=torch.uint8))
    slots = torch.arange(num_pages * page_size)
    write_kv_reference(inputs.key.flatten(0, 1), inputs.value.flatten(0, 1), planes, slots)
    for row, length in zip(inputs.block_table, inputs.seq_lens.tolist(), strict=True):
        encode_keys_reference(planes, row, 0, length)
    return planes


def test_every_name_has_scores():
    assert tuple(SCORES) == PLANTED


def test_a_sink_has_nine_tenths_and_next_to_no_value():
    inputs, _, _, scores = rows_of(SHAPE, "sink")
    assert mass(scores)[..., 0].sub(0.9).abs().max() < 0.01
    assert mass(scores)[..., 1:].max() < 1e-3
    value = inputs.value[inputs.block_table[0].long()].flatten(0, 1)
    assert value[0].abs().max() < 0.01 and value[1].abs().max() > 0.5


def test_a_needle_lies_between():
    weights = mass(rows_of(SHAPE, "needle")[3])
    largest, place = weights.max(-1)
    assert largest.sub(0.9).abs().max() < 0.01
    assert place.min() > 700 and place.max() < 2300
    assert (place == place[:, :1]).all() and len(place.unique()) > 1


def test_windows_are_local_and_of_several_lengths():
    weights = mass(rows_of(SHAPE, "local")[3])
    for head, rows in enumerate(weights):
        assert rows[:, -(64 << head) :].sum(-1).sub(0.9).abs().max() < 0.01


def test_heads_differ_tenfold_in_what_they_keep():
    shape = Shape(Geometry(8, 4, 64, 64), 1, 6400)
    inputs = make_planted(shape, "heads", seed=0, device="cpu")
    _, (kept,) = decode_attention_reference(
        inputs.query, write_cache(inputs), inputs.block_table, inputs.seq_lens,
        block_size=64, scale=0.125, delta=torch.tensor([5.0]),
    )  # fmt: skip
    assert kept.sum(1).tolist() == [3, 6, 14, 30]


@pytest.mark.parametrize("spread", [1, 2, 3])
def test_lognormal_weights_have_their_spread(spread):
    scores = rows_of(SHAPE, f"lognormal-{spread}")[3]
    assert scores.std(-1).sub(spread).abs().max() < 0.1
    alike = torch.corrcoef(scores[0])[0, 1]
    assert 0.4 < alike < 0.6  # the rows of a group


def test_offset_keys_cost_the_base_its_precision():
    inputs, query, key, scores = rows_of(SHAPE, "offset")
    channels = key[..., :8]
    assert (channels.mean(1).abs() / channels.std(1)).mean() > 10
    planes = write_cache(inputs)
    joined, base = (
        part.double()[inputs.block_table[0].long()].transpose(0, 1).flatten(1, 2)[:, :3000]
        for part in (
            (planes.key.float() + planes.key_residual.float() / 32)
            * planes.key_exponent.view(torch.float8_e8m0fnu).float(),
            planes.key.float() * planes.key_exponent.view(torch.float8_e8m0fnu).float(),
        )
    )
    assert (log2_scores(query, joined) - scores).std(-1).max() < 0.02
    assert (log2_scores(query, base) - scores).std(-1).mean() > 0.5
    plain_inputs, query, _, scores = rows_of(SHAPE, "lognormal-2")
    planes = write_cache(plain_inputs)
    base = planes.key.float() * planes.key_exponent.view(torch.float8_e8m0fnu).float()
    base = base.double()[plain_inputs.block_table[0].long()].transpose(0, 1).flatten(1, 2)
    assert (log2_scores(query, base[:, :3000]) - scores).std(-1).mean() < 0.1


def planted_cells(*settings, kept=(), name="heads"):
    configs = [FFAConfig(**options) for options in settings]
    return plan_planted([SMALL], [name], configs, kept, ["auto"], peers=False)


def test_settings_of_cells_are_read_again():
    options = {
        "rule": "threshold", "delta": None, "block_size": 16, "v_cache_dtype": "fp8",
        "use_fp8_residual": False,
    }  # fmt: skip
    (cell,) = planted_cells(options)
    assert cell.config == FFAConfig(**options)
    assert cell.setting == describe(cell.config) and cell.value_dtype == "fp8"
    assert cell.floor_bytes(0.5) == cell.shape.elements * 1.5
    (coded,) = planted_cells({"rule": "share", "tau": 0.1, "scan": "int4"})
    assert coded.config.scans_codes
    assert coded.floor_bytes(0.5) == coded.shape.elements * (0.5625 + 2)
    (plain,) = planted_cells({"rule": "threshold", "delta": 5.0, "min_context": 7})
    assert plain.setting == "delta=5.0" and plain.config.delta == 5.0
    for tau in (0.03, None):
        (share,) = planted_cells({"rule": "share", "tau": tau, "block_size": 32})
        assert share.config == FFAConfig(rule="share", tau=tau, block_size=32)
        assert share.setting == f"block_size=32,tau={tau or 'null'}"


@pytest.fixture
def measured_here(monkeypatch):
    """Sweeps in the interpreter, one set, with a cache that the oracle wrote; no times."""
    monkeypatch.setattr(sweep, "num_sets", lambda shape: 1)
    monkeypatch.setattr(sweep, "write_cache", write_cache)
    monkeypatch.setattr(Decoder, "time", lambda self, sets, planes: 7.0)
    return lambda cells: dict(sweep.measure_planted(cells, 1e6, {OURS: "code"}, "cpu"))


@pytest.mark.slow
def test_what_a_setting_costs_is_measured(measured_here):
    threshold = {"rule": "threshold", "block_size": 16}
    share = {"rule": "share", "tau": 0.1}
    limits = (
        threshold | {"delta": None},
        threshold | {"delta": 5.0},
        share,
        share | {"scan": "int4"},
    )
    dense, pruned, drawn, coded = measured_here(planted_cells(*limits)).values()
    assert dense.kept == 1.0 and dense.exact_error < 1e-3
    assert coded.floor_us < drawn.floor_us and coded.kept == pytest.approx(drawn.kept, rel=0.1)
    for figure in (pruned, drawn, coded):
        assert figure.kept < 0.5 and figure.error < 1e-3 < figure.exact_error < 0.5
    assert dense.us == 7.0 and dense.code == "code"


def launch_oracle(self, inputs, planes, output, counters):
    expected, _ = decode_attention_reference(
        inputs.query, planes, inputs.block_table, inputs.seq_lens, block_size=self.block_size,
        scale=self.scale, layer=self.layer, dealt=self.dealt(inputs, planes), counters=counters,
        **{RULES[self.config.rule]: self.limit},
    )  # fmt: skip
    output.copy_(expected)


@pytest.mark.parametrize("wrong", [{"layer": 1}, {"limit": torch.tensor([0.3])}])
def test_draws_of_another_layer_or_tau_are_no_figure(wrong):
    inputs = make_planted(SMALL, "lognormal-2", 0, "cpu")
    config = FFAConfig(rule="share", tau=0.2)
    decoder, other = (Decoder(SMALL, True, {}, "cpu", config=config) for _ in range(2))
    vars(other).update(wrong)
    planes = write_cache(inputs)
    error, kept = check_oracle(decoder, inputs, planes)
    assert error == 0 and kept < 1
    with pytest.raises(CheckFailed):
        check_oracle(decoder, inputs, planes, other)


def check_oracle(decoder, inputs, planes, kernel=None):
    """`decoder.check`, where the kernel's output is the oracle's, of the options of `kernel`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(decoder, "launch", lambda *a: launch_oracle(kernel or decoder, *a))
        return decoder.check(inputs, planes)


def test_delta_is_searched_for_what_is_to_be_kept(measured_here, monkeypatch):
    monkeypatch.setattr(Decoder, "launch", launch_oracle)
    few, many = planted_cells(kept=[0.25, 0.75], name="lognormal-3")
    figures = measured_here([few, many])
    assert abs(figures[few].kept - 0.25) < 0.06 and abs(figures[many].kept - 0.75) < 0.06
    assert figures[few].delta < figures[many].delta
    assert figures[few].exact_error > figures[many].exact_error > 1e-3


def test_a_wrong_output_on_planted_scores_is_no_figure(measured_here, monkeypatch):
    monkeypatch.setattr(Decoder, "launch", lambda self, i, p, output, counters: output.zero_())
    with pytest.raises(CheckFailed, match="error"):
        measured_here(planted_cells({"delta": 5.0}))

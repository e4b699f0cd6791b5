"""Recorded layers: the rule beside the oracle and the kernel, heads, rounding, checks."""

import math
from dataclasses import replace

import pytest
import torch
from recordings import LENGTHS, SHAPE, layer

from vllm_ffa_fp8fp8.bench.decoder import Decoder
from vllm_ffa_fp8fp8.bench.layers import device, rule
from vllm_ffa_fp8fp8.bench.layers.contexts import MAIN, MODEL, choose_steps, window, with_heads
from vllm_ffa_fp8fp8.bench.layers.measure import Point, effective
from vllm_ffa_fp8fp8.bench.layers.rule import block_size_of, compute, relative, to_e4m3
from vllm_ffa_fp8fp8.bench.layers.share import Dealt
from vllm_ffa_fp8fp8.bench.recording.layouts import (
    decode_step,
    shuffled_table,
    stack,
    to_pages,
    to_planes,
)
from vllm_ffa_fp8fp8.config import FFAConfig
from vllm_ffa_fp8fp8.kernels.cache.page_layout import PageLayout
from vllm_ffa_fp8fp8.kernels.reference import decode_attention_reference
from vllm_ffa_fp8fp8.option_values import RULES

LENGTH = 140


def config(**options) -> FFAConfig:
    defaults = {"rule": "threshold", "delta": 3.0, "min_context": 0, "block_size": 16}
    return FFAConfig(**defaults | options)


CONFIGS = {
    "small blocks": config(),
    "pages": config(block_size=None),
    "less precise": config(use_fp8_residual=False, v_cache_dtype="fp8", delta=1.0),
    "everything": config(delta=None),
    "short": config(min_context=LENGTH + 1),
    "share": config(rule="share", tau=0.2, block_size=None),
    "share of 32": config(rule="share", tau=0.4, block_size=32),
}
CHUNKS = {"span": 64, "num_items": 1, "chunk_spans": 2}
PROGRAMS = {"span": 16, "num_items": 3, "chunk_spans": 2}
LAYER = 2


@pytest.mark.parametrize(
    "name, heads, shared",
    [
        *((name, MODEL, {}) for name in CONFIGS),
        ("small blocks", MAIN, {}),
        ("share", MAIN, CHUNKS),
        ("share", MAIN, PROGRAMS),
    ],
)
def test_the_rule_is_the_oracles(name, heads, shared):
    steps, options = choose_steps(with_heads(layer(LAYER), heads), LENGTH), CONFIGS[name]
    (outcome,) = compute(steps, [options], rounded=False, dealt=[Dealt(**shared)]).ours
    dense = stack([steps.dense(place) for place in range(len(steps.chosen))])
    table = shuffled_table(len(dense.key), LENGTH, 64, 0, "cpu")
    layout = PageLayout(
        steps.shape.head_size, torch.bfloat16, residual=options.use_fp8_residual,
        fp8_value=options.v_cache_dtype == "fp8",
    )  # fmt: skip
    planes = to_planes(to_pages(dense.key, table, 64), to_pages(dense.value, table, 64), layout)
    expected, kept = decode_attention_reference(
        dense.query[:, 0], planes, table, torch.full((len(table),), LENGTH),
        block_size=block_size_of(options), scale=SHAPE.scale, layer=LAYER,
        dealt=[shared] * len(table), min_context=options.min_context, dtype=torch.float64,
        **{RULES[options.rule]: torch.tensor([options.limit or math.inf], dtype=torch.float64)},
    )  # fmt: skip
    assert torch.equal(outcome.kept, torch.stack([flags.sum(1) for flags in kept]))
    assert (outcome.output - expected).norm() < 1e-12 * expected.norm()
    prunes = name not in ("everything", "short")
    assert (outcome.kept < outcome.num_blocks).any() == prunes
    assert (outcome.dropped > 0).any() == prunes


def test_exact_attention_and_dropped_mass_are_torchs():
    steps = choose_steps(layer(), LENGTH)
    truth = compute(steps, [config()], rounded=False)
    (outcome,) = truth.ours
    place, head = 4, 5
    dense = steps.dense(place)
    kv_head = head // 3
    query, key = dense.query[0, 0, head].double(), dense.key[0, :, kv_head].double()
    softmax = torch.softmax(key @ query * SHAPE.scale, 0)
    exact = softmax @ dense.value[0, :, kv_head].double()
    assert (truth.exact[place, head] - exact).norm() < 1e-12
    masses = torch.stack([block.sum() for block in softmax.split(16)])
    dropped = outcome.dropped[place, head]
    kept = int(outcome.kept[place, kv_head])
    assert 0 < dropped <= masses.sort().values[: len(masses) - kept].sum() * 1.5
    assert any(  # the mass of as many blocks as were skipped
        abs(masses[list(skipped)].sum() - dropped) < 1e-12
        for skipped in torch.combinations(torch.arange(len(masses)), len(masses) - kept).tolist()
    )


def test_windows_are_the_contexts_that_are_cut():
    for request in layer().requests:
        for step in range(request.steps):
            tokens = window(request, step, LENGTH)
            assert torch.equal(request.key[tokens], decode_step(request, step, LENGTH).key[0])
    request = layer().requests[0]
    assert torch.equal(window(request, 0, LENGTHS[0] + 1), torch.arange(LENGTHS[0] + 1))


def test_heads_are_repeated_to_the_main_shape():
    plain = replace(layer(), requests=layer().requests[:1])
    main = with_heads(plain, MAIN)
    assert (main.shape.num_heads, main.shape.num_kv_heads, main.shape.head_size) == (32, 8, 128)
    assert main.shape.scale == SHAPE.scale
    own, repeated = (compute(choose_steps(x, LENGTH), [], rounded=False) for x in (plain, main))
    group = SHAPE.num_heads // SHAPE.num_kv_heads
    seen = set()
    for head in range(32):
        copy, place = divmod(head // 4, 2)[0], head // 4 % 2
        source = place * group + (copy * 4 + head % 4) % group
        seen.add(source)
        output = repeated.exact[:, head]
        assert (output[:, :32] - own.exact[:, source]).norm() < 1e-12
        assert not output[:, 32:].any()
    assert seen == set(range(SHAPE.num_heads))


def test_steps_are_those_of_prompts_of_about_the_length():
    steps = choose_steps(layer(), LENGTH)
    assert steps.chosen == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    longer = choose_steps(layer(), LENGTHS[0] + 2)
    assert [request.prompt_tokens for request in longer.requests] == [LENGTHS[1]]
    assert len(choose_steps(layer(), 60).requests) == 2
    with pytest.raises(ValueError, match="no prompt has 999 tokens, the longest has 170"):
        choose_steps(layer(), 999)


def test_rounding_is_that_of_the_caches():
    steps = choose_steps(layer(), LENGTH)
    truth = compute(steps, [config(delta=None)], rounded=True)
    bf16, fp8 = (relative(truth.peers[name], truth) for name in ("fa3-bf16", "fa3-fp8"))
    exact = relative(truth.ours[0].output, truth)
    assert 5e-4 < bf16 < 5e-3 and abs(exact / bf16 - 1) < 0.05
    assert 1e-2 < fp8 < 2e-1
    large = torch.tensor([1e4, -1e4, 17.0, 3e-2])
    assert to_e4m3(large).tolist() == [448.0, -448.0, 16.0, 0.029296875]


@pytest.fixture
def untimed(monkeypatch):
    """A GPU's launches, by the interpreter."""
    monkeypatch.setattr(Decoder, "time", lambda self, sets, planes: 7.0)
    monkeypatch.setattr(device, "num_sets", lambda shape: 1)


def few_steps(index: int = 0):
    steps = choose_steps(layer(index), LENGTH)
    return replace(steps, chosen=steps.chosen[1:3], requests=steps.requests[:1])


@pytest.mark.slow
def test_the_kernels_outputs_pass_the_check(untimed):
    steps, names = few_steps(LAYER), ("small blocks", "less precise", "short", "share")
    configs = {name: CONFIGS[name] for name in names}
    truth = compute(steps, list(configs.values()), rounded=False)
    found = list(device.measure_settings(steps, configs, truth, [1]))
    assert sorted(name for _, name, _ in found) == sorted(names)
    for batch, name, figure in found:
        assert (batch, figure["us"], figure["failed"]) == (1, 7.0, None)
        if name == "share":  # drawn otherwise than by one program
            assert figure["kept"] < 1 and 0 < figure["error"] < 0.5
            continue
        outcome = truth.ours[names.index(name)]
        by_head = outcome.kept.double().mean(0) / outcome.num_blocks
        assert figure["kept_by_head"] == pytest.approx(by_head.tolist(), abs=1e-4)
        assert figure["error"] == pytest.approx(relative(outcome.output, truth), abs=1e-4)


@pytest.mark.parametrize(
    "wrong, says",
    [
        (lambda o: replace(o, output=o.output * 1.02), "off by 2"),
        (lambda o: replace(o, least=o.kept + 1, most=o.kept + 1), "blocks kept, where"),
        (lambda o: replace(o, output=o.output * math.nan), "off by nan"),
    ],
)
def test_an_output_that_is_not_the_oracles_has_no_time(untimed, monkeypatch, wrong, says):
    steps = few_steps()
    truth = compute(steps, [config()], rounded=False)
    truth = replace(truth, ours=[wrong(truth.ours[0])])
    monkeypatch.setattr(device, "compute", lambda *_, **__: truth)
    ((_, _, figure),) = device.measure_settings(steps, {"": config()}, truth, [1])
    assert figure["us"] is None and says in figure["failed"]


@pytest.mark.parametrize("tau", [0.2, 0.4])
def test_draws_and_weights_of_another_kind_are_seen(monkeypatch, tau):
    steps, options = choose_steps(layer(LAYER), LENGTH), config(rule="share", tau=tau)

    def outcome(steps, **shared):
        return compute(steps, [options], rounded=False, dealt=[Dealt(**shared)]).ours[0]

    def problem(wrong) -> str | None:
        return device.problem_of(wrong.output, wrong.kept.sum(0), right)

    right = outcome(steps)
    assert problem(right) is None
    assert problem(outcome(replace(steps, layer=LAYER + 1)))
    assert problem(outcome(steps, **PROGRAMS))
    weights = rule.share_weights
    monkeypatch.setattr(rule, "share_weights", lambda *a, **k: weights(*a, **k).clamp(max=1))
    assert "off by" in problem(outcome(steps))


def test_what_rounding_may_decide_is_allowed_for():
    head = rule.Head(choose_steps(layer(), LENGTH), 0, 0)
    scores = head.scores(head.key)
    plain, lower, higher = (
        rule.block_weights(scores, config(), by * torch.ones_like(scores[..., 0]))
        for by in (0.0, 1.0, -1.0)
    )
    assert (higher <= plain).all() and (plain <= lower).all()
    assert higher.sum() < plain.sum() < lower.sum()
    assert torch.equal(lower, rule.block_weights(scores, config(delta=4.0)))


def test_rounded_scores_move_outputs_as_far_as_is_allowed_for():
    head = rule.Head(choose_steps(layer(), LENGTH), 0, 0)
    scores, sizes = head.scores(head.key), head.scores(head.key.abs(), head.query.abs())
    exact, softmax = head.exact()
    generator = torch.Generator().manual_seed(0)
    moved = []
    for _ in range(50):
        noise = torch.randn(scores.shape, generator=generator) * sizes * rule.SCORE_ROUNDING
        weights = torch.softmax((scores + noise) * math.log(2), -1)
        moved.append((head.average(weights, head.value) - exact).norm(dim=-1))
    found = torch.stack(moved).square().mean(0).sqrt()
    expected = head._noise(softmax * sizes, head.value, exact)
    assert torch.allclose(found, expected, rtol=0.25)


@pytest.mark.parametrize("rule", RULES)
def test_dense_layers_are_not_pruned(rule):
    options = config(rule=rule, dense_layers=(0, -1)).to_dict()
    prunes = [
        effective(Point(index, LENGTH, 1, "ours", "", options), 4).prunes for index in range(4)
    ]
    assert prunes == [False, True, True, False]
    with pytest.raises(ValueError, match="the model has no layer 9"):
        effective(Point(0, LENGTH, 1, "ours", "", config(dense_layers=(9,)).to_dict()), 4)

"""Finding the value that reaches a wish, and the windows over which it is found; no engine."""

import math

import pytest

from vllm_ffa_fp8fp8.bench.quality.engine import sum_errors
from vllm_ffa_fp8fp8.bench.quality.search import NEAR, SCALES, Wish, search
from vllm_ffa_fp8fp8.bench.quality.windows import cut_windows

FLOOR = 4e-4


def kl(care):
    """Falls by half a unit of care, jitters by a tenth, and ends in rounding."""
    return FLOOR + 0.2 * 2**-care * (1 + 0.1 * math.sin(40 * care))


def kept(care):
    return min(1.0, 0.02 * 2 ** (care / 2))


@pytest.mark.parametrize("rule", SCALES)
@pytest.mark.parametrize("figure, wished", [(kl, w) for w in (0.15, 0.01, 0.003, 0.0008)]
                         + [(kept, w) for w in (0.03, 0.1, 0.5)])  # fmt: skip
def test_a_wish_is_reached_in_few_values(rule, figure, wished):
    measured = []

    def measure(care):
        assert SCALES[rule].ends[0] <= care <= SCALES[rule].ends[1]
        measured.append(care)
        return figure(care)

    wish = Wish("kl_mean" if figure is kl else "kept", wished)
    found = figure(search(measure, wish, SCALES[rule]))
    assert abs(math.log(found / wished)) <= math.log(1 + NEAR) and wish.is_reached(found)
    assert len(measured) == len(set(measured)) <= 8


@pytest.mark.parametrize("rule", SCALES)
def test_what_cannot_be_reached_ends_at_the_nearest(rule):
    scale = SCALES[rule]
    least = kl(search(kl, Wish("kl_mean", 1e-5), scale))
    assert least == pytest.approx(FLOOR, rel=0.05)
    assert not Wish("kl_mean", 1e-5).is_reached(least)
    fewest = search(kept, Wish("kept", 0.001), scale)
    assert fewest == scale.ends[0] and not Wish("kept", 0.001).is_reached(kept(fewest))
    best = search(lambda care: 1e-6, Wish("kl_mean", 0.1), scale)
    assert best == scale.ends[0]  # better than wished however little is read


def test_a_figure_that_does_not_move_ends_the_search():
    assert search(lambda care: 0.0, Wish("kl_mean", 0.1), SCALES["share"]) == 0.1
    steps = search(lambda care: 0.01 if care > 4.2 else 0.3, Wish("kl_mean", 0.1), SCALES["share"])
    assert SCALES["share"].ends[0] <= steps <= SCALES["share"].ends[1]


def test_values_are_those_that_options_take():
    share, threshold = SCALES["share"], SCALES["threshold"]
    assert [share.limit(care) for care in (0.1, 5.0, 16.0)] == [0.933, 0.0312, 1.53e-05]
    assert threshold.limit(4.5678) == 4.57 and share.name(0.0312) == "tau=0.0312"


def windows(lengths, opening=(), **options):
    texts = [(f"t{n}", [*opening, *range(100 * n, 100 * n + k)]) for n, k in enumerate(lengths)]
    return cut_windows(texts, list(opening), **options)


def test_windows_are_spread_and_end_apart():
    found = windows([60, 40], count=5, tokens=20, last=5)
    assert found.sources == [
        "t0 from token 0", "t0 from token 20", "t0 from token 40",
        "t1 from token 0", "t1 from token 20",
    ]  # fmt: skip
    assert [tokens[0] for tokens in found.tokens] == [0, 20, 40, 100, 120]
    assert {len(tokens) for tokens in found.tokens} == {20}
    ends = [token for tokens in found.tokens for token in tokens[-5:]]
    assert len(ends) == len(set(ends))


def test_windows_begin_as_texts_do():
    found = windows([40], opening=[7], count=2, tokens=20, last=5)
    assert found.tokens == [[7, *range(19)], [7, *range(21, 40)]]
    assert windows([40], count=1, tokens=20, last=5).tokens == [list(range(20))]


def test_no_prompt_leaves_one_token_behind_its_pages():
    """Found in the cache but for that token, it would be decoded, and counted."""
    for tokens in range(40, 80):
        (cut,) = windows([100], count=1, tokens=tokens, last=5).tokens
        assert (len(cut) - 5 - 1) % 16 != 1 and tokens - len(cut) in (0, 1)


def test_a_text_that_is_too_short_is_told():
    with pytest.raises(ValueError, match="t1 is too short: 24 tokens, and 2 windows of 20 need 25"):
        windows([40, 24], count=4, tokens=20, last=5)


def test_errors_of_workers_add_up():
    workers = [{0: [1.0, 4.0], 2: [0.0, 1.0]}, {0: [2.0, 5.0], 2: [1.0, 1.0]}]
    assert sum_errors(workers) == {0: [3.0, 9.0], 2: [1.0, 2.0]}

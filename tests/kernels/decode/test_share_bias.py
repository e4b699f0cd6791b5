"""Rule "share" leaves no bias: over hashes, numerator and denominator are those of attention."""

import math

import pytest
import torch
from cases import Case, make_batch
from share_cases import choice_of, run_share, share_limits, sums_of_programs

from vllm_ffa_fp8fp8.kernels.share_reference import choose_blocks_reference

TAU = 0.05
BLOCK, LENGTH, ROWS = 16, 1030, 2
NUM_HASHES = 4096  # 64 layers of 64 KV heads
NUM_LAUNCHES = 256


def inputs(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Base scores `[ROWS, LENGTH]`, log2 units, and values `[LENGTH, 3]`."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(ROWS, LENGTH, generator=generator, dtype=torch.float64)
    values = 1 + torch.randn(LENGTH, 3, generator=generator, dtype=torch.float64)
    if name == "constant":
        scores[:] = 0.0
    elif name == "one-hot":
        scores[:, 700] = 60.0
    elif name == "sink":
        scores[:, 0] = 12.0
    elif name == "offset keys":
        scores += torch.tensor([[500.0], [-500.0]])
    elif name == "adversarial":  # two blocks a draw, of opposite values
        scores = scores * 0.01
        scores[:, LENGTH - 6 :] = math.log2(LENGTH / TAU / BLOCK / 2)
        values *= 1 - 2 * (torch.arange(LENGTH) // BLOCK % 2)[:, None]
    return scores, values


def sums_of_blocks(scores: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Numerators and denominators of blocks, `[ROWS, num_blocks, 4]`, relative to the largest
    score."""
    weights = (scores - scores.amax(-1, keepdim=True)).exp2()
    sums = torch.cat([weights[..., None] * values, weights[..., None]], dim=-1)
    padding = -(-scores.shape[1] // BLOCK) * BLOCK - scores.shape[1]
    sums = torch.nn.functional.pad(sums, (0, 0, 0, padding))
    return sums.unflatten(1, (-1, BLOCK)).sum(2)


def is_unbiased(samples: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether the mean of `samples`, `[n, ...]`, lies within three standard errors of `exact`."""
    error = (samples.var(0).sum() / len(samples)).sqrt()
    return bool((samples.mean(0) - exact).norm() <= 3 * error + 1e-9 * exact.norm())


def counts_over_hashes(scores: torch.Tensor, **shared) -> torch.Tensor:
    """What every block counts, `[NUM_HASHES, num_blocks]`."""
    heads = scores.expand(64, *scores.shape)
    choices = [
        choose_blocks_reference(heads, 1, TAU, block_size=BLOCK, layer=layer, span=64, **shared)
        for layer in range(NUM_HASHES // 64)
    ]
    return torch.cat([choice.weights[:, 0] for choice in choices]).exp2()


INPUTS = ("random", "constant", "one-hot", "sink", "offset keys", "adversarial")


@pytest.mark.parametrize(
    "name, shared",
    [(name, {"num_items": 2}) for name in INPUTS]
    + [("random", {"num_items": 1}), ("sink", {"num_items": 3, "chunk_spans": 2})],
)
def test_sums_are_those_of_attention_on_average(name, shared):
    """Draws follow base scores, sums those with a residual: its size does not matter."""
    base, values = inputs(name)
    generator = torch.Generator().manual_seed(2)
    scores = base + 0.5 * torch.randn(base.shape, generator=generator, dtype=torch.float64)
    counts = counts_over_hashes(base, **shared)
    sums = sums_of_blocks(scores, values)
    exact = sums.sum(1)
    assert (counts[:, [0, -1]] == 1).all()  # the sink's block and the newest
    drawn = (counts == 0).any(0)
    assert name == "one-hot" or drawn.sum() > len(drawn) // 2

    def verdicts(counts, counts_below=None) -> list[bool]:
        rows = torch.einsum("nb,rbc->nrc", counts, sums)
        if counts_below is not None:
            rows[..., 3] = torch.einsum("nb,rb->nr", counts_below, sums[..., 3])
        return [
            is_unbiased(rows[:, row, part], exact[row, part])
            for row in range(ROWS)
            for part in (slice(0, 3), slice(3, 4))
        ]

    assert verdicts(counts) == [True] * 4
    if name in ("random", "constant", "offset keys"):
        unweighted = (counts > 0).double()
        assert not any(verdicts(unweighted))
        assert verdicts(counts, unweighted) == [True, False] * 2
        assert not any(verdicts(counts.where(counts <= 1, counts.sqrt())))


def test_a_block_that_is_drawn_counts_tau_at_most():
    """Of the denominator, in the row that weighs it most."""
    scores, values = inputs("random")
    counts = counts_over_hashes(scores, num_items=1)
    masses = sums_of_blocks(scores, values)[..., 3]
    shares = (masses / masses.sum(1, keepdim=True)).amax(0)
    drawn = torch.where(counts > 1, counts * shares, 0.0)
    assert drawn.amax() <= TAU * (1 + 1e-9)
    assert drawn.amax() > TAU * 0.99


CASE = Case((1030,), group=3, num_kv_heads=2, block_size=16, dtype=torch.float16)


def test_programs_add_up_what_they_drew(device):
    """What each hands to the merge is the oracle's, numerator and denominator; of another layer it
    is not. On a GPU over the hashes of so many layers: without bias."""
    batch = make_batch(CASE)
    limits = share_limits(CASE)
    num_launches = NUM_LAUNCHES if device == "cuda" else 2
    found = []
    for layer in range(num_launches):
        run = run_share(batch, device, limits, TAU, layer=layer)
        denominators = run.lse.double().exp2()
        found.append((run.partial.double() * denominators[..., None], denominators))
    num_items = run.dealt[0]["num_items"]
    assert num_items > 1
    expected = [
        sums_of_programs(batch, choice_of(batch, TAU, run.dealt, layer=layer), num_items)
        for layer in range(2)
    ]

    def is_close(found, expected) -> bool:
        pairs = zip(found, expected, strict=True)
        return all(bool((f - e).norm() < 2e-3 * e.norm()) for f, e in pairs)

    assert is_close(found[0], expected[0]) and is_close(found[1], expected[1])
    for ours, other in zip(found[0], expected[1], strict=True):
        assert not is_close([ours], [other])
    if device == "cuda":
        everything = choice_of(batch, 0.0, run.dealt)
        exact = sums_of_programs(batch, everything, num_items)
        for part in range(2):
            samples = torch.stack([sums[part].sum(0) for sums in found])
            rows = samples.flatten(1, 2).unbind(1), exact[part].sum(0).flatten(0, 1)
            assert all(is_unbiased(*row) for row in zip(*rows, strict=True))

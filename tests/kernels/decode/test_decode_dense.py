"""The dense interface: layouts, options and every refusal."""

import math

import pytest
import torch
from truth import ROUNDING, assert_within_budget, delta_between, excess_of_blocks

from vllm_ffa_fp8fp8.kernels import KVPlanes, attn_forward_decode_fp8fp8
from vllm_ffa_fp8fp8.kernels.reference import decode_attention_reference

FP8 = torch.float8_e4m3fn


def model_dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float16  # interpreted casts truncate


def make(dtype, batch=2, length=261, heads=8, kv_heads=2, size=64) -> dict:
    """q, k_fp8, v and k_residual, with a key at 0 that scores above most."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    shared = normal(batch, 1, kv_heads, 1, size)
    q = shared + 0.5 * normal(batch, 1, kv_heads, heads // kv_heads, size)
    k = normal(batch, length, kv_heads, size)
    k[:, 0] = shared[:, 0, :, 0] * (5 * size**-0.5)
    base = k.to(FP8)
    return {
        "q": q.flatten(2, 3).to(dtype),
        "k_fp8": base,
        "v": normal(batch, length, kv_heads, size).to(dtype),
        "k_residual": (k - base.float()).to(FP8),
    }


def pick_delta(inputs: dict, block_size: int, scale: float | None = None) -> float:
    """Keeps about half of the blocks and leaves no decision to rounding."""
    q, k = inputs["q"], inputs["k_fp8"].double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows = q[:, 0].unflatten(1, (k.shape[2], -1))
    excess = [
        excess_of_blocks(*pair, scale, block_size)[:, :-1] for pair in zip(rows, k, strict=True)
    ]
    return delta_between(torch.cat([e.flatten() for e in excess]), 0.5)


def call(device: str, inputs: dict, **options):
    moved = {name: tensor.to(device) for name, tensor in inputs.items()}
    return attn_forward_decode_fp8fp8(**moved, **options)


def oracle(inputs: dict, block_size: int, delta: float, scale: float | None = None, **options):
    """Output in float64, kept blocks, and attention to them in the model's dtype."""
    q, k, v, residual = (inputs.get(name) for name in ("q", "k_fp8", "v", "k_residual"))
    batch, length, kv_heads, size = k.shape
    scale = size**-0.5 if scale is None else scale
    planes = KVPlanes(
        k.transpose(1, 2),
        None if residual is None else residual.transpose(1, 2),
        None,
        v.transpose(1, 2),
        page_size=length,
        residual_scale=1.0,
    )
    exact, kept = decode_attention_reference(
        q[:, 0],
        planes,
        torch.arange(batch)[:, None],
        torch.full((batch,), length),
        block_size=block_size,
        scale=scale,
        delta=torch.tensor([delta]),
        dtype=torch.float64,
        **options,
    )
    joined = k.float() if residual is None else k.float() + residual.float()
    rows = q[:, 0].unflatten(1, (kv_heads, -1))  # [B, HKV, group, K]
    scores = rows @ joined.to(q.dtype).permute(0, 2, 3, 1) * scale
    tokens = torch.stack(kept).repeat_interleave(block_size, dim=2)[:, :, None, :length]
    weights = torch.softmax(scores.masked_fill(~tokens, -math.inf), dim=-1)
    return exact, torch.stack(kept), (weights @ v.transpose(1, 2)).flatten(1, 2)


def check(device: str, inputs: dict, block_size: int, delta: float, **options) -> torch.Tensor:
    """Output and skip ratio of `SBS = block_size` against the oracle; returns the output."""
    output, skipped = call(
        device, inputs, BS=128, SBS=block_size, delta=delta, return_skip_ratio=True, **options
    )
    if not options.pop("use_fp8_residual", True):
        inputs = {name: tensor for name, tensor in inputs.items() if name != "k_residual"}
    exact, kept, plain = oracle(inputs, block_size, delta, **options)
    assert output.dtype == inputs["q"].dtype and output.shape == exact.shape
    assert_within_budget(output.cpu(), exact, plain)
    assert skipped == pytest.approx(1 - float(kept.float().mean()))
    return output.cpu()


@pytest.mark.parametrize(
    "shape, block_size",
    [
        ({"length": 517}, 64),
        ({"length": 261, "heads": 3, "kv_heads": 1, "size": 80}, 16),
        ({"length": 512, "heads": 16, "kv_heads": 1, "size": 128}, 32),
        ({"length": 1100, "heads": 2, "kv_heads": 2, "batch": 1}, 128),
    ],
)
def test_pruned(device, shape, block_size):
    inputs = make(model_dtype(device), **shape)
    delta = pick_delta(inputs, block_size)
    output = check(device, inputs, block_size, delta)
    exact, kept, plain = oracle(inputs, block_size, math.inf)
    assert kept.all()
    with pytest.raises(AssertionError):
        assert_within_budget(output, exact, plain)


@pytest.mark.parametrize("length", [1, 129])
def test_short(device, length):
    check(device, make(model_dtype(device), length=length), 16, 1.0)


def test_unpruned(device):
    inputs = make(model_dtype(device))
    output, skipped = call(device, inputs, delta=math.inf, return_skip_ratio=True)
    exact, _, plain = oracle(inputs, 128, math.inf)
    assert skipped == 0.0
    assert_within_budget(output.cpu(), exact, plain)


def test_skip_ratio_only_if_asked(device):
    assert isinstance(call(device, make(model_dtype(device))), torch.Tensor)


@pytest.mark.slow
def test_smaller_blocks_inside_a_block(device):
    """SBS decides; BS alone stands for SBS = BS."""
    inputs = make(model_dtype(device))
    delta = pick_delta(inputs, 16)
    small = call(device, inputs, BS=128, SBS=16, delta=delta)
    assert torch.equal(small, call(device, inputs, BS=16, delta=delta))
    assert not torch.equal(small, call(device, inputs, BS=128, delta=delta))


@pytest.mark.slow
def test_without_the_residual(device):
    inputs = make(model_dtype(device))
    delta = pick_delta(inputs, 64)
    output = check(device, inputs, 64, delta, use_fp8_residual=False)
    assert not torch.equal(output, check(device, inputs, 64, delta))
    del inputs["k_residual"]
    again = call(device, inputs, BS=64, delta=delta, use_fp8_residual=False)
    assert torch.equal(output, again.cpu())


def test_16_bit_keys(device):
    inputs = make(model_dtype(device))
    inputs["k_fp8"] = (inputs["k_fp8"].float() + inputs.pop("k_residual").float()).to(
        inputs["q"].dtype
    )
    check(device, inputs, 64, pick_delta(inputs, 64))


@pytest.mark.slow
def test_scale(device):
    inputs = make(model_dtype(device))
    check(device, inputs, 64, pick_delta(inputs, 64, scale=0.3), scale=0.3)


def test_precomputed_threshold(device):
    """Used as it is, without delta: half of the requests keep all, half the newest block."""
    inputs = make(model_dtype(device))
    threshold = torch.full((2, 8), -1e30)
    threshold[1] = 1e30
    output, skipped = call(
        device,
        inputs,
        BS=64,
        precomputed_threshold=threshold.to(device),
        return_skip_ratio=True,
    )
    exact, kept, plain = oracle(inputs, 64, 5.0, precomputed_threshold=threshold)
    assert kept[0].all() and kept[1].sum() == 2
    assert skipped == pytest.approx(0.5 * 4 / 5)
    assert_within_budget(output.cpu(), exact, plain)


@pytest.mark.slow
def test_strided_inputs(device):
    """Heads before tokens in memory, as caches of other designs have them."""
    inputs = make(model_dtype(device))
    strided = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()}
    assert strided["v"].to(device).stride() == strided["v"].stride() != inputs["v"].stride()
    check(device, strided, 64, pick_delta(inputs, 64))


def test_the_delta_of_these_tests_is_no_borderline():
    inputs = make(torch.float16)
    delta = pick_delta(inputs, 64)
    kept = [oracle(inputs, 64, delta + nudge)[1] for nudge in (-ROUNDING, ROUNDING)]
    assert torch.equal(*kept)


@pytest.mark.slow
def test_residual_moves_large_scores_within_float16(device):
    """Logits in the hundreds, a residual that moves them by more than float16 weights hold."""
    inputs = make(torch.float16, batch=1, length=300)
    key = torch.randn(1, 300, 2, 64, generator=torch.Generator().manual_seed(1)) / 8
    key[:, [5, 150, 290], :, 0] = torch.tensor([136.0, 135.0, 135.5])[None, :, None]
    inputs["k_fp8"] = key.to(FP8)
    inputs["k_residual"] = (key - inputs["k_fp8"].float()).to(FP8)
    inputs["q"][..., 0] = 32.0
    options = {"BS": 64, "delta": 200.0}
    output = call(device, inputs, **options).cpu()
    exact, _, plain = oracle(inputs, 64, 200.0)
    assert_within_budget(output, exact, plain)

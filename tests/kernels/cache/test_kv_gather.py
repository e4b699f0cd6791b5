"""Gathering cached keys and values gives back what was written, packed."""

import math

import pytest
import torch
from cases import Batch, Case, make_batch

from vllm_ffa_fp8fp8.kernels import gather_kv
from vllm_ffa_fp8fp8.kernels.cache_reference import gather_kv_reference

HALF, BFLOAT = torch.float16, torch.bfloat16
SPARE = 3  # rows beyond the gathered ones


def gather(device: str, batch: Batch, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `lengths` tokens of every request, on the CPU."""
    case = batch.case
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    dtype = case.dtype if device == "cuda" else torch.float32  # interpreted casts truncate
    shape = (sum(lengths) + SPARE, case.num_kv_heads, case.head_size)
    key = torch.full(shape, math.nan, dtype=dtype, device=device)
    value = torch.full_like(key, math.nan)
    table = batch.block_table.to(device)
    gather_kv(batch.planes(device), table, cu_seqlens, max(lengths), key, value)
    for tensor in (key, value):
        assert tensor[-SPARE:].isnan().all()
    return key[:-SPARE].to("cpu", case.dtype), value[:-SPARE].to("cpu", case.dtype)


def expected(batch: Batch, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [
        gather_kv_reference(batch.planes(), pages, length, batch.case.dtype)
        for pages, length in zip(batch.block_table, lengths, strict=True)
    ]
    return tuple(torch.cat(tensors) for tensors in zip(*pairs, strict=True))


def assert_close(back: torch.Tensor, written: torch.Tensor, bound: float, least: float) -> None:
    """Off by at most `bound` of an element, where it is at least `least` of its row's largest."""
    written = written.double()
    normal = written.abs() >= least * written.abs().amax(-1, keepdim=True)
    assert normal.double().mean() > 0.99
    assert ((back.double() - written).abs() <= bound * written.abs())[normal].all()


@pytest.mark.parametrize(
    "shape",
    [
        {"head_size": 64, "page_size": 64},
        {"head_size": 64, "page_size": 64, "interleaved": True},
        {"head_size": 80, "page_size": 48, "dtype": HALF},
        {"head_size": 96, "page_size": 16, "residual": False},
        {"head_size": 128, "page_size": 128, "num_kv_heads": 1},
        {"head_size": 256, "page_size": 80, "num_kv_heads": 1},
        {"head_size": 64, "page_size": 32, "fp8_key": False, "residual": False},
        {"head_size": 80, "page_size": 32, "fp8_key": False, "residual": False, "dtype": HALF},
        {"head_size": 128, "page_size": 64, "fp8_value": True, "interleaved": True},
        {"head_size": 80, "page_size": 48, "fp8_value": True, "residual": False, "dtype": HALF},
        {
            "head_size": 96,
            "page_size": 32,
            "fp8_key": False,
            "residual": False,
            "fp8_value": True,
        },
    ],
)
def test_whole_requests(device, shape):
    """Equal to the oracle bit by bit; keys as written, up to the bound of `write_kv`."""
    case = Case((130, 0, 1, 81, 63), **shape)
    batch = make_batch(case)
    key, value = gather(device, batch, list(case.lengths))
    oracle_key, oracle_value = expected(batch, list(case.lengths))
    assert torch.equal(key, oracle_key) and torch.equal(value, oracle_value)
    if not case.fp8_key or (case.residual and case.dtype == BFLOAT):
        assert_close(key, batch.key, 0, 2**-14)
    else:
        assert_close(key, batch.key, 2**-9 if case.residual else 2**-4, 2**-13)
    assert_close(value, batch.value, 2**-4 if case.fp8_value else 0, 2**-13)
    assert case.fp8_value or torch.equal(value, batch.value)


@pytest.mark.parametrize("lengths", [[64, 0, 17], [0, 0, 1], [1, 100, 64]])
def test_prefixes(device, lengths):
    """Only the first tokens, the cached prefix, are gathered."""
    batch = make_batch(Case((130, 100, 65), page_size=32))
    key, value = gather(device, batch, lengths)
    oracle_key, oracle_value = expected(batch, lengths)
    assert torch.equal(key, oracle_key) and torch.equal(value, oracle_value)


def test_nothing_to_gather(device):
    batch = make_batch(Case((130, 100)))
    key, value = gather(device, batch, [0, 0])
    assert len(key) == len(value) == 0


def test_huge_and_tiny_rows(device):
    """Exponents are applied: rows of 1e30 and 1e-30 next to each other come back."""
    batch = make_batch(Case((40,), page_size=16, fp8_value=True))
    batch.key[::2] = (batch.key[::2].float() * 1e30).to(BFLOAT)
    batch.key[1::2] = (batch.key[1::2].float() * 1e-30).to(BFLOAT)
    batch.value[::2] = (batch.value[::2].float() * 1e-30).to(BFLOAT)
    batch.value[1::2] = (batch.value[1::2].float() * 1e30).to(BFLOAT)
    batch.write()
    key, value = gather(device, batch, [40])
    assert_close(value, batch.value, 2**-4, 2**-13)
    close = torch.isclose(key.double(), batch.key.double(), rtol=0, atol=0)
    assert close.double().mean() > 0.99


def test_nothing_is_written_beyond_the_outputs(device):
    """Whatever the lengths on the device are."""
    batch = make_batch(Case(lengths=(70, 33)))
    table = batch.block_table.to(device)
    cu_seqlens = torch.tensor([0, 70, 103], dtype=torch.int32, device=device)
    memory = torch.full((2, 110, batch.case.num_kv_heads, batch.case.head_size), math.nan)
    memory = memory.to(device, batch.case.dtype if device == "cuda" else torch.float32)
    key, value = memory[:, :101]
    gather_kv(batch.planes(device), table, cu_seqlens, 70, key, value)
    assert memory[:, 101:].isnan().all() and not memory[:, :101].isnan().any()

"""Recorded, dense and paged: each back and forth."""

import pytest
import torch
from recordings import LENGTHS, SHAPE, STEPS, requests

from vllm_ffa_fp8fp8.bench.recording.layouts import (
    FIRST_TOKENS,
    as_requests,
    decode_step,
    from_pages,
    from_planes,
    shuffled_table,
    stack,
    to_pages,
    to_planes,
)
from vllm_ffa_fp8fp8.kernels import attn_forward_decode_fp8fp8
from vllm_ffa_fp8fp8.kernels.cache.page_layout import PageLayout
from vllm_ffa_fp8fp8.kernels.reference import decode_attention_reference

LENGTH = 140


def test_a_decode_step_sees_the_prompt_and_what_came_after():
    request = requests()[0]
    dense = decode_step(request, 1)
    seen = LENGTHS[0] + 2
    assert dense.query.shape == (1, 1, SHAPE.num_heads, SHAPE.head_size)
    assert dense.key.shape == (1, seen, SHAPE.num_kv_heads, SHAPE.head_size)
    assert torch.equal(dense.query[0, 0], request.query[1])
    assert torch.equal(dense.key[0], request.key[:seen])
    assert torch.equal(dense.value[0], request.value[:seen])


def test_a_cut_context_keeps_the_first_tokens_and_the_newest():
    request = requests()[0]
    dense = decode_step(request, 1, LENGTH)
    seen = LENGTHS[0] + 2
    assert torch.equal(dense.key[0, :FIRST_TOKENS], request.key[:FIRST_TOKENS])
    newest = request.value[seen - (LENGTH - FIRST_TOKENS) : seen]
    assert torch.equal(dense.value[0, FIRST_TOKENS:], newest)
    assert decode_step(request, 0, 1).key.shape[1] == 1
    assert torch.equal(decode_step(request, 1, seen).key, decode_step(request, 1).key)


@pytest.mark.parametrize("step, length", [(STEPS, None), (-1, None), (0, LENGTHS[0] + 2), (0, 0)])
def test_what_was_not_recorded_is_refused(step, length):
    with pytest.raises(ValueError, match="decode steps 0 to 2|cannot be cut"):
        decode_step(requests()[0], step, length)


def test_recorded_to_dense_and_back():
    dense = stack([decode_step(requests()[n], step, LENGTH) for n, step in ((0, 0), (1, 2))])
    again = stack([decode_step(request, 0) for request in as_requests(dense)])
    assert all(map(torch.equal, dense, again))
    assert [request.prompt_tokens for request in as_requests(dense)] == [LENGTH - 1] * 2


def dense_batch():
    return stack([decode_step(request, step, LENGTH) for request in requests() for step in (0, 2)])


@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_dense_to_pages_and_back(page_size):
    dense = dense_batch()
    table = shuffled_table(len(dense.key), LENGTH, page_size, 0, "cpu")
    assert sorted(table.flatten().tolist()) == list(range(table.numel()))
    assert table.flatten().tolist() != sorted(table.flatten().tolist())
    pages = to_pages(dense.key, table, page_size)
    assert pages.shape == (table.numel(), page_size, SHAPE.num_kv_heads, SHAPE.head_size)
    assert torch.equal(from_pages(pages, table, LENGTH), dense.key)


@pytest.mark.parametrize("residual, fp8_value", [(True, False), (True, True), (False, False)])
def test_dense_to_planes_and_back(residual, fp8_value):
    dense = dense_batch()
    table = shuffled_table(len(dense.key), LENGTH, 64, 0, "cpu")
    layout = PageLayout(SHAPE.head_size, torch.bfloat16, residual=residual, fp8_value=fp8_value)
    planes = to_planes(to_pages(dense.key, table, 64), to_pages(dense.value, table, 64), layout)
    key, value = from_planes(planes, table, LENGTH, torch.float64)

    def error(found, wanted):
        return float((found - wanted).abs().max() / wanted.abs().max())

    assert error(key, dense.key) < (1e-6 if residual else 2**-4)
    assert (error(key, dense.key) > 1e-3) == (not residual)
    assert error(value, dense.value) < (2**-4 if fp8_value else 1e-9)


def test_dense_is_what_the_kernel_over_dense_tensors_takes():
    dense = stack([decode_step(requests()[0], 1, LENGTH)])
    base = dense.key.to(torch.float8_e4m3fn)
    residual = (dense.key.float() - base.float()).to(torch.float8_e4m3fn)
    output = attn_forward_decode_fp8fp8(
        dense.query, base, dense.value, k_residual=residual, BS=16, delta=float("inf")
    )
    table = shuffled_table(1, LENGTH, 64, 0, "cpu")
    layout = PageLayout(SHAPE.head_size, torch.bfloat16)
    planes = to_planes(to_pages(dense.key, table, 64), to_pages(dense.value, table, 64), layout)
    expected, _ = decode_attention_reference(
        dense.query[:, 0], planes, table, torch.tensor([LENGTH]),
        block_size=64, scale=SHAPE.scale, delta=None,
    )  # fmt: skip
    assert (output.float() - expected).norm() < 2e-2 * expected.norm()

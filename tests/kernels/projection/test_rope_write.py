"""Rotation, norm and cache write of projected Q, K and V, against float64 and byte for byte."""

import pytest
import torch
from cases import POISON, empty_cache, own_layer
from qkv_cases import NUM_PAGES, SHAPES, QKVCase, check_cache, check_rotation

from vllm_ffa_fp8fp8.kernels.projection.reference import rope_and_write_reference
from vllm_ffa_fp8fp8.kernels.projection.rope_write import rope_and_write
from vllm_ffa_fp8fp8.kernels.projection.tuning import RopeWriteTuning, rope_write_tuning

ERROR = 2e-6  # of float32 arithmetic


def run(case: QKVCase, device: str, in_place: bool, tuning=None) -> tuple[torch.Tensor, ...]:
    """Projections, output `[num_tokens, num_heads + num_kv_heads]` and cache."""
    qkv = case.normal(case.num_tokens, case.width + 16).to(device, case.dtype)[:, : case.width]
    before = qkv.cpu().clone()
    rotated = qkv
    if not in_place:
        width = (case.num_heads + case.num_kv_heads) * case.head_size
        rotated = torch.full((case.num_tokens, width), torch.nan, dtype=qkv.dtype, device=device)
    storage = empty_cache(case, NUM_PAGES).to(device)
    planes = case.layout.split(own_layer(storage, case.interleaved))
    slots, positions = case.slots().to(device), case.positions().to(device)
    rope_and_write(qkv, positions, case.heads(device), planes, slots, rotated, tuning)
    value = before[:, -case.num_kv_heads * case.head_size :]
    assert torch.equal(qkv.cpu()[:, -value.shape[1] :], value)
    assert in_place or torch.equal(qkv.cpu(), before)
    return before, rotated.cpu(), storage.cpu()


@pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "out_of_place"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(device, shape, in_place):
    case = SHAPES[shape]
    qkv, output, storage = run(case, device, in_place)
    check_rotation(case, qkv, output, ERROR)
    check_cache(case, storage, output, qkv[:, -case.num_kv_heads * case.head_size :])


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 7, 9, 12, 16])
def test_groups(device, group):
    case = QKVCase(group=group, num_kv_heads=1 + group % 3, num_tokens=3, page_size=16)
    qkv, output, storage = run(case, device, in_place=True)
    check_rotation(case, qkv, output, ERROR)
    check_cache(case, storage, output, qkv[:, -case.num_kv_heads * case.head_size :])


@pytest.mark.slow
@pytest.mark.parametrize("tokens, heads", [(1, 1), (4, 2), (2, 16), (8, 1)])
def test_any_cut_gives_the_same(device, tokens, heads):
    case = QKVCase(num_tokens=9, norm=True, group=5)
    _, expected, expected_storage = run(case, device, in_place=False)
    _, output, storage = run(case, device, False, RopeWriteTuning(tokens, heads))
    assert torch.equal(output, expected) and torch.equal(storage, expected_storage)


def test_the_cut_is_one_under_batch_invariance():
    batches = (1, 2, 64, 65, 1000, 100_000)
    assert len({rope_write_tuning(n, batch_invariant=True) for n in batches}) == 1
    assert len({rope_write_tuning(n) for n in batches}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [80, 128])
def test_batch_invariant_norms(device, head_size):
    """Rows alone and in a batch that is cut otherwise without it: bit for bit."""
    case = QKVCase(num_tokens=70, norm=True, group=2, num_kv_heads=1, head_size=head_size)
    qkv = case.normal(case.num_tokens, case.width).to(device, case.dtype)
    heads, positions = case.heads(device), case.positions().to(device)

    def rotate(rows: slice) -> torch.Tensor:
        rotated = torch.empty_like(qkv[rows])
        tuning = rope_write_tuning(len(rotated), batch_invariant=True)
        rope_and_write(qkv[rows], positions[rows], heads, None, None, rotated, tuning)
        return rotated[:, : heads.query_size + heads.key_value_size]

    together = rotate(slice(None))
    for first, count in ((0, 1), (3, 1), (64, 6), (69, 1)):
        alone = slice(first, first + count)
        assert torch.equal(rotate(alone), together[alone])


@pytest.mark.slow
def test_many_tokens(device):
    case = QKVCase(num_tokens=131, page_size=64, num_kv_heads=1)
    qkv, output, storage = run(case, device, in_place=True)
    check_rotation(case, qkv, output, ERROR)
    check_cache(case, storage, output, qkv[:, -case.head_size :])


def test_without_a_cache(device):
    """Profiling runs rotate, and no slot may be touched."""
    case = SHAPES["qwen3"]
    qkv = case.normal(case.num_tokens, case.width).to(device, case.dtype)
    rotated = torch.empty_like(qkv)
    storage = empty_cache(case, NUM_PAGES).to(device)
    planes = case.layout.split(own_layer(storage, case.interleaved))
    heads, positions = case.heads(device), case.positions().to(device)
    rope_and_write(qkv, positions, heads, None, None, rotated)
    check_rotation(case, qkv.cpu(), rotated, ERROR)
    padding = torch.full((case.num_tokens,), -1, device=device)
    rope_and_write(qkv, positions, heads, planes, padding, rotated)
    rope_and_write(qkv[:0], positions[:0], heads, planes, padding[:0], rotated[:0])
    assert (storage == POISON).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_reference(shape):
    """The CPU path."""
    case = SHAPES[shape]
    qkv = case.normal(case.num_tokens, case.width).to(case.dtype)
    rotated, storage = torch.empty_like(qkv), empty_cache(case, NUM_PAGES)
    planes = case.layout.split(own_layer(storage, case.interleaved))
    rope_and_write_reference(
        qkv, case.positions(), case.heads("cpu"), planes, case.slots(), rotated
    )
    check_rotation(case, qkv, rotated, ERROR)
    check_cache(case, storage, rotated, qkv[:, -case.num_kv_heads * case.head_size :])


def test_the_check_rejects_wrong_rotations(device):
    """Another style, no norm, positions off by one, Q left as it was."""
    case = SHAPES["qwen3"]
    qkv, output, _ = run(case, device, in_place=False)
    _, other_style, _ = run(QKVCase(**vars(case) | {"is_neox_style": False}), device, False)
    _, no_norm, _ = run(QKVCase(**vars(case) | {"norm": False}), device, False)
    head = slice(case.head_size, 2 * case.head_size)
    one_head = output.clone()
    one_head[:, head] = qkv[:, head]
    for wrong in (other_style, no_norm, one_head, output.roll(1, 0), output * (1 + 2**-7)):
        with pytest.raises(AssertionError):
            check_rotation(case, qkv, wrong, ERROR)

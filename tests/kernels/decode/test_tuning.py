"""Which launch parameters are chosen for which batch, model and GPU."""

import pytest

from vllm_ffa_fp8fp8.kernels.decode.tuning import (
    DEFAULT,
    FEW,
    HOPPER_SHARED_MEMORY,
    TUNINGS,
    decode_tuning,
)

ADA_SHARED_MEMORY = 101_376


def test_a_measured_gpu_has_parameters_for_few_requests():
    assert decode_tuning(1, 128, 64) == decode_tuning(2, 128, 64) == FEW
    assert decode_tuning(3, 128, 64) == decode_tuning(1000, 128, 64) == DEFAULT
    fp8_values = [decode_tuning(n, 128, 64, value_bytes=1) for n in (2, 3)]
    assert [t.scan_tokens for t in fp8_values] == [FEW.scan_tokens, DEFAULT.scan_tokens]
    assert [t.dense_programs_per_processor for t in fp8_values] == [2, 2]


def test_an_unknown_gpu_has_the_default():
    assert decode_tuning(1, 128, 64, capability=(12, 7)) == DEFAULT


def test_pipelines_have_about_as_many_bytes_in_flight():
    """FP8 values, small heads, large heads."""
    assert decode_tuning(64, 128, 64, value_bytes=1).attend_stages == 4
    small = decode_tuning(64, 64, 64)
    assert (small.scan_tokens, small.scan_stages, small.attend_stages) == (256, 6, 6)
    large = decode_tuning(64, 256, 64)
    assert (large.scan_tokens, large.scan_stages, large.attend_stages) == (128, 3, 2)
    wide = decode_tuning(64, 128, 64, key_bytes=2)
    assert (wide.scan_tokens, wide.scan_stages) == (128, 3)


@pytest.mark.parametrize("capability", TUNINGS)
def test_the_last_class_takes_any_batch(capability):
    last = TUNINGS[capability][-1]
    assert last.takes(1 << 20, 1) and last.takes(1 << 20, 2)


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("shared_memory", [ADA_SHARED_MEMORY, HOPPER_SHARED_MEMORY])
@pytest.mark.parametrize("num_reqs", [1, 64])
def test_pipelines_fit(head_size, block_size, shared_memory, num_reqs):
    """All programs that are to run at a time fit, and a program alone always does; that the
    compiled kernels keep to it is test_compile's."""
    tuning = decode_tuning(num_reqs, head_size, block_size, shared_memory=shared_memory)
    tile = block_size * (1 << (head_size - 1).bit_length())
    for stages, bytes_per_row, programs in (
        (tuning.attend_stages, 3, tuning.programs_per_processor),
        (tuning.dense_stages, 4, tuning.dense_programs_per_processor),
    ):
        pipeline = stages * bytes_per_row * tile
        assert programs == 1 or programs * pipeline < shared_memory
        assert stages == 1 or pipeline < shared_memory


def test_a_small_gpu_takes_what_fits():
    tuning = decode_tuning(64, 256, 64, shared_memory=ADA_SHARED_MEMORY)
    assert (tuning.scan_stages, tuning.attend_stages, tuning.dense_stages) == (2, 1, 1)
    assert tuning.programs_per_processor == 1
    tuning = decode_tuning(64, 128, 64, shared_memory=ADA_SHARED_MEMORY)
    assert (tuning.scan_stages, tuning.attend_stages, tuning.dense_stages) == (2, 3, 2)
    assert tuning.programs_per_processor == 1

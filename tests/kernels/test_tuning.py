"""Which pipelines are chosen for which GPU."""

import pytest

from vllm_ffa_fp8fp8.kernels.tuning import DEFAULT, decode_tuning, pipeline_bytes

ADA_SHARED_MEMORY = 101_376

# What Triton 3.6 compiled to: bytes of a tile, of two stages, of three stages.
COMPILED = [
    (128 * 128, 24_584, 40_976),  # the scan, head size 128
    (128 * 256, 40_968, 73_744),
    (128 * 128 * 2, 45_064, 77_840),  # 16-bit keys
    (128 * 256 * 2, 81_928, 147_472),
    (4 * 64 * 128, 38_916, 71_688),  # the attention that reads the base
    (4 * 128 * 128, 73_732, 139_272),
    (4 * 64 * 256, 75_780, 141_320),
    (4 * 128 * 256, 143_364, 274_440),
    (3 * 64 * 128, 0, 57_344),  # the attention that starts from scores
    (3 * 64 * 256, 0, 110_592),
    (3 * 128 * 256, 0, 212_992),
]


@pytest.mark.parametrize("tile, two_stages, three_stages", COMPILED)
def test_the_bound_holds(tile, two_stages, three_stages):
    assert pipeline_bytes(2, tile) >= two_stages
    assert three_stages <= pipeline_bytes(3, tile) < 1.7 * three_stages


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_hopper_takes_the_default(head_size, block_size):
    assert decode_tuning(head_size, block_size) == DEFAULT


def test_a_small_gpu_takes_what_fits():
    assert decode_tuning(128, 64, shared_memory=ADA_SHARED_MEMORY) == DEFAULT
    tuning = decode_tuning(256, 64, shared_memory=ADA_SHARED_MEMORY)
    assert (tuning.scan_stages, tuning.attend_stages, tuning.dense_stages) == (3, 2, 2)
    tuning = decode_tuning(256, 128, key_bytes=2, shared_memory=ADA_SHARED_MEMORY)
    assert (tuning.scan_stages, tuning.attend_stages, tuning.dense_stages) == (2, 1, 1)

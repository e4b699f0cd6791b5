"""Which pipelines are chosen for which GPU. That they fit is what `test_compile.py` sees."""

import pytest

from vllm_ffa_fp8fp8.kernels.tuning import DEFAULT, decode_tuning

ADA_SHARED_MEMORY = 101_376
STAGES = ("scan_stages", "attend_stages", "dense_stages")


@pytest.mark.parametrize("head_size", [64, 80, 96, 128])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_hopper_takes_the_default(head_size, block_size):
    assert decode_tuning(head_size, block_size) == DEFAULT


@pytest.mark.parametrize("key_bytes", [1, 2])
@pytest.mark.parametrize("head_size, block_size", [(128, 64), (256, 64), (256, 128)])
def test_a_smaller_gpu_has_no_deeper_pipelines(head_size, block_size, key_bytes):
    large = decode_tuning(head_size, block_size, key_bytes)
    small = decode_tuning(head_size, block_size, key_bytes, ADA_SHARED_MEMORY)
    for stages in STAGES:
        assert 1 <= getattr(small, stages) <= getattr(large, stages)
    smallest = decode_tuning(head_size, block_size, key_bytes, shared_memory=1)
    assert [getattr(smallest, stages) for stages in STAGES] == [1, 1, 1]

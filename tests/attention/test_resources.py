"""Memory and caches that an engine needs when it starts and while it serves."""

from types import SimpleNamespace

import pytest
import torch
from launched_variants import ENGINES, LONGEST, MAX_TOKENS, Engine, make_layer
from vllm.v1.worker.workspace import WorkspaceManager

from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.attention import cuda_ops, resources
from vllm_ffa_fp8fp8.attention.metadata import PrefillBatch
from vllm_ffa_fp8fp8.commands import doctor
from vllm_ffa_fp8fp8.environment import GPU

HOPPER = GPU("NVIDIA H100", (9, 0))


@pytest.fixture
def workspace(monkeypatch) -> WorkspaceManager:
    """vLLM's own, on the CPU, for CudaOps whose kernels do not run."""
    manager = WorkspaceManager(torch.device("cpu"))
    monkeypatch.setattr(cuda_ops, "current_workspace_manager", lambda: manager)
    monkeypatch.setattr(cuda_ops, "load_flash_attention", lambda *given: lambda *batch: None)
    monkeypatch.setattr(cuda_ops, "gather_kv", lambda *batch: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    return manager


def make_ops(engine: Engine) -> cuda_ops.CudaOps:
    impl, config = make_layer(engine)
    config.cache_config = SimpleNamespace(block_size=engine.page_size)
    config.scheduler_config.max_num_seqs = 4  # few: what decode needs hides nothing of prefill's
    return impl.ops


def prefill(ops: cuda_ops.CudaOps, seq_lens: list[int], query_lens: list[int]) -> None:
    starts, sums = ([0, *torch.tensor(lens).cumsum(0).tolist()] for lens in (query_lens, seq_lens))
    query = torch.empty(starts[-1], ops.impl.num_heads, ops.impl.head_size)
    batch = PrefillBatch(
        torch.tensor(starts), torch.tensor(sums), torch.zeros(len(seq_lens), 1), starts, seq_lens
    )
    ops.prefill(query, query, query, None, batch, query)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_step_needs_more_than_was_reserved(workspace, engine):
    """The longest prefixes with the largest chunks that options allow, after the profiling run."""
    ops = make_ops(engine)
    ops.reserve_scratch()
    workspace.lock()
    prefill(ops, [LONGEST], [MAX_TOKENS])
    prefill(ops, [LONGEST] * 4, [MAX_TOKENS // 4] * 4)
    prefill(ops, [LONGEST - 1, 1, LONGEST, 17], [MAX_TOKENS - 3, 1, 1, 1])
    workspace.get_simultaneous(*ops.decode_limits(16).scratch_shapes)
    with pytest.raises(AssertionError, match="locked"):
        ops._context(2 * LONGEST)


def test_out_of_memory_names_what_to_lower(workspace, monkeypatch):
    def fail(*wanted):
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.")

    ops = make_ops(ENGINES[0])
    monkeypatch.setattr(workspace, "get_simultaneous", fail)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        ops.reserve_scratch()
    told = str(caught.value)
    for words in (f"max_model_len {LONGEST:,}", "lower --max-model-len", "20.00 GiB"):
        assert words in told


def test_a_cache_that_cannot_be_written_is_told(monkeypatch, tmp_path):
    """As in a read-only home: by the first layer, and by doctor."""
    resources.check_triton_cache.cache_clear()
    resources.check_triton_cache()
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(place))
    resources.check_triton_cache.cache_clear()
    with pytest.raises(ValueError, match=f"cache {place} cannot be written: .*TRITON_CACHE_DIR"):
        resources.check_triton_cache()
    monkeypatch.setattr(environment, "is_cpu_build", lambda: False)
    found = doctor.check_triton(HOPPER)
    assert found.status == doctor.MISSING and str(place) in found.found
    assert "TRITON_CACHE_DIR" in found.advice

"""What a layer counted outlives vLLM's second level of sleep, and new weights after it."""

from types import SimpleNamespace

import pytest
import torch
from attention_modules import make_attention, make_config
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.models.qwen3 import Qwen3Attention
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")

GARBAGE = -7


class Sleeper(Worker):
    """A worker whose device keeps nothing of what its model has on it."""

    def __init__(self, model: torch.nn.Module, vllm_config):
        self.vllm_config, self.model_config = vllm_config, vllm_config.model_config
        self.model_runner = SimpleNamespace(model=model)
        self._sleep_saved_buffers = self._sleep_saved_parameters = {}
        self._sleep_saved_draft_buffers = {}
        self._sleep_mode_backend = SimpleNamespace(suspend=self.lose, resume=lambda tags: None)

    def lose(self, level: int) -> None:
        for tensor in [*self.model_runner.model.buffers(), *self.model_runner.model.parameters()]:
            tensor.data.fill_(GARBAGE)
        self.model_runner.model.attn.impl.counters.fill_(GARBAGE)

    def get_draft_model(self) -> None:
        return None

    def synchronize_device(self) -> None:
        pass


@pytest.fixture
def sleeper(distributed, monkeypatch) -> Sleeper:
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda *_: (1 << 30, 1 << 31))
    vllm_config = make_config(record_skip_ratio=True)
    return Sleeper(make_attention(Qwen3Attention, vllm_config), vllm_config)


def test_counters_are_as_before(sleeper):
    attention = sleeper.model_runner.model
    impl = attention.attn.impl
    impl.counters += torch.arange(impl.counters.numel()).view_as(impl.counters)
    known, before = impl.counters, impl.counters.clone()
    sleeper.sleep(level=2)
    assert (impl.counters == GARBAGE).all()
    sleeper.wake_up(["weights"])
    assert impl.counters is known and impl.counters.equal(before)
    assert not [name for name in attention.state_dict() if "counters" in name]


def test_reloading_leaves_them_where_they_are(sleeper):
    """Graphs hold their address."""
    attention = sleeper.model_runner.model
    impl = attention.attn.impl
    layerwise.record_metadata_for_reloading(attention)
    impl.counters += 3
    known = impl.counters
    layerwise.initialize_layerwise_reload(attention)
    with set_current_vllm_config(sleeper.vllm_config):
        layerwise.finalize_layerwise_reload(attention, sleeper.model_config)
    assert attention.attn.ffa_counters is impl.counters is known
    assert (impl.counters == 3).all()

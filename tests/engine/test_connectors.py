"""KV connectors: pages that leave an engine come back as they were; what would not is refused."""

from types import SimpleNamespace

import pytest
from agreement import check_same_answer
from jobs import CPU, FINE_LOGITS, GPU
from processes import HERE, MODEL, run_script
from prompts import source_prompt
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.platforms import current_platform

from vllm_ffa_fp8fp8.integration.connectors import connector_problem

PLANES = {"key", "key_residual", "key_exponent", "value", "value_exponent"}
PROMPT_LENGTH = 1100
OFFLOADING = {"cpu_bytes_to_use": 64 << 20}
HOST_COPIES = {"spec_name": "HostCopySpec", "spec_module_path": "host_copies"}


def round_trip(connector: str, extra: dict, settings: dict, **options) -> dict:
    """The result of `round_trip.py` for a page of all planes."""
    transfer = {"kv_connector": connector, "kv_role": "kv_both", "kv_connector_extra_config": extra}
    llm = {
        "model": str(MODEL),
        "seed": 0,
        "attention_backend": "FFA_FP8FP8",
        "additional_config": {"ffa_fp8fp8": {"preset": "exact", "v_cache_dtype": "fp8"} | options},
        "kv_transfer_config": transfer,
    }
    prompts = {"prompt": source_prompt(PROMPT_LENGTH), "other": source_prompt(300, start=20_000)}
    return run_script(HERE / "round_trip.py", {"llm": llm | settings} | prompts)[0]


def check_round_trip(result: dict) -> None:
    """The same bytes in all planes of all whole pages, and, as when the engine's own prefix cache
    has them, the same tokens with the same logprobs."""
    sent, received = result["pages"]
    assert len(sent) == 4 and sent == received
    assert set(result["planes"]) == PLANES and all(result["planes"].values())
    cold, cached, carried = result["answers"]
    assert cold["num_cached_tokens"] == 0
    assert carried["num_cached_tokens"] == cached["num_cached_tokens"] > 0.9 * PROMPT_LENGTH
    assert (carried["tokens"], carried["best"]) == (cached["tokens"], cached["best"])
    check_same_answer(carried, cold)


def on_cpu(test):
    test = pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")(test)
    return pytest.mark.slow(test)


@on_cpu
def test_shared_storage(tmp_path):
    """Layers that run fused tell the connector, too, when they have written."""
    result = round_trip(
        "ExampleConnector", {"shared_storage_path": str(tmp_path)}, CPU | FINE_LOGITS
    )
    check_round_trip(result)
    assert result["fused"]
    assert list(tmp_path.rglob("*.safetensors"))


@on_cpu
def test_offloading():
    """All of it but the copies themselves, for which vLLM needs a GPU."""
    result = round_trip(
        "OffloadingConnector", OFFLOADING | HOST_COPIES, CPU | FINE_LOGITS, fused_kproj="off"
    )
    check_round_trip(result)
    assert not result["fused"]


@pytest.mark.gpu
@pytest.mark.parametrize("connector", ["OffloadingConnector", "SimpleCPUOffloadConnector"])
def test_offloading_from_a_gpu(connector):
    """Compiled, in CUDA graphs."""
    check_round_trip(round_trip(connector, OFFLOADING, GPU))


class SchedulesOtherwise(OffloadingConnector):
    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        return 0, False


class MovesOtherwise(OffloadingConnector):
    def register_kv_caches(self, kv_caches):
        raise NotImplementedError


class SaysSo(MovesOtherwise):
    moves_whole_blocks = True


class NeedsRowsOfTokens(ExampleConnector):
    @classmethod
    def get_required_kvcache_layout(cls, vllm_config):
        return "LBNHC"


def problem(connector: str, **extra):
    config = KVTransferConfig(
        kv_connector=connector,
        kv_role="kv_both",
        kv_connector_extra_config=extra,
        kv_connector_module_path=__name__ if connector in globals() else None,
    )
    return connector_problem(
        SimpleNamespace(
            kv_transfer_config=config,
            model_config=SimpleNamespace(use_mla=False),
            attention_config=SimpleNamespace(hisparse_config=None),
        )
    )


@pytest.mark.parametrize(
    "connector",
    [
        "OffloadingConnector",
        "SimpleCPUOffloadConnector",
        "ExampleConnector",
        "SchedulesOtherwise",
        "SaysSo",
    ],
)
def test_what_copies_whole_blocks_runs(connector):
    assert problem(connector) is None


def test_no_connector_is_no_problem():
    assert connector_problem(SimpleNamespace(kv_transfer_config=None)) is None
    idle = KVTransferConfig()
    assert connector_problem(SimpleNamespace(kv_transfer_config=idle)) is None


@pytest.mark.parametrize(
    ("connector", "extra", "assumption"),
    [
        ("LMCacheConnectorV1", {}, "keys and values of head_size elements"),
        ("DecodeBenchConnector", {}, "random elements"),
        ("NixlConnector", {}, "cuts blocks by heads and tokens"),
        ("MovesOtherwise", {}, "`moves_whole_blocks = True` in its class"),
        ("NeedsRowsOfTokens", {}, "needs the cache layout LBNHC"),
        ("OffloadingConnector", {"spec_name": "TieringOffloadingSpec"}, "TieringOffloadingSpec"),
    ],
)
def test_what_takes_blocks_for_something_else_is_refused(connector, extra, assumption):
    found = problem(connector, **extra)
    assert found.what == f"the KV connector {connector}"
    assert assumption in found.advice and "--kv-offloading-size" in found.advice


def test_several_connectors_are_as_good_as_each():
    storage = {"kv_connector": "ExampleConnector"}
    assert problem("MultiConnector", connectors=[storage]) is None
    found = problem("MultiConnector", connectors=[storage, {"kv_connector": "NixlConnector"}])
    assert found.what == "the KV connector NixlConnector"

"""Which of vLLM's KV connectors carry the pages of FFA_FP8FP8 unchanged.

The bytes of a (block, KV head) are planes, one after the other: no byte of the last dimension of
the cache `[num_blocks, num_kv_heads, page_size, bytes]` belongs to the token that its place names.
So what copies whole blocks byte by byte is right, and what takes them for keys and values of the
model's dtype, for rows of tokens, or for parts that another engine cuts otherwise, is wrong.
"""

from typing import Any, NamedTuple

from vllm_ffa_fp8fp8.registry import BACKEND_NAME

MOVES_WHOLE_BLOCKS = "moves_whole_blocks"
"""Attribute by which the class of a connector, or of a storage (`spec_name`), says that it copies
whole blocks as bytes, for engines with the same options, or not."""

LAYOUTS = ("LBHNC", "BLHNC", "HND")
"""vLLM's KV cache layouts in which a (block, KV head) is one run of bytes, and an old name."""

_V1 = "vllm.distributed.kv_transfer.kv_connector.v1."

WHOLE_BLOCKS = (
    _V1 + "offloading_connector.OffloadingConnector",
    _V1 + "simple_cpu_offload_connector.SimpleCPUOffloadConnector",
    _V1 + "example_connector.ExampleConnector",  # slots of whole blocks, of all heads
)

HOST_MEMORY = "vllm.v1.kv_offload.cpu.spec.CPUOffloadingSpec"

_ENGINES = "it cuts blocks by heads and tokens for an engine that cuts them otherwise"
_KEYS_AND_VALUES = "it takes blocks for keys and values of head_size elements of the model's dtype"
OTHER_ASSUMPTIONS = {
    "lmcache_connector": _KEYS_AND_VALUES,
    "lmcache_mp_connector": _KEYS_AND_VALUES,
    "flexkv_connector": _KEYS_AND_VALUES,
    "decode_bench_connector": "it fills blocks with random elements",
    "nixl": _ENGINES,
    "mooncake.mooncake_connector": _ENGINES,
    "moriio": _ENGINES,
}
"""What connectors assume of a block that is not so for ours, by their modules."""

# How blocks get in and out: whoever has another of these has other assumptions.
_MOVING = ("register_kv_caches", "start_load_kv", "save_kv_layer")


class Problem(NamedTuple):
    """What is not supported, and what to do."""

    what: str
    advice: str


def connector_problem(vllm_config: Any) -> Problem | None:
    """Why the KV connector of `vllm_config` would not give back the pages that it got, or None."""
    config = vllm_config.kv_transfer_config
    if config is None or not config.is_kv_transfer_instance:
        return None
    return _problem(config, vllm_config)


def _problem(config: Any, vllm_config: Any) -> Problem | None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if config.kv_connector == "MultiConnector":
        problems = [_problem(part, vllm_config) for part in _parts(config)]
        return next(filter(None, problems), None)
    connector = KVConnectorFactory.get_connector_class(config)
    assumption = (
        _layout_assumption(connector, vllm_config)
        or _block_assumption(connector)
        or _storage_assumption(config)
    )
    if assumption is None:
        return None
    return Problem(
        f"the KV connector {config.kv_connector}",
        f"{assumption}, and a block of {BACKEND_NAME} is planes of bytes that only make sense "
        f"together; use OffloadingConnector (--kv-offloading-size), SimpleCPUOffloadConnector or "
        f"ExampleConnector, or choose another --attention-backend",
    )


def _parts(config: Any) -> list[Any]:
    from vllm.config import KVTransferConfig

    parts = config.kv_connector_extra_config.get("connectors", [])
    return [KVTransferConfig(**{"kv_role": config.kv_role} | part) for part in parts]


def _layout_assumption(connector: type, vllm_config: Any) -> str | None:
    layout = connector.get_required_kvcache_layout(vllm_config)
    return None if layout in (None, *LAYOUTS) else f"it needs the cache layout {layout}"


def _block_assumption(connector: type) -> str | None:
    """What the class takes a block for, None where that is bytes to be copied as they are."""
    says = getattr(connector, MOVES_WHOLE_BLOCKS, None)
    known = next((base for base in connector.__mro__ if _path(base) in WHOLE_BLOCKS), None)
    if says is None and known is not None:
        says = all(getattr(connector, name) is getattr(known, name) for name in _MOVING)
    if says:
        return None
    for module, assumption in OTHER_ASSUMPTIONS.items():
        if any(base.__module__.startswith(_V1 + module) for base in connector.__mro__):
            return assumption
    return f"nothing says that it copies whole blocks (`{MOVES_WHOLE_BLOCKS} = True` in its class)"


def _storage_assumption(config: Any) -> str | None:
    """What a storage other than the host's memory takes a block for."""
    if config.kv_connector != "OffloadingConnector":
        return None
    from vllm.v1.kv_offload.factory import OffloadingSpecFactory

    spec = OffloadingSpecFactory.get_spec_cls(config.kv_connector_extra_config)
    says = getattr(spec, MOVES_WHOLE_BLOCKS, None)
    if says or says is None and _path(spec) == HOST_MEMORY:
        return None
    return f"{spec.__name__} names what it stores by the model, not by the format of its blocks"


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"

"""Every refusal says what is not supported, and what to do about it."""

from types import SimpleNamespace

import pytest
import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionBackend, AttentionType
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from vllm_ffa_fp8fp8.attention.backend import FFAFP8FP8Backend
from vllm_ffa_fp8fp8.attention.impl import FFAFP8FP8Impl
from vllm_ffa_fp8fp8.attention.metadata import FFAFP8FP8MetadataBuilder
from vllm_ffa_fp8fp8.config import FFAConfig
from vllm_ffa_fp8fp8.integration import refusals

PLAIN_LAYER = dict(
    head_size=128,
    dtype=torch.bfloat16,
    kv_cache_dtype="auto",
    block_size=None,
    use_mla=False,
    has_sink=False,
    use_sparse=False,
    use_mm_prefix=False,
    use_per_head_quant_scales=False,
    device_capability=DeviceCapability(9, 0),
    attn_type=AttentionType.DECODER,
)

OTHER_KIND = (
    "name it .*--attention-backend, which leaves .* to vLLM's choice, or .*backend_per_kind"
)

REFUSED_LAYERS = [
    ({"head_size": 192}, "head_size 192", "64, 80, 96, 128, 256"),
    ({"dtype": torch.float32}, "dtype float32", "set --dtype to bfloat16 or float16"),
    ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype 'fp8'", "set --kv-cache-dtype to the model's"),
    ({"kv_cache_dtype": "nvfp4"}, "kv_cache_dtype 'nvfp4'", "its own FP8 cache format"),
    (
        {"kv_cache_dtype": "float16"},
        "kv_cache_dtype float16 of a bfloat16 model",
        "at auto, or set",
    ),
    (
        {"kv_cache_dtype": "bfloat16", "dtype": torch.float16},
        "kv_cache_dtype bfloat16 of a float16 model",
        "set --dtype to bfloat16",
    ),
    ({"block_size": 24}, "block_size 24", "--block-size to a multiple of 16"),
    ({"device_capability": DeviceCapability(7, 5)}, "compute capability 7.5", "8.0 or newer"),
    ({"attn_type": AttentionType.ENCODER}, "support encoder attention", "FLASH_ATTN"),
    ({"attn_type": AttentionType.ENCODER_ONLY}, "encoder-only attention", "FLASH_ATTN"),
    ({"attn_type": "encoder_decoder"}, "cross attention", "FLASH_ATTN"),
    ({"attn_type": "tree"}, "attention type 'tree'", "FLASH_ATTN"),
    ({"use_mla": True}, "MLA", "FLASH_ATTN"),
    (
        {"has_sink": True, "device_capability": DeviceCapability(8, 9)},
        "attention with sinks before compute capability 9.0",
        "FLASH_ATTN",
    ),
    ({"use_sparse": True}, "sparse attention", "FLASH_ATTN"),
    ({"use_mm_prefix": True}, "mm_prefix", "--language-model-only"),
    ({"use_per_head_quant_scales": True}, "per-head KV cache scales", "checkpoint without them"),
    (
        {"has_sliding_window": True},
        "sliding window attention",
        "leaves layers of other kinds to vLLM",
    ),
    ({"use_rswa": True}, "R-SWA", "FLASH_ATTN"),
    ({"use_non_causal": True}, "non-causal attention", "FLASH_ATTN"),
    (
        {"use_batch_invariant": True, "device_capability": None},
        "batch invariance on the CPU",
        "unset VLLM_BATCH_INVARIANT",
    ),
    ({"use_pcp": True}, "PCP", "leave --prefill-context-parallel-size at 1"),
    ({"use_dcp": True}, "DCP", "leave --decode-context-parallel-size at 1"),
    ({"use_adaptive_verification": True}, "adaptive verification", "--speculative-config"),
    ({"use_something_new": True}, "use_something_new", "FLASH_ATTN"),
]

REFUSED_IMPL_ARGUMENTS = [
    ({"alibi_slopes": [0.5]}, "ALiBi", "FLASH_ATTN"),
    ({"sliding_window": 4096}, r"sliding window attention \(4096 tokens\)", OTHER_KIND),
    ({"attn_type": AttentionType.ENCODER_DECODER}, "cross attention", "FLASH_ATTN"),
    ({"kv_sharing_target_layer_name": "model.layers.3"}, "model.layers.3", "FLASH_ATTN"),
    ({"num_kv_heads": 3}, "8 query heads over 3 KV heads", "1 to 16 query heads"),
    ({"num_heads": 34}, "34 query heads over 2 KV heads", "1 to 16 query heads"),
    ({"num_heads": 2, "num_kv_heads": 4}, "2 query heads over 4 KV heads", "1 to 16 query heads"),
    ({"chunk_lookback": 1}, "chunk_lookback=1", "FLASH_ATTN"),
    (
        {"layer_idx": 0, "dual_chunk_attention_config": {"chunk_size": 8192}},
        "dual chunk attention",
        "FLASH_ATTN",
    ),
]

PLAIN_SPEC = dict(block_size=16, num_kv_heads=2, head_size=128, dtype=torch.bfloat16)

REFUSED_SPECS = [
    (FullAttentionSpec(**PLAIN_SPEC, head_size_v=64), "head_size_v 64 beside head_size 128"),
    (FullAttentionSpec(**PLAIN_SPEC, sliding_window=512), r"sliding window attention \(512"),
    (SlidingWindowSpec(**PLAIN_SPEC, sliding_window=512), r"sliding window attention \(512"),
    (FullAttentionSpec(**PLAIN_SPEC, attention_chunk_size=64), r"chunked local attention \(64"),
    (
        ChunkedLocalAttentionSpec(**PLAIN_SPEC, attention_chunk_size=64),
        r"chunked local attention \(64",
    ),
    (FullAttentionSpec(**PLAIN_SPEC, non_causal=True), "non-causal attention"),
    (MLAAttentionSpec(**PLAIN_SPEC), "MLAAttentionSpec"),
]


@pytest.mark.parametrize("changes, what, advice", REFUSED_LAYERS)
def test_refused_layer(changes, what, advice):
    (reason,) = refusals.refusal_reasons(**PLAIN_LAYER | changes)
    assert reason.startswith("FFA_FP8FP8 does not support ")
    assert what in reason and advice in reason


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "the model's", None])
def test_supported_layer(head_size, dtype, kv_cache_dtype):
    if kv_cache_dtype == "the model's":
        kv_cache_dtype = str(dtype).removeprefix("torch.")
    layer = PLAIN_LAYER | dict(head_size=head_size, dtype=dtype, kv_cache_dtype=kv_cache_dtype)
    assert refusals.refusal_reasons(**layer) == []


def test_supported_devices_and_pages():
    for changes in (
        {"device_capability": None},
        {"device_capability": DeviceCapability(8, 0)},
        {"device_capability": DeviceCapability(12, 0)},
        {"block_size": 16},
        {"block_size": 48},
        {"use_batch_invariant": True},
        {"has_sink": True},
        {"has_sink": True, "device_capability": None},
    ):
        assert refusals.refusal_reasons(**PLAIN_LAYER | changes) == []


def test_every_reason_is_given():
    reasons = refusals.refusal_reasons(**PLAIN_LAYER | {"head_size": 72, "use_mla": True})
    assert len(reasons) == 2


def test_every_flag_of_vllm_is_known():
    import inspect

    flags = set(inspect.signature(AttentionBackend.validate_configuration).parameters) - set(
        inspect.signature(refusals.refusal_reasons).parameters
    )
    assert flags == set(refusals.UNSUPPORTED_FLAGS)


@pytest.mark.parametrize("changes, what, advice", REFUSED_IMPL_ARGUMENTS)
def test_refused_impl_argument(changes, what, advice):
    with pytest.raises(ValueError, match=f"FFA_FP8FP8 does not support .*{what}.*{advice}"):
        refusals.check_impl_arguments(**{"num_heads": 8, "num_kv_heads": 2} | changes)


@pytest.mark.parametrize("num_heads, num_kv_heads", [(8, None), (7, 1), (32, 2), (24, 8), (1, 1)])
def test_supported_impl_arguments(num_heads, num_kv_heads):
    refusals.check_impl_arguments(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        attn_type=AttentionType.DECODER,
        sinks=torch.zeros(num_heads),
        use_alibi_sqrt=False,
    )


@pytest.mark.parametrize("spec, what", REFUSED_SPECS)
def test_refused_cache_spec(spec, what):
    advice = OTHER_KIND if "(" in what else "FLASH_ATTN"
    with pytest.raises(ValueError, match=f"FFA_FP8FP8 does not support .*{what}.*{advice}"):
        refusals.check_kv_cache_spec(spec)


def test_supported_cache_spec():
    refusals.check_kv_cache_spec(FullAttentionSpec(**PLAIN_SPEC))


def platform(name):
    kinds = {f"is_{kind}": kind == name for kind in ("cuda", "cpu", "rocm", "xpu", "tpu")}
    methods = {method: lambda answer=answer: answer for method, answer in kinds.items()}
    return SimpleNamespace(device_name=name, **methods)


@pytest.mark.parametrize(
    "name, said", [("rocm", "ROCm"), ("xpu", "XPU"), ("tpu", "TPU"), ("npu", "npu")]
)
def test_refused_platform(name, said):
    with pytest.raises(ValueError, match=f"FFA_FP8FP8 does not support the platform {said}: .*CPU"):
        refusals.check_platform(platform(name))


def test_fp8_values_need_a_device_with_fp8():
    with pytest.raises(ValueError, match="support v_cache_dtype fp8 on a GPU without.* at auto"):
        refusals.check_options(FFAConfig(v_cache_dtype="fp8"), has_fp8=False)
    refusals.check_options(FFAConfig(v_cache_dtype="fp8"), has_fp8=True)
    refusals.check_options(FFAConfig(), has_fp8=False)


OURS = "FFA_FP8FP8"


def engine(
    method=None, drafts=None, model=OURS, v2=False, per_kind=None, parallel=False, dbo=False
):
    """A configuration with the backends of those names, of the model and of its drafts."""
    backend = {name: name and SimpleNamespace(name=name) for name in (drafts, model, per_kind)}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(use_ubatching=dbo),
        attention_config=SimpleNamespace(
            backend=backend[model],
            backend_per_kind={"full_attention": backend[per_kind]} if per_kind else {},
        ),
        speculative_config=method
        and SimpleNamespace(
            method=method, attention_backend=backend[drafts], parallel_drafting=parallel
        ),
        use_v2_model_runner=v2,
        kv_transfer_config=None,
    )


def test_refused_microbatches():
    with pytest.raises(ValueError, match=r"support microbatches .*drop --enable-dbo"):
        refusals.check_engine(engine(dbo=True))


@pytest.mark.parametrize(
    "given",
    [
        dict(drafts=OURS),
        dict(per_kind=OURS, model=None),
        # V2 gives the drafts the model's backend, whatever is named for them
        dict(v2=True),
        dict(v2=True, drafts="FLASH_ATTN"),
        dict(v2=True, drafts="FLASH_ATTN", model=None, per_kind=OURS),
    ],
)
def test_refused_draft_models(given):
    advice = "draft with ngram, eagle or mtp, .*FLASH_ATTN.*VLLM_USE_V2_MODEL_RUNNER=0"
    with pytest.raises(ValueError, match=f"of a separate model.*draft_model.*{advice}"):
        refusals.check_engine(engine("draft_model", **given))


@pytest.mark.parametrize("given", [dict(drafts=OURS), dict(per_kind=OURS)])
def test_refused_parallel_drafts(given):
    advice = 'drop "parallel_drafting".*another "attention_backend"'
    with pytest.raises(ValueError, match=f"support parallel drafting.*: {advice}"):
        refusals.check_engine(engine("eagle3", parallel=True, **given))


@pytest.mark.parametrize(
    "given",
    [
        dict(),
        dict(method="ngram"),
        dict(method="ngram", v2=True),
        dict(method="eagle3", drafts=OURS),
        dict(method="eagle3", v2=True),
        dict(method="draft_model"),
        dict(method="draft_model", drafts="FLASH_ATTN"),
        dict(method="draft_model", v2=True, model="FLASH_ATTN"),
        dict(method="eagle3", parallel=True),
        dict(method="eagle3", parallel=True, drafts="FLASH_ATTN"),
        dict(method="dspark", parallel=True, drafts=OURS, v2=True),
    ],
)
def test_supported_engines(given):
    refusals.check_engine(engine(**given))


def test_batch_invariance_without_drafts_only():
    with pytest.raises(ValueError, match="speculative decoding with batch inv.*drop --specul"):
        refusals.check_batch_invariance(has_drafts=True)
    refusals.check_batch_invariance(has_drafts=False)


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_supported_platform(name):
    refusals.check_platform(platform(name))


def test_layers_and_caches_are_checked():
    """vLLM asks our classes, and they ask the functions above."""
    with pytest.raises(ValueError, match="ALiBi"):
        FFAFP8FP8Impl(8, 128, 1.0, num_kv_heads=2, alibi_slopes=[0.5])
    spec, _ = REFUSED_SPECS[1]
    with pytest.raises(ValueError, match="sliding window"):
        FFAFP8FP8Backend.customize_spec(spec)
    config = SimpleNamespace(parallel_config=None)
    with pytest.raises(ValueError, match="sliding window"):
        FFAFP8FP8MetadataBuilder(spec, ["layers.0"], config, torch.device("cpu"))
    (reason,) = FFAFP8FP8Backend.validate_configuration(**PLAIN_LAYER | {"head_size": 192})
    assert "head_size 192" in reason

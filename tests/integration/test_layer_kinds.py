"""Which backend a layer gets where FFA_FP8FP8 is named, by its kind; and what is said of it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_ffa_fp8fp8.integration import layer_kinds

MODEL = str(Path(__file__).parents[1] / "assets" / "recall-9m")
OURS = "FFA_FP8FP8"
pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU platform")


def engine_config(**arguments):
    return EngineArgs(model=MODEL, **arguments).create_engine_config()


def backends(vllm_config, *layers: tuple[type, dict]) -> list[str]:
    """Those of layers that are made for this configuration."""
    names = []
    with set_current_vllm_config(vllm_config):
        torch.set_default_dtype(torch.bfloat16)
        try:
            for number, (layer_class, arguments) in enumerate(layers):
                layer = layer_class(
                    8, 128, 1.0, num_kv_heads=2, cache_config=vllm_config.cache_config,
                    prefix=f"model.layers.{number}.attn", **arguments,
                )  # fmt: skip
                names.append(layer.get_attn_backend().get_name())
        finally:
            torch.set_default_dtype(torch.float32)
    return names


FULL = (Attention, {})
WINDOW = (Attention, {"per_layer_sliding_window": 256})
CHUNKS = (ChunkedLocalAttention, {"attention_chunk_size": 256})
SINKS = (Attention, {"sinks": torch.zeros(8)})
ALL_KINDS = (WINDOW, FULL, CHUNKS, FULL)


@pytest.mark.parametrize(
    "choice",
    [
        {"attention_backend": OURS},
        {"attention_config": {"backend_per_kind": {"full_attention": OURS}}},
        {
            "attention_config": {
                "backend": OURS,
                "backend_per_kind": {"sliding_window": "CPU_ATTN", "full_attention": OURS},
            }
        },
    ],
    ids=str,
)
def test_full_attention_alone_is_ours(choice):
    vllm_config = engine_config(**choice)
    given = (
        vllm_config.attention_config.backend,
        dict(vllm_config.attention_config.backend_per_kind),
    )
    assert backends(vllm_config, *ALL_KINDS) == ["CPU_ATTN", OURS, "CPU_ATTN", OURS]
    attention = vllm_config.attention_config
    assert (attention.backend, attention.backend_per_kind) == given


def test_what_others_named_stays():
    """Which backend vLLM is asked for, for each kind."""
    vllm_config, asked = engine_config(attention_backend=OURS), []
    attention = vllm_config.attention_config
    attention.backend_per_kind = {"sliding_window": AttentionBackendEnum.TRITON_ATTN}

    def get_attn_backend(**kwargs):
        asked.append((attention.backend, dict(attention.backend_per_kind)))

    with set_current_vllm_config(vllm_config):
        for has_chunks in (False, True):
            layer_kinds._by_kind(get_attn_backend, has_chunks)(has_sliding_window=not has_chunks)
    assert asked == [(None, {"sliding_window": AttentionBackendEnum.TRITON_ATTN})] * 2


def test_not_chosen_changes_nothing():
    assert backends(engine_config(), *ALL_KINDS) == ["CPU_ATTN"] * 4


def test_windows_that_are_asked_of_it_are_refused_with_a_way_out():
    per_kind = {"sliding_window": OURS}
    vllm_config = engine_config(attention_config={"backend_per_kind": per_kind})
    with pytest.raises(ValueError, match="sliding window attention: name it with --attention-back"):
        backends(vllm_config, WINDOW)
    assert backends(engine_config(attention_backend=OURS), WINDOW) == ["CPU_ATTN"]  # the way out


def test_sinks_change_no_choice():
    vllm_config = engine_config(attention_backend=OURS)
    sinks_of_windows = (Attention, SINKS[1] | WINDOW[1])
    assert backends(vllm_config, sinks_of_windows, SINKS) == ["CPU_ATTN", OURS]


def test_a_model_without_full_attention():
    layer_kinds.check_full_attention(["sliding_window", "full_attention"])
    for kinds, advice in (
        (["sliding_window"], "has sliding_window.*--disable-sliding-window"),
        (["mamba"], r"has mamba\): remove --attention-backend$"),
        ([], "has no attention"),
    ):
        with pytest.raises(ValueError, match=f"a model without full attention .*{advice}"):
            layer_kinds.check_full_attention(kinds)


def made(vllm_config, *layers):
    backends(vllm_config, *layers)
    return vllm_config


def said(monkeypatch, vllm_config):
    lines = []
    logger = SimpleNamespace(info_once=lambda text, *values: lines.append(text % values))
    monkeypatch.setattr("vllm.logger.init_logger", lambda name: logger)
    type(current_platform).update_block_size_for_backend(vllm_config)
    return lines


def test_what_runs_is_said_once_all_layers_are_made(monkeypatch):
    vllm_config = made(engine_config(attention_backend=OURS), *ALL_KINDS)
    (line,) = said(monkeypatch, vllm_config)
    page = (4 * 128 + 1) * 2 * 128
    assert line.startswith(
        "FFA_FP8FP8 runs full_attention (2 layers); vLLM's choice for the others: sliding_window "
        f"(1 layer) CPU_ATTN, chunked_local_attention (1 layer) CPU_ATTN. Pages have {page:,} "
        "bytes, filled to 99.8% by sliding_window, 100.0% by full_attention"
    )


def test_smaller_pages_than_other_kinds_have_gain_nothing(monkeypatch):
    """The cache manager pads them, which is said."""
    options = {"ffa_fp8fp8": {"v_cache_dtype": "fp8"}}
    vllm_config = engine_config(attention_backend=OURS, additional_config=options)
    (line,) = said(monkeypatch, made(vllm_config, WINDOW, FULL))
    assert line.endswith("filled to 100.0% by sliding_window, 75.4% by full_attention.")


def test_nothing_is_said_of_one_kind_or_of_other_backends(monkeypatch):
    assert not said(monkeypatch, made(engine_config(attention_backend=OURS), FULL, FULL))
    assert not said(monkeypatch, made(engine_config(), *ALL_KINDS))


def test_windows_alone_are_refused_once_all_layers_are_made(monkeypatch):
    vllm_config = made(engine_config(attention_backend=OURS), WINDOW, WINDOW)
    with pytest.raises(ValueError, match="without full attention .*has sliding_window"):
        said(monkeypatch, vllm_config)
    vllm_config.parallel_config.pipeline_parallel_size = 2  # another stage may have some
    assert not said(monkeypatch, vllm_config)


def test_a_disabled_window_is_full_attention(tmp_path):
    """The way out of the refusal above."""
    from transformers import MistralConfig

    shape = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    MistralConfig(**shape, num_hidden_layers=2, sliding_window=256).save_pretrained(tmp_path)
    vllm_config = EngineArgs(
        model=str(tmp_path),
        tokenizer=MODEL,
        dtype="bfloat16",
        disable_sliding_window=True,
        attention_backend=OURS,
    ).create_engine_config()
    assert vllm_config.model_config.max_model_len == 256
    assert backends(vllm_config, FULL) == [OURS]

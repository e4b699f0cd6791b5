"""What would run each kind of a model's layers, and what is refused before workers start."""

import logging

import pytest
import transformers
import vllm.logger
from vllm.engine.arg_utils import EngineArgs

from vllm_ffa_fp8fp8.integration.model_layers import layers_of_model

HOPPER = {"kv_cache_dtype": "auto", "block_size": None, "device_capability": (9, 0)}


@pytest.fixture
def make_model(tmp_path):
    """The folder of a configuration. Its architecture is one that other tests import anyway: what
    is told from configurations does not depend on it."""

    def make(config_name: str, **changes) -> str:
        config = getattr(transformers, f"{config_name}Config")(**changes)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(tmp_path)
        return str(tmp_path)

    return make


def engine_arguments(model: str, **more) -> EngineArgs:
    return EngineArgs(model=model, skip_tokenizer_init=True, dtype="bfloat16", **more)


def layers(model: str, **more) -> dict[str, tuple[int, int | None, tuple[str, ...]]]:
    found = layers_of_model(engine_arguments(model, **more).create_model_config(), **HOPPER)
    return {of_kind.kind: (len(of_kind.layers), of_kind.size, of_kind.reasons) for of_kind in found}


@pytest.mark.parametrize(
    "config, expected",
    [
        ("Llama", {"full_attention": (32, None)}),
        ("Qwen2", {"full_attention": (32, None)}),
        ("Gemma3Text", {"full_attention": (4, None), "sliding_window": (22, 4096)}),
        ("Qwen3Next", {"full_attention": (12, None), "linear_attention": (36, None)}),
        ("Llama4Text", {"full_attention": (12, None), "chunked_local_attention": (36, 8192)}),
        ("Mistral", {"sliding_window": (32, 4096)}),
    ],
)
def test_kinds_of_layers(make_model, config, expected):
    assert layers(make_model(config)) == {kind: (*n, ()) for kind, n in expected.items()}


def test_windows_of_layers_that_nobody_names_refuse_nothing(make_model):
    """Which layers have them the model's code knows."""
    model = make_model("Llama", sliding_window=512)
    assert layers(model) == {"full_attention": (32, None, ())}


def test_windows_that_are_disabled_are_full_attention(make_model):
    found = layers(make_model("Mistral"), disable_sliding_window=True)
    assert found == {"full_attention": (32, None, ())}


@pytest.mark.parametrize(
    "config, changes, says",
    [
        ("Llama", {"head_dim": 192}, "head_size 192: it takes 64, 80, 96, 128, 256"),
        ("Llama", {"num_attention_heads": 64, "num_key_value_heads": 2}, "64 query heads over 2"),
        ("DeepseekV3", {}, "MLA"),
        ("Gemma3Text", {"head_dim": 512}, "head_size 512"),
        ("Mistral", {}, "a model without full attention"),
    ],
)
def test_models_are_refused_before_workers_start(make_model, config, changes, says):
    model = make_model(config, **changes)
    ours = engine_arguments(model, attention_backend="FFA_FP8FP8")
    with pytest.raises(ValueError, match=f"FFA_FP8FP8 does not support .*{says}"):
        ours.create_engine_config()
    engine_arguments(model).create_engine_config()


def test_heads_are_counted_by_rank(make_model):
    """Ranks that share a KV head have fewer query heads each."""
    model = make_model("Llama", num_attention_heads=64, num_key_value_heads=2)
    with pytest.raises(ValueError, match="64 query heads over 2 KV heads"):
        engine_arguments(model, attention_backend="FFA_FP8FP8").create_engine_config()
    four = engine_arguments(model, attention_backend="FFA_FP8FP8", tensor_parallel_size=4)
    four.create_engine_config()


def test_layers_beside_windows_that_run(make_model):
    model = make_model("Gemma3Text")
    engine_arguments(model, attention_backend="FFA_FP8FP8").create_engine_config()


def test_options_without_the_backend_are_told_once(make_model, caplog):
    model, options = make_model("Llama"), {"ffa_fp8fp8": {"delta": 5.0}}
    engine_arguments(model).create_engine_config()  # the first one configures vLLM's logger
    vllm.logger._print_warning_once.cache_clear()  # another test may have been told
    logging.getLogger("vllm").addHandler(caplog.handler)
    for _ in range(2):
        engine_arguments(model, additional_config=options).create_engine_config()
    engine_arguments(model, additional_config={"another": {}}).create_engine_config()
    engine_arguments(
        model, additional_config=options, attention_backend="FFA_FP8FP8"
    ).create_engine_config()
    logging.getLogger("vllm").removeHandler(caplog.handler)
    told = [record for record in caplog.records if "do nothing" in record.getMessage()]
    assert len(told) == 1 and told[0].levelname == "WARNING"
    assert "Add --attention-backend FFA_FP8FP8" in told[0].getMessage()

"""`ffa-fp8fp8 doctor MODEL`: what would run a model's layers, and what its cache takes."""

import json

import pytest
import transformers

from vllm_ffa_fp8fp8.commands import cli, doctor_model, findings
from vllm_ffa_fp8fp8.commands.doctor_model import examine_model, ranges


@pytest.fixture(autouse=True)
def usual_logs(monkeypatch):
    """Doctor quietens vLLM for its whole process, which here is that of the other tests too."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Makes the folder of a configuration, without weights and tokenizer."""
    monkeypatch.delenv("FFA_FP8FP8_CONFIG", raising=False)

    def make(config_name: str, **changes) -> str:
        config = getattr(transformers, f"{config_name}Config")(**changes)
        config.architectures = ["LlamaForCausalLM"]  # one that others import, too
        config.save_pretrained(tmp_path)
        return str(tmp_path)

    return make


def examine(folder: str, capability=(9, 0)) -> dict[str, findings.Finding]:
    return {finding.subject: finding for finding in examine_model(folder, capability)}


def test_a_model_of_full_attention(model):
    found = examine(model("Llama", num_key_value_heads=8, dtype="bfloat16"))
    assert "32 layers, bfloat16, up to 2,048 tokens" in found["model"].found
    assert found["full attention"].found == "32 layers (0-31): FFA_FP8FP8"
    assert found["cache"].found == (  # 32 layers, 8 heads of 128: 4 bytes an element, one a head
        "131,328 bytes a token in full attention; 131,072 as bf16, 65,536 as fp8"
    )
    assert "8,176 tokens a GiB" in found["cache"].advice
    assert found["pays"].found.startswith("from 1,024 tokens on where 10% of the blocks are kept.")
    assert "1 x 32,768: 2." in found["pays"].found and "H100" in found["pays"].advice
    assert {finding.status for finding in found.values()} == {findings.OK}


def test_options_in_force_count(model, monkeypatch, tmp_path):
    options = tmp_path / "mine.yaml"
    options.write_text("{v_cache_dtype: fp8, min_context: 5000}")
    folder = model("Llama", num_key_value_heads=8)
    monkeypatch.setenv("FFA_FP8FP8_CONFIG", str(options))
    found = examine(folder)
    assert found["cache"].found.startswith(f"{32 * 8 * (3 * 128 + 2):,} bytes a token")
    assert found["pays"].found.startswith("from 5,000 tokens on")
    ampere = examine(folder, (8, 0))  # keys stay 16-bit
    assert ampere["cache"].found.startswith(f"{32 * 8 * (3 * 128 + 1):,} bytes a token")


def test_one_kv_head_needs_a_smaller_tau(model, monkeypatch, tmp_path):
    folder = model("Llama", num_attention_heads=8, num_key_value_heads=1, hidden_size=1024)
    warning = examine(folder)["tau"]
    assert warning.status == findings.WARNING and warning.found.startswith("0.012, and the model")
    assert "calibrate" in warning.advice
    options = tmp_path / "mine.yaml"
    monkeypatch.setenv("FFA_FP8FP8_CONFIG", str(options))
    for text in ("tau: 0.006", "delta: 5", "tau: null"):
        options.write_text(text)
        assert "tau" not in examine(folder)


def test_a_model_that_mixes_kinds(model):
    found = examine(model("Gemma3Text", num_hidden_layers=12))
    assert found["full attention"].found == "2 layers (5, 11): FFA_FP8FP8"
    assert found["sliding window"].found == (
        "10 layers (0, 1, 2, 3, 4, 6, ..., 10) of 4,096 tokens: vLLM's choice of a backend"
    )
    assert found["cache"].found.startswith(f"{2 * 4 * (4 * 256 + 1):,} bytes")


@pytest.mark.parametrize(
    "config, changes, says, advice",
    [
        ("Llama", {"head_dim": 192}, "head_size 192", "it takes 64, 80, 96, 128, 256"),
        ("DeepseekV3", {}, "MLA", "FLASH_ATTN"),
        ("Mistral", {}, "a model without full attention", "--disable-sliding-window"),
    ],
)
def test_what_is_refused(model, config, changes, says, advice):
    refused = examine(model(config, **changes))["full attention"]
    assert refused.status == findings.MISSING
    assert says in refused.found and advice in refused.advice


def test_lengths_that_were_not_timed_are_unknown(model, monkeypatch):
    folder = model("Llama", num_attention_heads=12, num_key_value_heads=4, hidden_size=768)
    found = examine(folder)["pays"]
    assert found.status == findings.WARNING
    assert "is not known: 3 query heads a KV head, of size 64" in found.found
    monkeypatch.setattr(doctor_model.environment, "find_clone", lambda: None)
    assert "not known here" in examine(folder)["pays"].found


def test_the_command(model, tmp_path, capsys):
    assert cli.main(["doctor", str(tmp_path / "none"), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["findings"][-1]["subject"] == "model" and not answer["ready"]
    assert "the folder of a config.json" in answer["findings"][-1]["advice"]
    assert cli.main(["doctor", model("Qwen3")]) == 0
    assert "FFA_FP8FP8" in capsys.readouterr().out


@pytest.mark.parametrize(
    "numbers, text",
    [((3,), "3"), ((0, 1, 2), "0-2"), ((5, 11, 17), "5-17 by 6"), ((0, 2, 3), "0, 2, 3")],
)
def test_ranges(numbers, text):
    assert ranges(numbers) == text

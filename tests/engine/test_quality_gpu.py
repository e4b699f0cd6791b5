"""The judge of settings on a GPU: CUDA graphs, vLLM's V2 model runner, and an fp8 cache."""

import json

import pytest
from jobs import GPU
from processes import MODEL
from prompts import source_tokens, tokenizer

from vllm_ffa_fp8fp8.commands import cli

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.xdist_group("quality")]


def test_settings_are_told_apart(tmp_path):
    text, file = tmp_path / "source.py", tmp_path / "quality.json"
    text.write_text(tokenizer().decode(source_tokens()[:9000]))
    arguments = ["--text", text, "--tokens", 8000, "--last", 64, "--floor", "--json", file]
    arguments += ["--preset", "exact", "balanced", "--delta", 10, 0]
    limits = {name: GPU[name] for name in ("gpu_memory_utilization", "kv_cache_memory_bytes")}
    arguments += ["--engine-args", *(f"{name}={limit}" for name, limit in limits.items())]
    assert cli.main(["quality", "--model", str(MODEL), *map(str, arguments)]) == 0
    default, floor, fp8_cache, *ours = json.loads(file.read_text())["settings"]
    exact, balanced, careful, careless = ours
    for found in (default, floor, fp8_cache):
        assert found["backend"] == "FLASH_ATTN" and found["kept"] == 1.0
    for found in ours:
        assert found["backend"] == "FFA_FP8FP8"
        print(f"{found['name']}: kept {found['kept']:.3f}, KL {found['kl_mean']:.2e}")
    assert exact["kept"] == 1.0 > careful["kept"] > careless["kept"]
    assert careful["kept"] > balanced["kept"]
    assert max(exact["kl_mean"], floor["kl_mean"]) < 2e-3 and fp8_cache["kl_mean"] > 0
    assert careless["kl_mean"] > 10 * exact["kl_mean"]

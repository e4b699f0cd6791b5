"""What `record` takes from a real engine, beside the model's own weights; then `bench layers`."""

import json
from pathlib import Path

import pytest
import torch
from processes import MODEL
from prompts import source_tokens
from safetensors.torch import load_file
from vllm.platforms import current_platform

from vllm_ffa_fp8fp8.bench.recording.engine import record_layers
from vllm_ffa_fp8fp8.bench.recording.store import Recording
from vllm_ffa_fp8fp8.commands.cli import main
from vllm_ffa_fp8fp8.commands.demo_prompts import source_lines
from vllm_ffa_fp8fp8.commands.engine_process import run_engine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build"),
]
LENGTHS, STEPS, LAYERS = [300, 1100], 3, [0, 3]


def job(folder: Path, **changes) -> dict:
    text = "".join(source_lines()[:1000])
    return {
        "model": str(MODEL),
        "folder": str(folder / "data"),
        "prompts": [("source", text)],
        "lengths": LENGTHS,
        "layers": LAYERS,
        "steps": STEPS,
        "hidden": "all",
        "llm": {"max_num_batched_tokens": 256},  # prefills are cut
    } | changes


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Recording:
    folder = tmp_path_factory.mktemp("recording")
    told = list(run_engine(job(folder), str(folder / "log"), record_layers))
    phases = [value for kind, value in told if kind == "phase"]
    assert [(p["done"], p["of"]) for p in phases if "of" in p] == [(n, 4) for n in range(4)]
    assert told[-1][1]["layers"] == LAYERS
    return Recording.open(folder / "data")


def test_prompts_and_layers_are_those_asked_for(recording):
    assert recording.layers == LAYERS and recording.header.steps == STEPS
    assert recording.header.prompts == [list(source_tokens()[:length]) for length in LENGTHS]
    generated = json.loads((recording.folder / "recording.json").read_text())["layers"]["0"]
    assert [len(tokens) for tokens in generated["generated"]] == [STEPS] * 2


def rotated(heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Llama's rotation of `[tokens, heads, head_size]`."""
    half = heads.shape[-1] // 2
    theta = json.loads((MODEL / "config.json").read_text())["rope_parameters"]["rope_theta"]
    angles = positions[:, None].double() * theta ** (-torch.arange(half).double() / half)
    cos, sin = angles.cos()[:, None].float(), angles.sin()[:, None].float()
    first, second = heads.float().split(half, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@pytest.mark.parametrize("index", LAYERS)
def test_tensors_follow_from_the_hidden_states_at_their_positions(recording, index):
    layer, weights = recording.load(index), load_file(MODEL / "model.safetensors")
    shape = layer.shape

    def projected(hidden: torch.Tensor, name: str, heads: int) -> torch.Tensor:
        weight = weights[f"model.layers.{index}.self_attn.{name}.weight"].float()
        return (hidden.float() @ weight.T).unflatten(1, (heads, shape.head_size))

    for request, length in zip(layer.requests, LENGTHS, strict=True):
        positions = torch.arange(length + STEPS)
        assert len(request.hidden) == len(request.key) == len(positions)
        key = rotated(projected(request.hidden, "k_proj", shape.num_kv_heads), positions)
        value = projected(request.hidden, "v_proj", shape.num_kv_heads)
        newest = request.hidden[length:]
        query = rotated(projected(newest, "q_proj", shape.num_heads), positions[length:])
        found = (request.key, request.value, request.query)
        for tensor, expected in zip(found, (key, value, query), strict=True):
            error = (tensor.float() - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
            assert error.max() < 1e-2
    assert shape.scale == pytest.approx(shape.head_size**-0.5)


def test_layer_0_sees_the_tokens(recording):
    """Its hidden states are the normalised embeddings of the prompt's tokens."""
    weights = load_file(MODEL / "model.safetensors")
    request = recording.load(0).requests[0]
    tokens = torch.tensor(recording.header.prompts[0])
    rows = weights["model.embed_tokens.weight"].float()[tokens]
    rows = rows * (rows.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    expected = rows * weights["model.layers.0.input_layernorm.weight"].float()
    assert (request.hidden[: len(tokens)].float() - expected).norm() < 1e-2 * expected.norm()


def test_bench_layers_reads_it(recording, tmp_path, capsys):
    arguments = ("--setting", "delta=2", "exact", "--folder", str(tmp_path))
    assert main(["bench", "layers", "--data", str(recording.folder), *arguments]) == 0
    assert "Nothing is timed" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    figures = json.loads(path.read_text())["figures"]
    assert {(f["layer"], f["length"]) for f in figures} == {(n, k) for n in LAYERS for k in LENGTHS}
    by_name = {(f["layer"], f["length"], f["series"], f["setting"]): f for f in figures}
    for index in LAYERS:
        pruned = by_name[index, 1100, "ours", "delta=2"]
        exact = by_name[index, 1100, "ours", "exact"]
        assert pruned["kept"] < 0.9 and by_name[index, 300, "ours", "delta=2"]["kept"] == 1
        assert exact["error"] < 4e-3 < by_name[index, 1100, "fa3-fp8", ""]["error"] < 2e-1
        assert exact["error"] < pruned["error"] < 0.5

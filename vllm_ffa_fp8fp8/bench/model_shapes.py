"""Shapes of models to time with dummy weights."""

import json
from pathlib import Path
from typing import Any

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
}
MODELS = {
    "llama-3.1-8b": LLAMA
    | {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14_336,
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
    },
    "tiny": LLAMA
    | {
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 512,
        "vocab_size": 2048,
        "max_position_embeddings": 8192,
    },
}

PROJECTIONS = {"8b": (4096, 32, 8), "70b": (8192, 64, 8)}
"""Llama's QKV projections: hidden size, query heads, KV heads; heads of 128."""


def write_model(name: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """Writes a `config.json`, with `changes` to it, and returns what it says."""
    config = MODELS[name] | changes
    Path(folder, "config.json").write_text(json.dumps(config, indent=2))
    return config

"""Small models of other architectures with random weights, made on the spot."""

from pathlib import Path
from typing import Any

import torch
from processes import MODEL
from prompts import tokenizer

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 32_768,
    "initializer_range": 0.06,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
SMALLER = {"hidden_size": 256, "intermediate_size": 256, "initializer_range": 0.05}
ALL_EXPERTS = 2  # were some chosen, rounding would choose between near ties
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2": {"sliding_window": None},
    "Qwen3": {"sliding_window": None},
    "Mistral": {"sliding_window": None},
    "Gemma3Text": {
        **SMALLER,
        "initializer_range": 0.04,
        "num_hidden_layers": 6,
        "query_pre_attn_scalar": 64,
        "sliding_window": 256,
    },
    "Gemma2": {
        **SMALLER,
        "num_hidden_layers": 4,
        "initializer_range": 0.075,
        "query_pre_attn_scalar": 16,
        "sliding_window": 256,
        "attn_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
    "GptOss": {
        **SMALLER,
        "num_hidden_layers": 4,
        "num_local_experts": ALL_EXPERTS,
        "num_experts_per_tok": ALL_EXPERTS,
        "sliding_window": 128,
    },
    "Qwen3Next": {
        **SMALLER,
        "initializer_range": 0.03,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": ALL_EXPERTS,
        "num_experts_per_tok": ALL_EXPERTS,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
    },
    "Llama4Text": {
        **SMALLER,
        "num_hidden_layers": 4,
        "intermediate_size_mlp": 256,
        "interleave_moe_layer_step": 5,  # no layer has experts, of which a token gets one
        "attention_chunk_size": 256,
    },
}
"""In the hybrids' weights logprobs of the best tokens lie 0.01 (rms) apart in bfloat16 and float32.
Where it is more, backends that are both right differ by more than a near tie."""
NORMS_ABOVE_ONE = ("Gemma3Text", "Gemma2", "Qwen3Next")  # their weights are what exceeds 1
SINKS = 6.0


def make_model(architecture: str, folder: Path, **shape: Any) -> dict[str, str]:
    """A checkpoint of one of SHAPES for the tokenizer of recall-9m, whose biases, norms and sinks
    are random too, so that leaving one out shows; `shape` changes its shape.

    Returns the arguments of `LLM` that name it.
    """
    import transformers

    config_class = getattr(transformers, f"{architecture}Config")
    vocabulary = {"vocab_size": tokenizer().get_vocab_size()}
    shape = vocabulary | SHAPE | SHAPES[architecture] | shape
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**shape))
    offset = 1.0 if architecture in NORMS_ABOVE_ONE else 0.0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(mean=1.0 - offset if "norm" in name else 0.0, std=0.3)
        if name.endswith("sinks"):  # as heavy as hundreds of keys
            parameter.data += SINKS
    model.to(torch.bfloat16).save_pretrained(folder)
    return {"model": str(folder), "tokenizer": str(MODEL)}

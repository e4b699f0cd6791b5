"""Small models of other architectures with random weights, made on the spot."""

from pathlib import Path

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


def make_model(architecture: str, folder: Path, **shape: int) -> dict[str, str]:
    """A checkpoint of "Qwen2", "Qwen3" or "Mistral" for the tokenizer of recall-9m, whose biases
    and norms are random too, so that leaving one out shows; `shape` changes SHAPE.

    Returns the arguments of `LLM` that name it.
    """
    import transformers

    config_class = getattr(transformers, f"{architecture}Config")
    shape = {"vocab_size": tokenizer().get_vocab_size(), "sliding_window": None} | SHAPE | shape
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**shape))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3)
    model.to(torch.bfloat16).save_pretrained(folder)
    return {"model": str(folder), "tokenizer": str(MODEL)}

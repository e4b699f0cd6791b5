"""Small recordings of random tensors, as `record` writes them."""

from pathlib import Path

import torch

from vllm_ffa_fp8fp8.bench.recording.store import (
    Header,
    LayerShape,
    RecordedLayer,
    RecordedRequest,
    Recording,
)

LENGTHS, STEPS = (150, 170), 3
SHAPE = LayerShape("model.layers.0.self_attn.attn", 6, 2, 32, 48, 32**-0.5)


def header(**changes) -> Header:
    fields = {
        "model": "models/small",
        "environment": {"gpu": "CPU", "torch": "2", "triton": "3", "vllm": "0.33", "python": "3"},
        "dtype": "bfloat16",
        "num_layers": 4,
        "steps": STEPS,
        "hidden": "steps",
        "sources": ["a.txt", "b.txt"],
        "prompts": [list(range(length)) for length in LENGTHS],
    }
    return Header(**fields | changes)


def requests(seed: int = 0) -> list[RecordedRequest]:
    """The query heads of a group look in one direction, where the first token lies, and few others
    score nearly as high."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    found = []
    for length in LENGTHS:
        tokens, heads = length + STEPS, SHAPE.num_kv_heads
        direction = normal(heads, 1, SHAPE.head_size)
        noise = normal(STEPS, heads, SHAPE.num_heads // heads, SHAPE.head_size)
        query = (direction + 0.5 * noise).flatten(1, 2)
        key = 0.5 * normal(tokens, heads, SHAPE.head_size)
        key[0] = 0.6 * direction[:, 0]
        hidden = normal(STEPS, SHAPE.hidden_size)
        tensors = (query, key, normal(*key.shape), hidden)
        found.append(RecordedRequest(*(tensor.bfloat16() for tensor in tensors)))
    return found


def layer(index: int = 0) -> RecordedLayer:
    return RecordedLayer(index, SHAPE, requests(index))


def write_recording(folder: Path, layers: tuple[int, ...] = (0, 2), **changes) -> Recording:
    recording = Recording.begin(folder, header(**changes))
    for index in layers:
        recording.put(index, SHAPE, requests(index), [[7] * STEPS for _ in LENGTHS])
    return recording

"""The job of `record` in an engine's own process."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.bench.recording.prompts import cut_prompts
from vllm_ffa_fp8fp8.bench.recording.store import Header, Recording

EXTENSION = "vllm_ffa_fp8fp8.bench.recording.worker.RecordingExtension"
HELD_BYTES = 8 << 30
"""Host memory for what a pass over the prompts records; more layers than fit take more passes."""


def record_layers(job: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Records layers into a folder, and tells {"text", "done", "of"} as it goes on.

    Args:
        job: `model`, `folder`, `prompts` (names and texts), `lengths` (tokens to cut each prompt
            to, one after another; none: whole), `layers` (indices, or None for all that
            FFA_FP8FP8 can run), `steps`, `hidden` (one of HIDDEN), `llm` (more arguments of LLM).

    Raises ValueError for a text that is too short or too long, and for a layer that is not there.
    """
    tell({"text": "reading the prompts"})
    sources, prompts = tokenize(job)
    longest = max(map(len, prompts)) + job["steps"] + 1
    tell({"text": "importing vLLM"})
    from vllm import LLM

    tell({"text": "loading the model"})
    llm = LLM(
        model=job["model"],
        enforce_eager=True,  # hooks run in the model's own forward
        enable_prefix_caching=False,
        max_num_seqs=1,
        max_model_len=longest,
        disable_log_stats=True,
        seed=0,
        worker_extension_cls=EXTENSION,
        **job["llm"],
    )
    found = llm.collective_rpc("ffa_layers")[0]
    layers = choose_layers(job["layers"], found)
    model_config = llm.llm_engine.vllm_config.model_config
    header = Header(
        model=job["model"],
        environment=versions(),
        dtype=str(model_config.dtype).removeprefix("torch."),
        num_layers=model_config.get_total_num_hidden_layers(),
        steps=job["steps"],
        hidden=job["hidden"],
        sources=sources,
        prompts=prompts,
    )
    recording = Recording.begin(Path(job["folder"]), header)
    due = [layer for layer in layers if layer not in recording.layers]
    sizes = {layer: layer_bytes(found[layer], header) for layer in due}
    check_disk(recording.folder, sum(sizes.values()))
    passes = list(passes_of(sizes, HELD_BYTES))
    progress = Progress(tell, len(passes) * len(prompts) + len(due))
    for group in passes:
        record_pass(llm, recording, group, progress)
    left_out = {layer: found[layer]["problem"] for layer in found if found[layer]["problem"]}
    return {
        "layers": layers,
        "reused": len(layers) - len(due),
        "left_out": left_out,
        "prompt_tokens": list(map(len, prompts)),
    }


class Progress:
    def __init__(self, tell: Callable[[dict[str, Any]], None], steps: int):
        self._tell, self._steps, self._done = tell, steps, 0

    def begin(self, text: str) -> None:
        self._tell({"text": text, "done": self._done, "of": self._steps})
        self._done += 1


def record_pass(llm: Any, recording: Recording, layers: list[int], progress: Progress) -> None:
    """Runs all prompts once, then writes `layers` one by one."""
    from vllm import SamplingParams

    header = recording.header
    sampling = SamplingParams(
        temperature=0, max_tokens=header.steps + 1, ignore_eos=True, detokenize=False
    )
    llm.collective_rpc("ffa_begin_recording", args=(layers, header.hidden))
    generated = []
    for number, prompt in enumerate(header.prompts, 1):
        progress.begin(f"prompt {number} of {len(header.prompts)}: {len(prompt):,} tokens")
        (output,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
        generated.append(list(output.outputs[0].token_ids)[: header.steps])
        llm.collective_rpc("ffa_end_request", args=(len(prompt), header.steps, header.hidden))
    llm.collective_rpc("ffa_end_recording")
    for layer in layers:
        progress.begin(f"writing layer {layer}")
        arguments = (str(recording.folder), asdict(header), layer, generated)
        llm.collective_rpc("ffa_write_layer", args=arguments)


def tokenize(job: dict[str, Any]) -> tuple[list[str], list[list[int]]]:
    """Sources and tokens of the prompts. Raises ValueError where the model cannot take them."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    sources, prompts = cut_prompts(job["prompts"], job["lengths"], tokenizer.encode)
    config = AutoConfig.from_pretrained(job["model"]).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    for source, prompt in zip(sources, prompts, strict=True):
        if positions and len(prompt) + job["steps"] + 1 > positions:
            most = positions - job["steps"] - 1
            raise ValueError(
                f"{source} has {len(prompt):,} tokens, and the model {positions:,} positions: "
                f"cut it with --tokens {most} or less"
            )
    return sources, prompts


def choose_layers(wanted: Sequence[int] | None, found: dict[int, dict[str, Any]]) -> list[int]:
    """The layers to record. Raises ValueError for one that is not there, or that has another kind
    of attention."""
    plain = sorted(layer for layer in found if found[layer]["problem"] is None)
    for layer in wanted or ():
        if layer not in found:
            known = ", ".join(map(str, sorted(found)))
            raise ValueError(f"the model has no attention layer {layer}; it has: {known}")
        if layer not in plain:
            raise ValueError(f"layer {layer}: {found[layer]['problem']}")
    if not plain:
        raise ValueError(
            f"the model has no layer that FFA_FP8FP8 runs: {next(iter(found.values()))['problem']}"
            if found
            else "the model has no attention layer"
        )
    return sorted(set(wanted)) if wanted else plain


def layer_bytes(shape: dict[str, Any], header: Header) -> int:
    """Of one layer's file."""
    tokens = sum(map(len, header.prompts)) + header.steps * len(header.prompts)
    steps = header.steps * len(header.prompts)
    hidden = {"all": tokens, "steps": steps, "none": 0}[header.hidden]
    elements = 2 * tokens * shape["num_kv_heads"] * shape["head_size"]
    elements += steps * shape["num_heads"] * shape["head_size"] + hidden * shape["hidden_size"]
    return elements * (4 if header.dtype == "float32" else 2)


def passes_of(sizes: dict[int, int], most: int) -> Iterator[list[int]]:
    """Cuts layers into groups of at most `most` bytes; a larger layer is a group of its own."""
    group: list[int] = []
    for layer in sizes:
        if group and sum(sizes[other] for other in group) + sizes[layer] > most:
            yield group
            group = []
        group.append(layer)
    if group:
        yield group


def check_disk(folder: Path, needed: int) -> None:
    """Raises ValueError where the folder's disk has less."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"the disk of {folder} is too full: {needed / 1e9:.2f} GB are needed, and "
            f"{free / 1e9:.2f} GB are free; record fewer --layers or --tokens"
        )


def versions() -> dict[str, str]:
    """What recorded tensors depend on besides the model."""
    import platform

    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"gpu": gpu, "python": platform.python_version(), **environment.stack()}

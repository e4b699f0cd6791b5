"""What `record` asks of vLLM's worker, through `worker_extension_cls`: the tensors that go into
attention modules, as the model's own forward hands them over."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.utils import extract_layer_index

from vllm_ffa_fp8fp8.bench.recording.store import (
    Header,
    LayerShape,
    RecordedRequest,
    Recording,
)
from vllm_ffa_fp8fp8.integration.refusals import check_impl_arguments


@dataclass
class Tap:
    """One attention module, what projects its input, and what was seen of the request in flight:
    the tensors of each step, on the CPU."""

    shape: LayerShape
    attention: Attention
    projection: LinearBase | None
    seen: dict[str, list[torch.Tensor]] = field(
        default_factory=lambda: {"query": [], "key": [], "value": [], "hidden": []}
    )

    def see_attention(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        shape = self.shape
        for name, heads in (
            ("query", shape.num_heads),
            ("key", shape.num_kv_heads),
            ("value", shape.num_kv_heads),
        ):
            self._keep(name, named[name].reshape(-1, heads, shape.head_size))

    def see_hidden(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._keep("hidden", args[0] if args else next(iter(kwargs.values())))

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        metadata = get_forward_context().attn_metadata
        if isinstance(metadata, list):
            metadata = metadata[0]
        if isinstance(metadata, dict):
            metadata = metadata.get(self.shape.name)
        if metadata is None:  # a step without requests
            return
        tensor = tensor[: metadata.num_actual_tokens]
        self.seen[name].append(tensor.detach().to("cpu", copy=True))

    def take(self, prompt_tokens: int, steps: int, hidden: str) -> RecordedRequest:
        """What was seen of a request, which is forgotten."""
        seen = {name: torch.cat(parts) for name, parts in self.seen.items() if parts}
        for parts in self.seen.values():
            parts.clear()
        tokens = prompt_tokens + steps
        if (found := len(seen.get("key", ()))) != tokens:
            raise RuntimeError(
                f"layer {self.shape.name} saw {found} tokens of a request of {tokens}"
            )
        states = seen.get("hidden") if hidden != "none" else None
        if states is not None and hidden == "steps":
            states = states[prompt_tokens:].clone()
        query = seen["query"][prompt_tokens:].clone()
        return RecordedRequest(query, seen["key"], seen["value"], states)


class RecordingExtension:
    """Records one request at a time: vLLM runs with `max_num_seqs=1` and without prefix caching,
    so that all tokens of a step are that request's."""

    _ffa_taps: dict[int, Tap]
    _ffa_hooks: list[Any]
    _ffa_requests: dict[int, list[RecordedRequest]]

    def ffa_layers(self) -> dict[int, dict[str, Any]]:
        """Of every attention layer its shape, and under "problem" why it cannot be recorded."""
        self._ffa_taps, found = {}, {}
        for parent in self.get_model().modules():
            for module in parent.children():
                if not isinstance(module, Attention):
                    continue
                index = extract_layer_index(module.layer_name)
                found[index] = {"problem": problem_of(module)}
                if found[index]["problem"] is None:
                    linear = (m for m in parent.children() if isinstance(m, LinearBase))
                    projection = next(linear, None)
                    hidden_size = projection.input_size if projection is not None else 0
                    shape = LayerShape(
                        module.layer_name, module.num_heads, module.num_kv_heads,
                        module.head_size, hidden_size, float(module.impl.scale),
                    )  # fmt: skip
                    self._ffa_taps[index] = Tap(shape, module, projection)
                    found[index] |= asdict(shape)
        return found

    def ffa_begin_recording(self, layers: list[int], hidden: str) -> None:
        self._ffa_requests = {layer: [] for layer in layers}
        self._ffa_hooks = []
        for tap in map(self._ffa_taps.get, layers):
            hook = tap.attention.register_forward_pre_hook(tap.see_attention, with_kwargs=True)
            self._ffa_hooks.append(hook)
            if hidden != "none" and tap.projection is not None:
                hook = tap.projection.register_forward_pre_hook(tap.see_hidden, with_kwargs=True)
                self._ffa_hooks.append(hook)

    def ffa_end_request(self, prompt_tokens: int, steps: int, hidden: str) -> None:
        """Keeps what was seen since the last call as one request."""
        for layer, requests in self._ffa_requests.items():
            requests.append(self._ffa_taps[layer].take(prompt_tokens, steps, hidden))

    def ffa_write_layer(
        self, folder: str, header: dict[str, Any], layer: int, generated: list[list[int]]
    ) -> None:
        """Writes a layer's requests, which are forgotten. Raises ValueError where the disk does
        not take them."""
        recording = Recording.begin(Path(folder), Header(**header))
        requests = self._ffa_requests.pop(layer)
        recording.put(layer, self._ffa_taps[layer].shape, requests, generated)

    def ffa_end_recording(self) -> None:
        for hook in self._ffa_hooks:
            hook.remove()


def problem_of(attention: Attention) -> str | None:
    """Why a layer's attention is not what FFA_FP8FP8 runs, or None."""
    impl = attention.impl
    if getattr(impl, "logits_soft_cap", None) or getattr(impl, "sinks", None) is not None:
        return "a soft cap of logits and sinks are not recorded"
    try:
        check_impl_arguments(
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            alibi_slopes=getattr(impl, "alibi_slopes", None),
            sliding_window=attention.sliding_window,
            attn_type=attention.attn_type,
            kv_sharing_target_layer_name=attention.kv_sharing_target_layer_name,
        )
    except ValueError as error:
        return str(error)
    return None

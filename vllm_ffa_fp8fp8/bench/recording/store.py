"""A recording on disk: a folder with an index in JSON and a safetensors file for each layer.

The index names model, versions, prompts (their tokens) and, for each finished layer, its file, the
file's digest and its shapes. A layer's file has, for each request R (0, 1, ...):

    R.query   [steps, num_heads, head_size]      of the decode steps, rotated
    R.key     [tokens, num_kv_heads, head_size]  of prompt and decode steps, rotated
    R.value   like the keys
    R.hidden  [steps or tokens, hidden_size]     what the QKV projection reads

all in the model's dtype. Decode step `i` of a prompt of `T` tokens sees the first `T + 1 + i`.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import safetensors.torch
import torch
from safetensors import SafetensorError

from vllm_ffa_fp8fp8.bench.files import entry, make_folder, read_object, replacing

FORMAT = 1
INDEX = "recording.json"
MAKE_ONE = "make one with `ffa-fp8fp8 record`"


@dataclass(frozen=True)
class Header:
    """What all layers of a recording have in common.

    `prompts` are lists of token ids, `sources` the files they come from, `hidden` says of which
    tokens there are hidden states: steps, all or none.
    """

    model: str
    environment: dict[str, str]
    dtype: str
    num_layers: int
    steps: int
    hidden: str
    sources: list[str]
    prompts: list[list[int]]


@dataclass(frozen=True)
class LayerShape:
    """What one layer's attention is; `scale` is the factor on q . k."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    scale: float


@dataclass(frozen=True)
class RecordedRequest:
    """One layer's tensors of one request; see the module. `hidden` is None where none were kept."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    hidden: torch.Tensor | None

    @property
    def steps(self) -> int:
        return self.query.shape[0]

    @property
    def prompt_tokens(self) -> int:
        return self.key.shape[0] - self.steps


@dataclass(frozen=True)
class RecordedLayer:
    """One layer of a recording."""

    index: int
    shape: LayerShape
    requests: list[RecordedRequest]


class Recording:
    """A recording in a folder. Its methods raise ValueError, which says what is wrong with it."""

    def __init__(self, folder: Path, header: Header, layers: dict[int, dict[str, Any]]):
        self.folder, self.header, self._layers = folder, header, layers

    @classmethod
    def begin(cls, folder: Path, header: Header) -> "Recording":
        """The recording that `folder` has under this header, or a new one there."""
        if not (folder / INDEX).is_file():
            make_folder(folder)
            return cls(folder, header, {})
        found = cls.open(folder)
        for field in fields(Header):
            if getattr(found.header, field.name) != getattr(header, field.name):
                raise ValueError(
                    f"{folder} holds another recording (its {field.name} differ): name another "
                    "folder with --out, or remove that one"
                )
        return found

    @classmethod
    def open(cls, folder: Path) -> "Recording":
        """The recording in `folder`, as far as its index goes."""
        path = Path(folder) / INDEX
        if not path.is_file():
            raise ValueError(f"{folder} holds no recording: {MAKE_ONE}")
        try:
            content = read_object(path)
            if entry(content, "recording", int) != FORMAT:
                raise ValueError(f"its format is {content['recording']}, this reads {FORMAT}")
            kinds = get_type_hints(Header)
            header = Header(
                **{name: entry(content, name, get_origin(k) or k) for name, k in kinds.items()}
            )
            if header.steps < 1:
                raise ValueError("it has no decode steps")
            layers = {int(i): e for i, e in entry(content, "layers", dict).items()}
            for layer in layers.values():
                for name in ("file", "digest"):
                    entry(layer, name, str)
                LayerShape(**entry(layer, "shape", dict))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no recording's index: {error}; {MAKE_ONE}") from error
        return cls(Path(folder), header, layers)

    @property
    def layers(self) -> list[int]:
        """The layers that are finished."""
        return sorted(self._layers)

    @property
    def lengths(self) -> list[int]:
        """Tokens of the prompts, each length once."""
        return sorted({len(prompt) for prompt in self.header.prompts})

    def shape(self, layer: int) -> LayerShape:
        return LayerShape(**self._layers[layer]["shape"])

    def digest(self, layer: int) -> str:
        return self._layers[layer]["digest"]

    def put(
        self,
        layer: int,
        shape: LayerShape,
        requests: list[RecordedRequest],
        generated: list[list[int]],
    ) -> None:
        """Writes one layer, and the index behind it. `generated`: the tokens that were sampled,
        which the decode steps read."""
        tensors = {
            f"{number}.{name}": tensor.contiguous()
            for number, request in enumerate(requests)
            for name, tensor in vars(request).items()
            if tensor is not None
        }
        data = safetensors.torch.save(tensors, metadata={"layer": shape.name})
        name = f"layer-{layer:03d}.safetensors"
        with replacing(self.folder / name) as part:
            part.write_bytes(data)
        self._layers[layer] = {
            "file": name,
            "digest": digest_of(data),
            "shape": asdict(shape),
            "generated": generated,
        }
        self._save_index()

    def _save_index(self) -> None:
        content = {"recording": FORMAT, **asdict(self.header)}
        layers = ",\n".join(f'"{i}": {json.dumps(self._layers[i])}' for i in self.layers)
        head = ",\n".join(f'"{name}": {json.dumps(value)}' for name, value in content.items())
        with replacing(self.folder / INDEX) as part:
            part.write_text(f'{{{head},\n"layers": {{\n{layers}\n}}}}\n')

    def load(self, layer: int) -> RecordedLayer:
        """One layer's tensors, on the CPU, checked against index and digest."""
        if layer not in self._layers:
            known = ", ".join(map(str, self.layers)) or "none"
            raise ValueError(f"{self.folder} has no layer {layer}; recorded are: {known}")
        path, shape = self.folder / self._layers[layer]["file"], self.shape(layer)
        again = "record again, into an empty folder"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}; {again}") from error
        if digest_of(data) != self.digest(layer):
            raise ValueError(f"{path} is damaged, or of another recording: {again}")
        try:
            tensors = safetensors.torch.load(data)
            requests = [
                self._request(tensors, number, shape) for number in range(len(self.header.prompts))
            ]
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is no layer of this recording ({error}): {again}") from error
        return RecordedLayer(layer, shape, requests)

    def _request(self, tensors: dict, number: int, shape: LayerShape) -> RecordedRequest:
        found = {f.name: tensors.get(f"{number}.{f.name}") for f in fields(RecordedRequest)}
        tokens = len(self.header.prompts[number]) + self.header.steps
        wanted = {
            "query": (self.header.steps, shape.num_heads, shape.head_size),
            "key": (tokens, shape.num_kv_heads, shape.head_size),
            "value": (tokens, shape.num_kv_heads, shape.head_size),
        }
        for name, size in wanted.items():
            tensor = found[name]
            if tensor is None or tuple(tensor.shape) != size:
                kind = "none" if tensor is None else tuple(tensor.shape)
                raise ValueError(f"{name} of request {number} is {kind}, not {size}")
        return RecordedRequest(**found)


def digest_of(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()

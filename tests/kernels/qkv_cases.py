"""Batches of projections with odd shapes, and what must hold of their rotation."""

from dataclasses import dataclass

import torch
from cases import Case, empty_cache, own_layer

from vllm_ffa_fp8fp8.kernels.cache_reference import write_kv_reference
from vllm_ffa_fp8fp8.kernels.projection.qkv_heads import QKVHeads
from vllm_ffa_fp8fp8.kernels.projection.reference import rotate_reference

NUM_PAGES = 5
MAX_POSITION = 500


@dataclass(frozen=True)
class QKVCase(Case):
    """A `Case` whose tokens come from one projection. `num_slots` None: as many as tokens."""

    num_tokens: int = 7
    num_slots: int | None = None
    rotary_dim: int | None = None
    is_neox_style: bool = True
    norm: bool = False
    cache_dtype: torch.dtype | None = None
    bias: bool = False
    hidden_size: int = 192

    @property
    def num_heads(self) -> int:
        return self.group * self.num_kv_heads

    @property
    def width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_size

    def normal(self, *shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed + seed))

    def heads(self, device: str) -> QKVHeads:
        rotary_dim = self.rotary_dim or self.head_size
        frequency = 1e4 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
        angles = torch.arange(MAX_POSITION)[:, None] * frequency
        cos_sin = torch.cat((angles.cos(), angles.sin()), -1).to(self.cache_dtype or self.dtype)
        norms = [None, None]
        if self.norm:
            norms = (1 + 0.3 * self.normal(2, self.head_size, seed=1)).to(device, self.dtype)
        return QKVHeads(
            self.num_heads, self.num_kv_heads, self.head_size, cos_sin.to(device),
            self.is_neox_style, norms[0], norms[1], 0.1 if self.norm else 0.0,
        )  # fmt: skip

    def positions(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, MAX_POSITION, (self.num_tokens,), generator=generator)

    def slots(self) -> torch.Tensor:
        """Slots in any order, every fourth a padding."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        slots = torch.randperm(NUM_PAGES * self.page_size, generator=generator)[: self.num_tokens]
        slots[3::4] = -1
        return slots[: self.num_slots]


def check_rotation(case: QKVCase, qkv: torch.Tensor, output: torch.Tensor, error: float) -> None:
    """Q and K of `output` are those of `qkv`, float64, normed and rotated: off by the rounding to
    the dtype and by `error` times the head's largest element."""
    heads = case.heads("cpu")
    rounding = 2.0**-8 if case.dtype == torch.bfloat16 else 2.0**-11
    first = 0
    for count, norm in ((case.num_heads, heads.query_norm), (case.num_kv_heads, heads.key_norm)):
        columns = slice(first, first := first + count * case.head_size)
        rows = qkv[:, columns].unflatten(1, (count, case.head_size))
        expected = rotate_reference(rows, case.positions(), heads, norm, torch.float64)
        found = output[:, columns].cpu().double().view_as(expected)
        largest = expected.abs().amax(-1, keepdim=True)
        excess = (found - expected).abs() - 1.01 * rounding * expected.abs() - error * largest
        assert excess.max() <= 0, (excess.max() / largest.max()).item()


def check_cache(case: QKVCase, storage: torch.Tensor, output: torch.Tensor, value) -> None:
    """The cache holds what the oracle writes of the output's K and of `value`, byte for byte
    (but for the sign of zeros), and poison everywhere else."""
    slots = case.slots()
    expected = empty_cache(case, NUM_PAGES)
    oracle = case.layout.split(own_layer(expected, case.interleaved))
    written = case.layout.split(own_layer(storage.cpu(), case.interleaved))
    first = case.num_heads * case.head_size
    key = output.cpu()[:, first : first + case.num_kv_heads * case.head_size]
    shape = (case.num_tokens, case.num_kv_heads, case.head_size)
    key, value = key.reshape(shape)[: len(slots)], value.cpu().reshape(shape)[: len(slots)]
    write_kv_reference(key, value, oracle, slots)
    for plane in case.layout.planes:
        ours, theirs = getattr(written, plane.name), getattr(oracle, plane.name)
        ours, theirs = ours.view(torch.uint8), theirs.view(torch.uint8)
        if plane.name in ("key", "key_residual") and plane.dtype.itemsize == 1:
            ours, theirs = (torch.where(p == 0x80, 0, p) for p in (ours, theirs))
        assert torch.equal(ours, theirs), plane.name
    own_layer(expected, case.interleaved).copy_(own_layer(storage.cpu(), case.interleaved))
    assert torch.equal(storage.cpu(), expected)


HALF, BFLOAT = torch.float16, torch.bfloat16

SHAPES = {
    "llama": QKVCase(group=4, num_kv_heads=2, head_size=128, page_size=64),
    "one_token": QKVCase(num_tokens=1, group=7, num_kv_heads=1, head_size=128, page_size=16),
    "half": QKVCase(dtype=HALF, group=3, head_size=80, page_size=48, num_slots=5),
    "qwen3": QKVCase(norm=True, group=2, head_size=128, num_tokens=5, interleaved=True),
    "qwen2": QKVCase(bias=True, group=7, head_size=64, num_tokens=17),
    "wide_heads": QKVCase(group=1, num_kv_heads=3, head_size=256, num_tokens=3, page_size=32),
    "phi": QKVCase(rotary_dim=32, head_size=80, group=1, num_kv_heads=4, num_tokens=9),
    "gpt_j": QKVCase(is_neox_style=False, rotary_dim=64, head_size=96, group=5, dtype=HALF),
    "glm": QKVCase(is_neox_style=False, rotary_dim=32, head_size=64, group=16, norm=True),
    "float_angles": QKVCase(cache_dtype=torch.float32, head_size=96, group=8, num_kv_heads=1),
    "no_residual": QKVCase(residual=False, norm=True, dtype=HALF, head_size=64, group=6),
    "no_fp8": QKVCase(fp8_key=False, residual=False, head_size=80, group=2),
    "no_fp8_half": QKVCase(fp8_key=False, residual=False, head_size=64, group=2, dtype=HALF),
}

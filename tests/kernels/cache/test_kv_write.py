"""Writing keys and values: what comes back, which bytes change, and the rounding itself."""

import pytest
import torch
import triton
import triton.language as tl
from cases import POISON, Case, empty_cache, own_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ffa_fp8fp8.kernels import write_kv
from vllm_ffa_fp8fp8.kernels.cache.fp8_split import round_to_e4m3
from vllm_ffa_fp8fp8.kernels.cache_reference import gather_kv_reference, write_kv_reference

HALF, BFLOAT = torch.float16, torch.bfloat16
NUM_PAGES = 5


def packed(case: Case, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same key and value as slices of a wider tensor, as models pass them."""
    qkv = torch.cat([torch.zeros_like(key), key, value], dim=1)
    heads = case.num_kv_heads
    return qkv[:, heads : 2 * heads], qkv[:, 2 * heads :]


def without_zero_signs(plane: torch.Tensor) -> torch.Tensor:
    stored = plane.view(torch.uint8)
    return torch.where(stored == 0x80, 0, stored) if plane.dtype.itemsize == 1 else stored


def write_and_compare(device: str, case: Case, key, slots) -> torch.Tensor:
    """Writes with the kernel and the oracle; every byte of every layer must agree. The values are
    the keys, last row first.

    Returns the cache, on the CPU.
    """
    value = key.flip(0)
    expected = empty_cache(case, NUM_PAGES)
    storage = expected.to(device, copy=True)
    key_slice, value_slice = packed(case, key.to(device), value.to(device))
    planes = case.layout.split(own_layer(storage, case.interleaved))
    write_kv(key_slice, value_slice, planes, slots.to(device))
    storage = storage.cpu()
    oracle = case.layout.split(own_layer(expected, case.interleaved))
    written = case.layout.split(own_layer(storage, case.interleaved))
    write_kv_reference(key[: len(slots)], value[: len(slots)], oracle, slots)
    for plane in case.layout.planes:
        ours, theirs = getattr(written, plane.name), getattr(oracle, plane.name)
        if plane.dtype == torch.float8_e4m3fn:
            ours, theirs = without_zero_signs(ours), without_zero_signs(theirs)
        differing = int((ours.view(torch.uint8) != theirs.view(torch.uint8)).sum())
        assert differing == 0, plane.name
    own_layer(expected, case.interleaved).copy_(own_layer(storage, case.interleaved))
    assert torch.equal(storage, expected)
    return storage


def read_back(case: Case, storage: torch.Tensor, num_tokens: int) -> tuple:
    """Keys and values at the first slots, float32 `[num_tokens, num_kv_heads, head_size]`."""
    planes = case.layout.split(own_layer(storage, case.interleaved))
    pages = torch.arange(NUM_PAGES)
    return gather_kv_reference(planes, pages, num_tokens, torch.float32)


def assert_within_fp8_bound(back: torch.Tensor, written: torch.Tensor) -> None:
    """What `write_kv` states for rows of E4M3 without a residual."""
    back, written = back.double(), written.double()
    largest = written.abs().amax(-1, keepdim=True)
    bound = torch.where(written.abs() >= 2**-13 * largest, 2**-4 * written.abs(), 2**-17 * largest)
    assert ((back - written).abs() <= bound).all()


def keys_of_every_kind(case: Case) -> torch.Tensor:
    """Rows from tiny to huge, rows of zeros, and rows with one element that dwarfs the others."""
    generator = torch.Generator().manual_seed(2)
    large = 1e38 if case.dtype == BFLOAT else 6e4
    small = 1e-30 if case.dtype == BFLOAT else 1e-3
    magnitudes = torch.tensor([small, 1e-4, 1e-2, 1.0, 7.0, 500.0, 1e4, large / 5]).repeat(3)
    key = torch.randn(24, case.num_kv_heads, case.head_size, generator=generator)
    key = (key.clamp(-4, 4) * magnitudes[:, None, None]).to(case.dtype)
    key[3] = 0.0
    key[4] = -0.0
    key[5, :, ::2] = 0.0
    key[6, :, 7] = large
    key[11, :, 3] = 2048.0
    return key


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
def test_error_bounds(device, dtype, residual):
    """The bounds that `write_kv` states, for every kind of row."""
    case = Case(dtype=dtype, residual=residual, page_size=16, head_size=80)
    key = keys_of_every_kind(case)
    storage = write_and_compare(device, case, key, torch.arange(len(key)))
    back, key = read_back(case, storage, len(key))[0].double(), key.double()
    error, largest = (back - key).abs(), key.abs().amax(-1, keepdim=True)
    exact = residual and dtype == BFLOAT
    normal = key.abs() >= (2**-14 if exact else 2**-13) * largest
    bound = 0 if exact else 2**-9 if residual else 2**-4
    assert normal.double().mean() > 0.8
    assert (error <= bound * key.abs())[normal].all()
    assert (error <= (2**-22 if residual else 2**-17) * largest)[~normal].all()
    assert (back[3:5] == 0).all()


def test_largest_numbers(device):
    case = Case(page_size=16, num_kv_heads=1)
    largest = torch.finfo(BFLOAT).max
    key = torch.full((2, 1, 64), 1.0, dtype=BFLOAT)
    key[0, 0, :3] = torch.tensor([largest, -largest, largest / 3])
    key[1, 0, :2] = torch.tensor([2.0**-119, -(2.0**-118)])
    key[1, 0, 2:] = 0.0
    back, _ = read_back(case, write_and_compare(device, case, key, torch.arange(2)), 2)
    assert torch.equal(back[0, 0, :3], key[0, 0, :3].float())
    assert torch.equal(back[1], key[1].float())


def test_the_bound_rejects_a_missing_residual(device):
    """Rows of ordinary size come back wrong from the base alone, beyond 2^-9."""
    case = Case(page_size=16, residual=False)
    key = keys_of_every_kind(case)[:3]
    back, _ = read_back(case, write_and_compare(device, case, key, torch.arange(3)), 3)
    assert ((back - key).abs() > 2**-9 * key.abs().float()).float().mean() > 0.5


KEY_FORMATS = [(True, True), (True, False), (False, False)]


@pytest.mark.parametrize("fp8_key, residual", KEY_FORMATS)
@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
def test_error_bound_of_fp8_values(device, dtype, fp8_key, residual):
    """The bound that `write_kv` states, for rows of every magnitude, beside keys of any format."""
    case = Case(
        dtype=dtype,
        fp8_key=fp8_key,
        residual=residual,
        fp8_value=True,
        page_size=16,
        head_size=80,
    )
    key = keys_of_every_kind(case)
    back = read_back(case, write_and_compare(device, case, key, torch.arange(24)), 24)[1].flip(0)
    assert_within_fp8_bound(back, key)
    assert (back[3:5] == 0).all()
    assert not torch.equal(back, key.float())


@pytest.mark.parametrize("exponent_error", [-1, 1])
def test_the_bound_of_fp8_values_rejects_a_wrong_exponent(device, exponent_error):
    case = Case(fp8_value=True, page_size=16)
    key = keys_of_every_kind(case)
    storage = write_and_compare(device, case, key, torch.arange(24))
    assert_within_fp8_bound(read_back(case, storage, 24)[1].flip(0), key)
    for token in set(range(24)) - {3, 4}:  # rows of zeros
        wrong = storage.clone()
        planes = case.layout.split(own_layer(wrong, case.interleaved))
        planes.value_exponent[(23 - token) // 16, 0, (23 - token) % 16] += exponent_error
        with pytest.raises(AssertionError):
            assert_within_fp8_bound(read_back(case, wrong, 24)[1].flip(0), key)


def test_values_of_the_models_dtype_are_stored_as_they_are(device):
    case = Case(page_size=16)
    key = keys_of_every_kind(case)
    back = read_back(case, write_and_compare(device, case, key, torch.arange(24)), 24)[1].flip(0)
    assert torch.equal(back, key.float())


@pytest.mark.parametrize(
    "shape",
    [
        {"head_size": 64, "page_size": 64, "interleaved": True},
        {"head_size": 96, "page_size": 48, "dtype": HALF},
        {"head_size": 128, "page_size": 128, "residual": False},
        {"head_size": 256, "page_size": 80, "num_kv_heads": 1},
        {"head_size": 80, "page_size": 32, "fp8_key": False, "residual": False},
        {"head_size": 80, "page_size": 32, "fp8_key": False, "residual": False, "dtype": HALF},
        {"head_size": 96, "page_size": 48, "fp8_value": True, "interleaved": True},
        {"head_size": 128, "page_size": 128, "fp8_value": True, "residual": False, "dtype": HALF},
    ],
)
def test_slots_in_any_order(device, shape):
    """Padding is not written, keys beyond the slots are ignored, the rest stays poison."""
    case = Case(**shape)
    key = keys_of_every_kind(case)
    slots = torch.randperm(NUM_PAGES * case.page_size, generator=torch.Generator().manual_seed(3))
    slots = slots[:19]
    slots[[0, 7, 18]] = torch.tensor([-1, -5, -1])
    storage = write_and_compare(device, case, key, slots)
    cache = own_layer(storage, case.interleaved)
    changed = (case.layout.split(cache).value.view(torch.uint8) != POISON).any(-1).any(1)
    assert changed.flatten().nonzero().flatten().tolist() == sorted(slots[slots >= 0].tolist())


def test_many_tokens(device):
    """More tokens than a small launch takes."""
    case = Case(page_size=256, num_kv_heads=1)
    key = torch.randn(1100, 1, 64, generator=torch.Generator().manual_seed(4)).to(BFLOAT)
    write_and_compare(device, case, key, torch.arange(1, 1101))


@pytest.mark.parametrize("slots", [torch.full((4,), -1), torch.zeros(0, dtype=torch.int64)])
def test_nothing_to_write(device, slots):
    case = Case(page_size=16)
    assert (write_and_compare(device, case, keys_of_every_kind(case), slots) == POISON).all()


@triton.jit
def _round_kernel(rounded_ptr, stored_ptr, x_ptr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    rounded = round_to_e4m3(tl.load(x_ptr + places))
    tl.store(rounded_ptr + places, rounded)
    tl.store(stored_ptr + places, rounded.to(tl.float8e4nv))


def assert_rounds_like_torch(device: str, numbers: torch.Tensor) -> None:
    """On the grid in float32 already, and unchanged by the cast that stores it."""
    size = triton.next_power_of_2(len(numbers))
    x = torch.zeros(size, device=device)
    x[: len(numbers)] = numbers.to(device)
    rounded, stored = torch.empty_like(x), torch.empty_like(x, dtype=torch.float8_e4m3fn)
    _round_kernel[(1,)](rounded, stored, x, SIZE=size)
    expected = x.cpu().to(torch.float8_e4m3fn).float()
    assert torch.equal(rounded.cpu(), expected)
    assert torch.equal(stored.cpu().float(), expected)


def test_rounding_at_every_tie(device):
    """Every number of the grid, every midpoint, and their neighbours in float32."""
    grid = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    points = torch.cat([grid, (grid[1:] + grid[:-1]) / 2])
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    points = torch.cat([points, torch.nextafter(points, up), torch.nextafter(points, down)])
    points = points[points <= 448]
    assert_rounds_like_torch(device, torch.cat([points, -points]))


@settings(max_examples=50, deadline=None)
@given(numbers=st.lists(st.floats(-448, 448, width=32), min_size=1, max_size=64))
def test_rounding(device, numbers):
    padded = torch.zeros(64)
    padded[: len(numbers)] = torch.tensor(numbers)
    assert_rounds_like_torch(device, padded)

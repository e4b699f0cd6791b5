"""The page's planes: where they start, how wide they are, and which caches are refused."""

import pytest
import torch

from vllm_ffa_fp8fp8.kernels import PageLayout

KEY_FORMATS = [(True, True), (True, False), (False, False)]
FORMATS = [(*key, fp8_value) for key in KEY_FORMATS for fp8_value in (False, True)]


@pytest.mark.parametrize("fp8_key, residual, fp8_value", FORMATS)
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_bytes(head_size, fp8_key, residual, fp8_value):
    layout = PageLayout(head_size, torch.bfloat16, fp8_key, residual, fp8_value)
    key = head_size * (1 + residual) + 1 if fp8_key else 2 * head_size
    value = head_size + 1 if fp8_value else 2 * head_size
    assert layout.bytes_per_token == key + value
    assert sum(plane.bytes_per_token for plane in layout.planes) == layout.bytes_per_token


def test_order_of_planes():
    names = [plane.name for plane in PageLayout(64, torch.float16).planes]
    assert names == ["key", "key_residual", "value", "key_exponent"]
    names = [plane.name for plane in PageLayout(64, torch.float16, fp8_value=True).planes]
    assert names == ["key", "key_residual", "value", "key_exponent", "value_exponent"]


@pytest.mark.parametrize("fp8_key, residual, fp8_value", FORMATS)
@pytest.mark.parametrize("page_size", [16, 48, 128])
def test_planes_fill_the_page(page_size, fp8_key, residual, fp8_value):
    """Written one after the other, the planes leave no byte of a page and touch no other."""
    layout = PageLayout(80, torch.float16, fp8_key, residual, fp8_value)
    cache = torch.zeros(3, 2, page_size, layout.bytes_per_token, dtype=torch.uint8)
    planes = layout.split(cache)
    assert (planes.num_kv_heads, planes.head_size, planes.page_size) == (2, 80, page_size)
    offset = 0
    for number, plane in enumerate(layout.planes, start=1):
        view = getattr(planes, plane.name)
        assert view.dtype == plane.dtype and view.shape == (3, 2, page_size, plane.width)
        assert (view.data_ptr() - cache.data_ptr()) == offset and offset % 16 == 0
        assert view.stride()[2:] == (plane.width, 1)
        view[1, 1].view(torch.uint8).fill_(number)
        size = page_size * plane.bytes_per_token
        assert (cache[1, 1].flatten()[offset : offset + size] == number).all()
        offset += size
    assert offset == cache[1, 1].numel() and (cache[1, 1] > 0).all()
    cache[1, 1] = 0
    assert not cache.any()


@pytest.mark.parametrize("fp8_key, residual, fp8_value", FORMATS)
def test_missing_planes_are_none(fp8_key, residual, fp8_value):
    layout = PageLayout(64, torch.float16, fp8_key, residual, fp8_value)
    planes = layout.split(torch.zeros(1, 1, 16, layout.bytes_per_token, dtype=torch.uint8))
    assert (planes.key_residual is None) == (not residual)
    assert (planes.key_exponent is None) == (not fp8_key)
    assert (planes.value_exponent is None) == (not fp8_value)


def test_a_layer_inside_the_pages():
    """`[pages, layers, ...]`: the planes of a layer keep the strides of the whole."""
    layout = PageLayout(64, torch.bfloat16)
    storage = torch.zeros(4, 3, 2, 16, layout.bytes_per_token, dtype=torch.uint8)
    planes = layout.split(storage[:, 1])
    planes.value[2, 1] = 1.0
    changed = storage.flatten(2).any(-1).nonzero().tolist()
    assert changed == [[2, 1]]


LAYOUT = PageLayout(64, torch.bfloat16)
WIDTH = LAYOUT.bytes_per_token


@pytest.mark.parametrize(
    "cache, message",
    [
        (torch.zeros(1, 1, 16, WIDTH, dtype=torch.int8), "expected a uint8 cache with 257 bytes"),
        (torch.zeros(1, 1, 16, 256, dtype=torch.uint8), "got torch.uint8 with 256"),
        (torch.zeros(1, 1, 24, WIDTH, dtype=torch.uint8), "a multiple of 16 tokens"),
        (
            torch.zeros(1, 16, 2, WIDTH, dtype=torch.uint8).transpose(1, 2),
            r"contiguous per \(block, head\), got shape \(1, 2, 16, 257\), strides",
        ),
        (
            torch.zeros(8 + 16 * WIDTH, dtype=torch.uint8)[8:].view(1, 1, 16, WIDTH),
            "multiples of 16 bytes, got offset 8",
        ),
        (
            torch.zeros(2 * 16 * WIDTH + 1, dtype=torch.uint8).as_strided(
                (2, 1, 16, WIDTH), (16 * WIDTH + 1, 16 * WIDTH, WIDTH, 1)
            ),
            r"multiples of 16 bytes, got offset 0, strides \(4113",
        ),
    ],
)
def test_refused_caches(cache, message):
    with pytest.raises(ValueError, match=message):
        LAYOUT.split(cache)


@pytest.mark.parametrize(
    "arguments",
    [(72, torch.float16), (64, torch.float32), (64, torch.float16, False, True)],
)
def test_impossible_layouts(arguments):
    with pytest.raises(AssertionError):
        PageLayout(*arguments)

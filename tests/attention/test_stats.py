"""What a worker counted, as users read it."""

from types import SimpleNamespace

import pytest
import torch

from vllm_ffa_fp8fp8.attention.stats import WorkerExtension, sum_skip_stats
from vllm_ffa_fp8fp8.kernels.counters import SHARE_UNITS

HEADS = (
    (3, 10, 0, 1, SHARE_UNITS // 2, SHARE_UNITS // 8, 2),
    (5, 10, 4, 2, SHARE_UNITS // 4, SHARE_UNITS // 4, 2),
)


def layer(counters, backend="FFA_FP8FP8", is_dense=False):
    if counters is not None:
        counters = torch.tensor(counters)
    layout = SimpleNamespace(bytes_per_token=257)
    impl = SimpleNamespace(counters=counters, layout=layout, num_kv_heads=2, is_dense=is_dense)
    return SimpleNamespace(
        impl=impl, get_attn_backend=lambda: SimpleNamespace(get_name=lambda: backend)
    )


def worker(**layers):
    context = {f"model.layers.{name[1:]}.self_attn.attn": at for name, at in layers.items()}
    extension = WorkerExtension()
    extension.vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=context)
    )
    return extension


def test_counts_by_layer_and_head():
    dense = ((10, 10, 0, 0, 0, 0, 2), (10, 10, 4, 0, 0, 0, 2))
    counting = worker(l7=layer(HEADS), l8=layer(None, "OTHER"), l9=layer(dense, is_dense=True))
    stats = counting.ffa_skip_stats(reset=False)
    counts = {"kept_blocks": 8, "total_blocks": 20, "short_blocks": 4, "drawn_blocks": 3}
    counts |= {"left_mass": 0.75, "most_left_mass": 0.25, "tokens": 4}
    all_kept = counts | {"kept_blocks": 20, "drawn_blocks": 0}
    all_kept |= {"left_mass": 0.0, "most_left_mass": 0.0}
    assert stats.pop("layers") == [{"layer": 7} | counts, {"layer": 9} | all_kept]
    assert stats == {
        "kept_blocks": 28,
        "total_blocks": 40,
        "short_blocks": 8,
        "drawn_blocks": 3,
        "left_mass": 0.75,
        "most_left_mass": 0.25,
        "tokens": 8,
        "cache_bytes_per_token": 2 * 2 * 257,
        "backend_layers": 2,
        "dense_layers": 1,
    }
    first, _ = counting.ffa_skip_stats(by_head=True)["layers"]
    assert [head["kept_blocks"] for head in first["heads"]] == [3, 5]
    assert [head["most_left_mass"] for head in first["heads"]] == [0.125, 0.25]
    assert counting.ffa_skip_stats()["total_blocks"] == 0


def test_workers_sum_up():
    other = ((1, 10, 0, 0, 0, 0, 2), (1, 10, 0, 0, 0, 0, 2))
    stats = [
        worker(l1=layer(counters), l0=layer(counters)).ffa_skip_stats(by_head=True)
        for counters in (HEADS, other)
    ]
    total = sum_skip_stats(stats)
    assert (total["kept_blocks"], total["total_blocks"], total["short_blocks"]) == (20, 80, 8)
    assert total["kept"] == 0.25 and total["cache_bytes_per_token"] == 2 * 2 * 2 * 257
    assert [entry["layer"] for entry in total["layers"]] == [0, 1]
    for entry in total["layers"]:
        assert entry["kept"] == 0.25 and entry["short_blocks"] == 4
        assert (entry["mean_left_mass"], entry["most_left_mass"]) == (0.75 / 8, 0.25)
        assert [head["kept"] for head in entry["heads"]] == [0.3, 0.5, 0.1, 0.1]


def test_only_short_requests_keep_no_fraction():
    short = sum_skip_stats([worker(l0=layer(((0, 0, 9, 0, 0, 0, 0),) * 2)).ffa_skip_stats()])
    assert short["kept"] is short["layers"][0]["kept"] is None and short["short_blocks"] == 18


def test_reading_what_was_not_counted_is_an_error():
    with pytest.raises(ValueError, match='"record_skip_ratio": true'):
        worker(l0=layer(None)).ffa_skip_stats()
    with pytest.raises(ValueError, match="no layer runs with FFA_FP8FP8"):
        worker(l0=layer(HEADS, "OTHER")).ffa_skip_stats()

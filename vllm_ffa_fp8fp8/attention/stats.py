"""What the layers counted, read through vLLM's `worker_extension_cls` and `collective_rpc`."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from vllm.model_executor.models.utils import extract_layer_index

from vllm_ffa_fp8fp8.attention import worker_metrics
from vllm_ffa_fp8fp8.attention.geometry import named_impls
from vllm_ffa_fp8fp8.kernels.counters import COUNTERS, SHARE_UNITS

COUNTS = ("kept_blocks", "total_blocks", "short_blocks", "drawn_blocks")
"""Kept and all blocks of requests that may be pruned, blocks of those below `min_context`, which
are all read, and of the kept ones those that were drawn: the first columns of a layer's counters.
"""
SUMS = (*COUNTS, "left_mass", "tokens")


class WorkerExtension:
    """`LLM(..., worker_extension_cls="vllm_ffa_fp8fp8.stats.WorkerExtension")`."""

    def ffa_skip_stats(self, reset: bool = True, by_head: bool = False) -> dict[str, Any]:
        """Counts of this worker since the last reset, over all decode steps.

        Blocks are counted once a KV head and layer. `kept_blocks` and `total_blocks` are those of
        requests of `min_context` tokens or more, `short_blocks` those of shorter ones, which are
        all read. By share, `drawn_blocks` are those of `kept_blocks` that chance chose,
        `left_mass` the shares of the softmax that were left to the draw, added up over `tokens`
        query tokens and KV heads, and `most_left_mass` the most of a request. `layers` has the
        same for each layer, by its index `layer`, and, with `by_head`, lists of `heads`: this
        worker's KV heads. `cache_bytes_per_token` covers all layers and KV heads of this worker.

        Raises ValueError where FFA_FP8FP8 runs without `record_skip_ratio`, or not at all.
        """
        impls = named_impls(self.vllm_config)
        if not impls:
            raise ValueError("no layer runs with FFA_FP8FP8: there is nothing to count")
        if any(impl.counters is None for impl in impls.values()):
            raise ValueError(
                "nothing was counted: set FFA_FP8FP8's option record_skip_ratio to true, as in "
                """--additional-config '{"ffa_fp8fp8": {"record_skip_ratio": true}}'"""
            )
        worker_metrics.flush(resets=reset)
        layers = []
        for name, impl in impls.items():
            counters = impl.counters.cpu()
            layer = {"layer": extract_layer_index(name)} | _counts(counters)
            if by_head:
                layer["heads"] = [_counts(row[None]) for row in counters]
            layers.append(layer)
            if reset:
                impl.counters.zero_()
        return _joined(layers) | {
            "layers": layers,
            "cache_bytes_per_token": sum(
                impl.layout.bytes_per_token * impl.num_kv_heads for impl in impls.values()
            ),
            "backend_layers": len(impls),
            "dense_layers": sum(bool(impl.is_dense) for impl in impls.values()),
        }


def sum_skip_stats(workers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """`ffa_skip_stats` of all workers as one, of `by_head` the heads of all, worker by worker, and
    the fraction `kept` beside every count, and `mean_left_mass` of a query token and KV head: None
    where no request may be pruned."""
    workers = list(workers)
    layers: dict[int, dict[str, Any]] = {}
    for layer in (layer for worker in workers for layer in worker["layers"]):
        index = layer["layer"]
        known = layers.setdefault(index, {"layer": index} | _joined([]))
        known |= _joined([known, layer])
        if "heads" in layer:
            known["heads"] = known.get("heads", []) + list(map(_with_kept, layer["heads"]))
    total = _joined(workers)
    total["cache_bytes_per_token"] = sum(worker["cache_bytes_per_token"] for worker in workers)
    return _with_kept(total) | {"layers": [_with_kept(layers[index]) for index in sorted(layers)]}


def _counts(rows: torch.Tensor) -> dict[str, Any]:
    """Of counters `[num_kv_heads, len(COUNTERS)]`."""
    *blocks, left, _, tokens = rows.sum(0).tolist()
    most = rows[:, COUNTERS.index("most_left")].max().item()
    return dict(zip(COUNTS, blocks, strict=True)) | {
        "left_mass": left / SHARE_UNITS,
        "most_left_mass": most / SHARE_UNITS,
        "tokens": tokens,
    }


def _joined(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    parts = list(parts)
    sums = {name: sum(part[name] for part in parts) for name in SUMS}
    return sums | {"most_left_mass": max((part["most_left_mass"] for part in parts), default=0.0)}


def _with_kept(counts: Mapping[str, Any]) -> dict[str, Any]:
    total, tokens = counts["total_blocks"], counts["tokens"]
    return {
        **counts,
        "kept": counts["kept_blocks"] / total if total else None,
        "mean_left_mass": counts["left_mass"] / tokens if tokens else None,
    }

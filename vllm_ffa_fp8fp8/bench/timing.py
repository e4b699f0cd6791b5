"""Times on a CUDA device: CUDA graphs, events, medians."""

import statistics
from collections.abc import Callable, Sequence

import torch


def time_graph(launches: Sequence[Callable[[], object]], repeats: int = 25) -> float:
    """Median microseconds of one of `launches`, replayed together in one CUDA graph."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times) * 1e3 / len(launches)


def read_bandwidth() -> float:
    """Bytes per microsecond that a large sum reads."""
    data = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    return data.nbytes / time_graph([lambda: data.sum()], repeats=10)


def copy_bandwidth() -> float:
    """Bytes per microsecond, read and written, of a large copy."""
    source = torch.ones(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_graph([lambda: target.copy_(source)], repeats=10)

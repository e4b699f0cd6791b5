"""What counting (the option `metrics`) costs a layer's decode attention, on a GPU: microseconds
without and with counters, in turns, medians of rounds. `python scripts/time_counters.py`"""

import statistics
from functools import partial

import torch

from vllm_ffa_fp8fp8.bench.cells import Geometry, Shape
from vllm_ffa_fp8fp8.bench.decoder import Decoder
from vllm_ffa_fp8fp8.bench.inputs import DELTA, make_inputs, num_sets, write_cache
from vllm_ffa_fp8fp8.bench.timing import time_graph
from vllm_ffa_fp8fp8.config import FFAConfig
from vllm_ffa_fp8fp8.environment import stack
from vllm_ffa_fp8fp8.kernels.counters import new_counters

BATCHES = ((1, 8192), (1, 32_768), (8, 32_768), (8, 131_072))
CONFIGS = (FFAConfig(rule="threshold", delta=DELTA), FFAConfig(rule="share", tau=0.03))
KEPT, ROUNDS = 0.1, 7


def time_both(shape: Shape, config: FFAConfig) -> tuple[float, float]:
    """Microseconds without and with counters."""
    decoder = Decoder(shape, True, {}, config=config)
    sets = [make_inputs(shape, KEPT, seed) for seed in range(num_sets(shape))]
    output = torch.empty_like(sets[0].query)
    counters = new_counters(shape.geometry.num_kv_heads, output.device)
    caches = [(inputs, write_cache(inputs, "auto")) for inputs in sets]
    times = ([], [])
    for _ in range(ROUNDS):
        for found, counted in zip(times, (None, counters), strict=True):
            launches = [partial(decoder.launch, *cache, output, counted) for cache in caches]
            found.append(time_graph(launches))
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    print(torch.cuda.get_device_name(), stack())
    for config in CONFIGS:
        for batch, seq_len in BATCHES:
            shape = Shape(Geometry(), batch, seq_len)
            without, counted = time_both(shape, config)
            print(
                f"{config.rule} {batch} x {seq_len}: {without:.2f} us, counted {counted:.2f} us "
                f"({counted / without - 1:+.2%})",
                flush=True,
            )
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

"""Benchmarks: decode attention beside FlashAttention 3, and a whole model's decode steps."""

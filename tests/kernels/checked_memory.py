"""Checks every address that interpreted kernels read or write: it lies in the storage of one of
their tensors."""

from collections.abc import Iterator

import numpy as np
import torch
import triton.runtime.interpreter as interpreter


def tensors(arguments) -> Iterator[torch.Tensor]:
    """Those among a kernel's arguments, in tuples, too."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from tensors(argument)


class CheckedMemory:
    """Stands for the interpreter's memory; `starts` and `ends` are those of the storages that the
    running kernel's tensors lie in."""

    def __init__(self, memory):
        self.memory = memory
        self.starts = self.ends = np.zeros(0, dtype=np.uint64)
        self.checked = 0

    def __getattr__(self, name: str):
        return getattr(self.memory, name)

    def allow(self, arguments) -> None:
        storages = [tensor.untyped_storage() for tensor in tensors(arguments)]
        ranges = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages})
        self.starts, self.ends = np.array(ranges, dtype=np.uint64).reshape(-1, 2).T

    def check(self, way: str, pointers, mask, itemsize: int) -> None:
        addresses = pointers[mask.astype(bool)].astype(np.uint64)
        if not addresses.size:
            return
        places = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        inside = (places >= 0) & (addresses + np.uint64(itemsize) <= self.ends[places])
        self.checked += addresses.size
        if not inside.all():
            raise IndexError(f"{way} of {(~inside).sum()} elements outside the kernel's tensors")

    def load(self, pointers, mask, other, dtype):
        self.check("read", pointers, mask, np.dtype(dtype).itemsize)
        return self.memory.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        self.check("write", pointers, mask, value.dtype.itemsize)
        return self.memory.store(pointers, value, mask)

    def atomic_rmw(self, operation, pointers, value, mask, semantics):
        self.check("atomic", pointers, mask, value.dtype.itemsize)
        return self.memory.atomic_rmw(operation, pointers, value, mask, semantics)


def install(monkeypatch) -> CheckedMemory:
    memory = CheckedMemory(interpreter._interpreter)
    arguments_of = interpreter.GridExecutor._init_args_hst

    def note_tensors(executor, *arguments):
        positional, named = arguments_of(executor, *arguments)
        memory.allow([*positional, *named.values()])
        return positional, named

    monkeypatch.setattr(interpreter, "_interpreter", memory)
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", note_tensors)
    return memory

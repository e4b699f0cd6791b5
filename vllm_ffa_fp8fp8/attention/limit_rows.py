"""How much each request of a batch may skip, where CUDA graphs find it."""

from collections.abc import Sequence

import torch


class LimitRows:
    """Delta or tau of every row: `tensor`, float32 `[num_reqs]`, whose address never changes."""

    def __init__(self, limit: float, num_reqs: int, device: torch.device):
        self.limit = limit
        self.tensor = torch.full((num_reqs,), limit, dtype=torch.float32, device=device)
        self._asked: list[float | None] = []

    def change(self, limit: float) -> None:
        """Another limit of the engine, in place; waits for the device."""
        self.limit, self._asked = limit, []
        self.tensor.fill_(limit)
        self.tensor.tolist()

    def update(self, asked: Sequence[float | None]) -> torch.Tensor:
        """The tensor, with what the rows asked for in place of the engine's limit; None, and rows
        that are missing at the end, have that. Does not wait for the device, and does nothing
        where no row has changed."""
        if asked != self._asked:
            self._asked = list(asked)
            rows = [self.limit if limit is None else limit for limit in asked]
            rows += [self.limit] * (len(self.tensor) - len(rows))
            # a new one each time, which PyTorch keeps until it is copied
            pinned = {"device": "cpu", "pin_memory": self.tensor.is_cuda}
            host = torch.tensor(rows, dtype=torch.float32, **pinned)
            self.tensor.copy_(host, non_blocking=True)
        return self.tensor

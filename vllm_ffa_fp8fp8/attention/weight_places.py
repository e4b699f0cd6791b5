"""Weights that somebody else replaces while the engine lives, as weight synchronisation does."""

import torch
from vllm.config import CUDAGraphMode
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")


class WeightPlaces:
    """Where the tensors lie that kernels read of an attention module.

    Args:
        tensors: `(module, name)` of each parameter or buffer.
        vllm_config: says whether CUDA graphs read them, too.
    """

    def __init__(self, tensors: list[tuple[torch.nn.Module, str]], vllm_config):
        self.names = tensors
        # the modules' own dicts: looking attributes up in modules takes longer than all else
        self.holders = [(_holder(module, name), name) for module, name in tensors]
        self.vllm_config = vllm_config
        self.tensors = self._now()
        self.addresses = self._addresses()

    def have_moved(self) -> bool:
        """Whether a tensor lies elsewhere than when this was last asked. Where CUDA graphs read
        the old place, it is given the new values and becomes the module's again, and none has.

        Raises ValueError where the new tensor does not fit there.
        """
        if self._addresses() == self.addresses:
            return False
        for (module, name), old in zip(self.names, self.tensors, strict=True):
            new = getattr(module, name)
            if new.data_ptr() != old.data_ptr():
                _check_same_kind(new, old, f"{type(module).__name__}.{name}")
                if self._graphs_read_the_old:
                    new.data = old.copy_(new.data)
                    _warn_about_graphs()
        self.tensors, self.addresses = self._now(), self._addresses()
        return not self._graphs_read_the_old

    @property
    def _graphs_read_the_old(self) -> bool:
        return self.vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE

    def _now(self) -> list[torch.Tensor]:
        return [getattr(module, name).data for module, name in self.names]

    def _addresses(self) -> list[int]:
        return [holder[name].data_ptr() for holder, name in self.holders]


def _holder(module: torch.nn.Module, name: str) -> dict:
    return module._parameters if name in module._parameters else module._buffers


def _check_same_kind(new: torch.Tensor, old: torch.Tensor, name: str) -> None:
    for what in ("shape", "dtype", "device"):
        if getattr(new, what) != getattr(old, what):
            raise ValueError(
                f"{name} was replaced after loading by a tensor of another {what}: "
                f"{getattr(new, what)}, where {getattr(old, what)} was loaded. FFA_FP8FP8 cannot "
                f"follow that; start the engine anew, or with fused_kproj off."
            )


def _warn_about_graphs() -> None:
    logger.warning_once(
        "Weights were replaced after loading, and CUDA graphs read those that were loaded. "
        "FFA_FP8FP8 has copied what it reads itself; what vLLM's own graphs read is not copied. "
        "Copy new weights into the old ones (param.data.copy_), or start with --enforce-eager."
    )

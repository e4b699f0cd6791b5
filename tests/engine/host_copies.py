"""vLLM's offloading to the host on a machine without a GPU: all of it is vLLM's but the copies."""

import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class HostCopySpec(CPUOffloadingSpec):
    moves_whole_blocks = True

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        assert self.blocks_per_chunk == 1
        return HostCopies(kv_caches, self.num_chunks)


class HostCopies(OffloadingWorker):
    """Copies what the canonical view of a cache says that a block is; done when it returns."""

    def __init__(self, kv_caches: CanonicalKVCaches, num_chunks: int):
        (self.refs,) = kv_caches.group_data_refs
        self.cache = [part.tensor for part in kv_caches.tensors]
        self.host = [tensor.new_zeros(num_chunks, tensor.shape[1]) for tensor in self.cache]
        self.done: list[TransferResult] = []

    def submit_store(self, job_id, src_spec, dst_spec) -> bool:
        return self._copy(job_id, self.cache, src_spec, self.host, dst_spec)

    def submit_load(self, job_id, src_spec, dst_spec, expedited: bool = False) -> bool:
        return self._copy(job_id, self.host, src_spec, self.cache, dst_spec)

    def _copy(self, job_id, source, src_spec, target, dst_spec) -> bool:
        rows, places = (torch.from_numpy(spec.block_ids).long() for spec in (src_spec, dst_spec))
        for ref in self.refs:
            size = ref.page_size_bytes
            target[ref.tensor_idx][places, :size] = source[ref.tensor_idx][rows, :size]
        self.done.append(TransferResult(job_id=job_id, success=True))
        return True

    def get_finished(self) -> list[TransferResult]:
        done, self.done = self.done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        pass

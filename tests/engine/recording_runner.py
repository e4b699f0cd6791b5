"""`runner.py` that adds `steps` to the facts: of every step with decodes of FFA_FP8FP8 the query
tokens of each of them, and of each prefill beside them."""

import json
import sys
from pathlib import Path

import runner


def record_steps() -> list[list[list[int]]]:
    from vllm_ffa_fp8fp8.attention.metadata import FFAFP8FP8MetadataBuilder

    build, steps = FFAFP8FP8MetadataBuilder.build, []

    def recording_build(self, common_prefix_len, common, *args, **kwargs):
        metadata = build(self, common_prefix_len, common, *args, **kwargs)
        query_lens = common.query_start_loc_cpu.diff().tolist()
        if metadata.num_decodes:
            steps.append([query_lens[: metadata.num_decodes], query_lens[metadata.num_decodes :]])
        return metadata

    FFAFP8FP8MetadataBuilder.build = recording_build
    return steps


if __name__ == "__main__":
    job_file, result_file = map(Path, sys.argv[1:])
    steps = record_steps()
    result = runner.run(json.loads(job_file.read_text()))
    result["facts"]["steps"] = steps
    result_file.write_text(json.dumps(result))

"""`judge_texts` with vLLM's V2 model runner on the CPU: `python v2_on_cpu.py JOB RESULT`, two JSON
files.

GPUs use that runner, whose kernels are Triton's. vLLM takes it on the CPU where Triton has a
backend for CPUs; here the interpreter stands in for one.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
import quick_interpreter  # noqa: E402

quick_interpreter.install(SimpleNamespace(setattr=setattr))  # for as long as the process runs

if __name__ == "__main__":
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from vllm_ffa_fp8fp8.bench.quality.engine import judge_texts

    steps, execute = [], GPUModelRunner.execute_model
    GPUModelRunner.execute_model = lambda *args, **kwargs: (
        steps.append(1),
        execute(*args, **kwargs),
    )[1]
    job, result = map(Path, sys.argv[1:])
    answer = judge_texts(json.loads(job.read_text()), print)
    result.write_text(json.dumps(answer | {"steps_of_v2": len(steps)}))

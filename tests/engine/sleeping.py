"""An engine that sleeps and wakes: `python sleeping.py JOB RESULT`, two JSON files.

Job: `llm` (arguments of `LLM`), `prompt` and `other` (token ids). Result: `answers` (to the prompt
before, and after each level of sleep, once the other has taken its pages), `skips` (the counters
of the engine then).
"""

import json
import sys
from pathlib import Path
from typing import Any

from runner import as_answer


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(enable_sleep_mode=True, **job["llm"])
    sampling = SamplingParams(temperature=0, logprobs=4, max_tokens=16, ignore_eos=True)

    def ask(prompt: list[int]) -> dict[str, Any]:
        (output,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
        return as_answer(output)

    answers, skips = [ask(job["prompt"])], []
    for level in (1, 2):
        llm.sleep(level=level)
        llm.wake_up(tags=["weights"])
        if level == 2:
            llm.collective_rpc("reload_weights")
        llm.wake_up()
        ask(job["other"])
        answers.append(ask(job["prompt"]))
        skips.append(llm.collective_rpc("ffa_skip_stats")[0])
    return {"answers": answers, "skips": skips}


if __name__ == "__main__":
    job_file, result_file = map(Path, sys.argv[1:])
    result_file.write_text(json.dumps(run(json.loads(job_file.read_text()))))

"""Ugly mixed traffic through an engine with FFA_FP8FP8 that skips nothing, and its greedy answers
beside the default backend's: a table, and exit code 1 for a mismatch, a crash, or growing memory.

    python scripts/soak.py --model MODEL --minutes 10
    python scripts/soak.py --model MODEL --requests 60
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NEAR_TIE = 0.05
"""Between the logprobs of the best tokens: both are right."""
MAX_GROWTH, SPARE_MIB = 1.05, 32
"""What the memory at the end may be above that after the first quarter."""
BURST, MOST_WAITING = 8, 24
NUM_DOCUMENTS = 2


@dataclass
class Sent:
    """A request. `abort_after`: output tokens, None for no abort."""

    prompt: list[int]
    sampling: dict[str, Any]
    abort_after: int | None

    @property
    def is_greedy(self) -> bool:
        return self.sampling["temperature"] == 0 and self.abort_after is None


class Traffic:
    """Requests of all lengths, some with the start of others, in any order."""

    def __init__(self, tokens: list[int], options: argparse.Namespace):
        self.tokens, self.max_model_len = tokens, options.max_model_len
        # vLLM's CPU runner fails on a seeded request whose prompt is cut into steps, and takes
        # wrong tokens for greedy ones where drafts and random requests share a step
        self.has_seeds, self.has_random = options.gpu, options.gpu or not options.drafts
        self.random = random.Random(options.seed)

    def request(self) -> Sent:
        pick = self.random
        max_tokens = pick.choice([1, 8, 24, 48, 48])
        longest = self.max_model_len - max_tokens
        some = (int(longest ** pick.random()), pick.randint(longest // 8, longest // 2), longest)
        (length,) = pick.choices(some, (4, 5, 1))
        if pick.random() < 0.6:  # the start of a document that others start with, too
            start = pick.randrange(NUM_DOCUMENTS) * self.max_model_len
        else:
            start = pick.randrange(len(self.tokens) - length)
        prompt = self.tokens[start : start + length]
        sampling = {"max_tokens": max_tokens, "temperature": 0, "logprobs": 4, "ignore_eos": True}
        kind = pick.random() if self.has_random else 0.7 * pick.random()
        if kind > 0.9:
            sampling |= {"temperature": 1.0, "n": 2, "logprobs": None}
        elif kind > 0.7:
            sampling |= {"temperature": 0.8, "top_p": 0.9}
            if self.has_seeds:
                sampling["seed"] = pick.randrange(1 << 20)
        elif kind > 0.6:
            sampling |= {"ignore_eos": False, "stop": ["\n\n", "def "]}
        abort_after = pick.randrange(1, max_tokens + 1) if pick.random() < 0.25 else None
        return Sent(prompt, sampling, abort_after)

    def burst(self) -> int:
        return self.random.choice([0] * 12 + [1, 1, 2, BURST])


def engine_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """A cache that holds one of the longest requests and little more, prompts cut into steps, and
    drafts."""
    pages = -(-options.max_model_len // options.page_size)
    arguments = {
        "model": options.model,
        "max_model_len": options.max_model_len,
        "block_size": options.page_size,
        "num_gpu_blocks_override": pages + 4,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 12,
        "enforce_eager": options.eager,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "disable_log_stats": False,
        "attention_backend": options.backend,
        "additional_config": {"ffa_fp8fp8": {"preset": "exact"}},
        "hf_overrides": {"head_dtype": "float32"},
    }
    if options.drafts:
        arguments["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": options.drafts,
            "prompt_lookup_max": 4,
        }
    return arguments


def document_tokens(tokenizer: Any, count: int) -> list[int]:
    from vllm_ffa_fp8fp8.commands.demo_prompts import source_lines

    tokens: list[int] = []
    lines = source_lines()
    for first in range(0, len(lines), 2000):
        tokens += tokenizer.encode("".join(lines[first : first + 2000]))
        if len(tokens) >= count:
            return tokens
    return tokens


def memory_mib() -> int:
    """Of the device where there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return (total - free) >> 20
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def serve(options: argparse.Namespace) -> dict[str, Any]:
    """Sends the traffic; what came of it."""
    from vllm import LLM, SamplingParams

    llm = LLM(**engine_arguments(options))
    engine = llm.llm_engine
    tokens = document_tokens(llm.get_tokenizer(), NUM_DOCUMENTS * options.max_model_len * 2)
    traffic = Traffic(tokens, options)
    begin, sent, answers, aborted, memory = time.monotonic(), {}, {}, 0, []
    num_tokens = num_cached = resets = 0

    def progress() -> float:
        if options.minutes:
            return (time.monotonic() - begin) / (60 * options.minutes)
        return len(sent) / options.requests

    while progress() < 1 or engine.has_unfinished_requests():
        waiting = engine.get_num_unfinished_requests()
        burst = traffic.burst() if waiting else BURST
        for _ in range(min(burst, MOST_WAITING - waiting)):
            if progress() >= 1:
                break
            request = traffic.request()
            name = str(len(sent))
            sent[name] = request
            prompt = {"prompt_token_ids": request.prompt}
            engine.add_request(name, prompt, SamplingParams(**request.sampling))
        if not waiting:
            resets += bool(llm.reset_prefix_cache())
        for output in engine.step():
            request = sent[output.request_id]
            length = sum(len(completion.token_ids) for completion in output.outputs)
            if request.abort_after and length >= request.abort_after and not output.finished:
                engine.abort_request([output.request_id])
                aborted += 1
            elif output.finished:
                num_tokens += length
                num_cached += output.num_cached_tokens or 0
                if request.is_greedy:
                    answers[output.request_id] = list(output.outputs[0].token_ids)
        if len(memory) < 4 and progress() >= (len(memory) + 1) / 4:
            memory.append(memory_mib())
    memory = [*memory[:3], memory_mib()]
    counts = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    greedy = [asdict(sent[name]) | {"answer": answer} for name, answer in answers.items()]
    return {
        "requests": len(sent),
        "longest prompt": max(len(request.prompt) for request in sent.values()),
        "output tokens": num_tokens,
        "aborts": aborted,
        "preemptions": counts["vllm:num_preemptions"],
        "prefix hits, tokens": num_cached,
        "drafts accepted": counts.get("vllm:spec_decode_num_accepted_tokens", 0),
        "prefix cache resets": resets,
        "memory at quarters, MiB": memory,
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "greedy": greedy,
    }


def compare(options: argparse.Namespace, greedy: list[dict[str, Any]]) -> dict[str, Any]:
    """The same greedy requests through the default backend, without drafts and with room."""
    from vllm import LLM, SamplingParams

    arguments = engine_arguments(options)
    for name in ("attention_backend", "additional_config", "speculative_config", "block_size"):
        arguments.pop(name, None)
    pages = arguments.pop("num_gpu_blocks_override") * options.page_size * 4 // 128
    llm = LLM(**arguments, num_gpu_blocks_override=max(pages, 64) * (8 if options.gpu else 1))
    outputs = llm.generate(
        [{"prompt_token_ids": request["prompt"]} for request in greedy],
        [SamplingParams(**request["sampling"]) for request in greedy],
        use_tqdm=False,
    )
    result: dict[str, Any] = {"compared": len(greedy), "near ties": 0, "mismatches": []}
    for request, output in zip(greedy, outputs, strict=True):
        completion, ours = output.outputs[0], request["answer"]
        pairs = zip(ours, completion.token_ids, strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if place is None:
            if len(ours) != len(completion.token_ids):
                result["mismatches"].append(f"{len(ours)} tokens: {len(request['prompt'])}")
            continue
        step = completion.logprobs[place]
        best = max(entry.logprob for entry in step.values())
        gap = best - step[ours[place]].logprob if ours[place] in step else float("inf")
        if gap <= options.near_tie:
            result["near ties"] += 1
        else:
            result["mismatches"].append(
                f"prompt of {len(request['prompt'])}, output token {place}: {gap:.3f} too low"
            )
    return result


def run_child(part: str, options: argparse.Namespace, given: Any, folder: Path) -> Any:
    """The result of a part in a process of its own, or the end of its log."""
    job, result, log = (folder / f"{part}.{end}" for end in ("job", "result", "log"))
    job.write_text(json.dumps({"options": vars(options), "given": given}))
    variables = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with log.open("wb") as output:
        command = [sys.executable, __file__, "--child", part, str(job), str(result)]
        subprocess.run(command, env=variables, stdout=output, stderr=subprocess.STDOUT)
    if result.exists():
        return json.loads(result.read_text())
    return "\n".join(log.read_text(errors="replace").splitlines()[-60:])


def be_child(part: str, job: str, result: str) -> None:
    read = json.loads(Path(job).read_text())
    options = argparse.Namespace(**read["options"])
    answer = serve(options) if part == "serve" else compare(options, read["given"])
    Path(result).write_text(json.dumps(answer))


def soak(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The table, and what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        served = run_child("serve", options, None, Path(folder))
        if isinstance(served, str):
            return {"crashes": 1}, [served]
        compared = run_child("compare", options, served.pop("greedy"), Path(folder))
    if isinstance(compared, str):
        return served | {"crashes": 0}, [f"the default backend failed:\n{compared}"]
    mismatches = compared.pop("mismatches")
    table = served | compared | {"mismatches": len(mismatches), "crashes": 0}
    first, *_, last = served["memory at quarters, MiB"]
    if last > MAX_GROWTH * first + SPARE_MIB:
        mismatches = [*mismatches, f"memory grew from {first} to {last} MiB"]
    return table, mismatches


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--minutes", type=float, default=0.0, help="how long requests are sent")
    parser.add_argument("--requests", type=int, default=60, help="how many, without --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument(
        "--backend", default="FFA_FP8FP8", help="that takes the traffic: whose fault is it?"
    )
    parser.add_argument("--eager", action="store_true", help="without torch.compile and graphs")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.3)
    parser.add_argument("--near-tie", type=float, default=NEAR_TIE)
    parser.add_argument("--json", type=Path, help="writes the table to this file")
    options = parser.parse_args()
    to = options.json
    del options.json
    options.gpu = Path("/dev/nvidiactl").exists()
    table, problems = soak(options)
    width = max(map(len, table))
    for name, value in table.items():
        print(f"| {name:<{width}} | {value} |")
    print(*problems, sep="\n")
    if to:
        to.write_text(json.dumps(table | {"problems": problems}))
    return int(bool(problems))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        be_child(*sys.argv[2:])
    else:
        sys.exit(main())

"""Ugly mixed traffic through `vllm serve` with FFA_FP8FP8 that skips nothing, and its greedy
answers beside the default backend's: a table, and exit code 1 for a mismatch, a crash, or growing
memory.

    python scripts/soak.py --model MODEL --minutes 10
    python scripts/soak.py --model MODEL --minutes 3 --drafts 0 4
"""

import argparse
import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soaking.answers import Answer, Verdict, ask, judge_all
from soaking.server import Failure, Server, serve
from soaking.traffic import BURST, NUM_DOCUMENTS, Request, Traffic

EXACT = {"preset": "exact", "fused_kproj": "off"}
"""By the default backend's rotation, whose roundings are not the fused kernel's."""
NEAR_TIE = 0.05
"""Between the logprobs of the best tokens: both are right. More is a near tie, too, where the
default backend itself differs by more from one reading to another."""
MAX_GROWTH, SPARE_MIB = 1.08, 32
"""What the memory at the end may be above that after the first quarter."""
MOST_WAITING = 24
REQUESTS_A_ROUND = 40
"""After which the server comes to rest."""
IDLE_SECONDS = 30
GPU_CACHE_BYTES = 2 << 30
"""So told, vLLM profiles no memory, which others that use the GPU would disturb."""
MAX_BATCHED_TOKENS = 512


def server_options(options: argparse.Namespace, drafts: int) -> list[str]:
    """A cache that holds one of the longest requests and little more, prompts cut into steps, and
    drafts."""
    pages = -(-options.max_model_len // options.page_size)
    given = ["--attention-backend", options.backend, "--block-size", str(options.page_size)]
    given += ["--additional-config", json.dumps({"ffa_fp8fp8": options.options})]
    given += ["--num-gpu-blocks-override", str(pages + 4)]
    if drafts:
        ngram = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 4}
        given += ["--speculative-config", json.dumps(ngram)]
    if options.gpu:
        given += ["--enable-sleep-mode"]
    return given


def common_options(options: argparse.Namespace) -> list[str]:
    given = ["--max-model-len", str(options.max_model_len), "--max-num-seqs", "12"]
    given += ["--max-num-batched-tokens", str(MAX_BATCHED_TOKENS), "--enable-prefix-caching"]
    given += ["--hf-overrides", json.dumps({"head_dtype": "float32"})]
    given += ["--gpu-memory-utilization", str(options.gpu_memory_utilization)]
    if options.gpu:
        given += ["--kv-cache-memory-bytes", str(GPU_CACHE_BYTES)]
    return given + (["--enforce-eager"] if options.eager else [])


def document_tokens(model: str, count: int) -> list[int]:
    from transformers import AutoTokenizer

    from vllm_ffa_fp8fp8.commands.demo_prompts import source_lines

    tokenizer, tokens, lines = AutoTokenizer.from_pretrained(model), [], source_lines()
    for first in range(0, len(lines), 2000):
        tokens += tokenizer.encode("".join(lines[first : first + 2000]))
        if len(tokens) >= count:
            return tokens
    return tokens


@dataclass
class Run:
    """What was sent to a server and came of it."""

    server: Server
    traffic: Traffic
    minutes: float
    gpu: bool
    counts_gpu: bool
    sent: list[Request] = field(default_factory=list)
    greedy: list[tuple[Request, Answer]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    tokens: int = 0
    resets: int = 0
    pauses: int = 0
    alike: int = 0
    begin: float = field(default_factory=time.monotonic)

    @property
    def progress(self) -> float:
        return (time.monotonic() - self.begin) / (60 * self.minutes)

    async def send(self, request: Request) -> list[Answer]:
        self.sent.append(request)
        try:
            answers = await ask(self.server, request)
        except Exception as error:  # a crash is one line, whatever the client makes of it
            self.problems.append(f"{type(error).__name__}: {error}"[:2000])
            return []
        self.tokens += sum(len(answer.tokens) for answer in answers)
        if answers and request.is_compared:
            self.greedy.append((request, answers[0]))
        return answers

    async def go(self) -> None:
        """Rounds of traffic until the time is over."""
        self.measure()
        while self.progress < 1 and not self.has_crashed():
            await self.round()
            await self.rest()
        if not self.has_crashed():
            self.measure()

    def measure(self) -> None:
        self.memory.append(self.server.memory_mib(self.counts_gpu))

    def has_crashed(self) -> bool:
        return self.server.process.poll() is not None or len(self.problems) > 20

    async def round(self) -> None:
        """Bursts, so many requests; in the midst of them the scheduler pauses."""
        tasks: set[asyncio.Task] = set()
        last, pauses_at = len(self.sent) + REQUESTS_A_ROUND, len(self.sent) + BURST
        burst = BURST
        while len(self.sent) < last and self.progress < 1 and not self.has_crashed():
            for _ in range(min(burst, MOST_WAITING - len(tasks))):
                tasks.add(task := asyncio.create_task(self.send(self.traffic.request())))
                task.add_done_callback(tasks.discard)
            await asyncio.sleep(self.traffic.pause())
            burst = self.traffic.burst()
            if len(self.sent) > pauses_at:
                pauses_at = last
                await self.sleep_and_wake(0, "keep")
            if len(self.memory) < 4 and self.progress >= len(self.memory) / 4:
                self.measure()
        await asyncio.gather(*tasks)

    async def rest(self) -> None:
        """While nothing runs."""
        if self.has_crashed():
            return
        await self.wait_until_idle()
        one, other = [await self.send(request) for request in self.traffic.seeded()]
        self.alike += bool(one and other and one[0].tokens == other[0].tokens)
        status, body = await self.server.post("/reset_prefix_cache")
        self.resets += bool(status == 200 and body["success"])
        if self.gpu:
            for level in (1, 2):
                await self.sleep_and_wake(level, "abort")

    async def wait_until_idle(self) -> None:
        """What clients left behind is to end soon."""
        running = ("num_requests_running", "num_requests_waiting")
        for _ in range(IDLE_SECONDS):
            if not (count := await self.server.sum_of(*running)):
                return
            await asyncio.sleep(1)
        self.problems.append(f"{count} requests run, and no client is there")

    async def sleep_and_wake(self, level: int, mode: str) -> None:
        posts = [f"/sleep?level={level}&mode={mode}"]
        if level == 0:
            posts += ["/wake_up?tags=scheduling"]
        elif level == 1:
            posts += ["/wake_up"]
        else:
            posts += ["/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache"]
        for path in posts:
            body = {"method": "reload_weights"} if path == "/collective_rpc" else None
            status, answer = await self.server.post(path, body)
            if status != 200:
                self.problems.append(f"{path}: {status} {answer}")
        self.pauses += 1


async def send_traffic(options: argparse.Namespace, drafts: int) -> tuple[Run, dict[str, Any]]:
    """The run, and the table's rows but those of the comparison."""
    tokens = document_tokens(options.model, NUM_DOCUMENTS * options.max_model_len * 2)
    traffic = Traffic(
        tokens,
        options.max_model_len,
        MAX_BATCHED_TOKENS,
        # vLLM's CPU runner takes wrong tokens for greedy ones where drafts and random requests
        # share a step, and fails on a seeded request whose prompt is cut into steps
        has_random=options.gpu or not drafts,
        has_seeds=options.gpu,
        seed=options.seed,
    )
    given = common_options(options) + server_options(options, drafts)
    async with serve(options.model, *given) as server:
        minutes = options.minutes / len(options.drafts)
        run = Run(server, traffic, minutes, options.gpu, options.gpu and not options.shared_gpu)
        await run.go()
        if run.has_crashed():
            raise Failure("\n".join([*run.problems, server.end_of_log()]))
        counts = {
            "preemptions": await server.sum_of("num_preemptions_total"),
            "prefix hits, tokens": await server.sum_of("prefix_cache_hits_total"),
            "drafts accepted": await server.sum_of("spec_decode_num_accepted_tokens_total"),
        }
    first, last = run.memory[1], run.memory[-1]
    if last > MAX_GROWTH * first + SPARE_MIB:
        run.problems.append(f"memory grew from {first} to {last} MiB")
    return run, rows(run, drafts) | counts


def rows(run: Run, drafts: int) -> dict[str, Any]:
    sent = run.sent
    lengths = [len(request.prompt) for request in sent if not request.is_refused]
    return {
        "drafts": drafts,
        "minutes": round((time.monotonic() - run.begin) / 60, 1),
        "requests": len(sent),
        "prompts, tokens": f"{min(lengths)} to {max(lengths)}",
        "output tokens": run.tokens,
        "streamed": sum(r.streams for r in sent),
        "connections dropped": sum(r.drop_after is not None for r in sent),
        "of these midway": sum(r.left_midway for r in sent),
        "with logprobs": sum("logprobs" in r.options for r in sent),
        "several answers": sum("n" in r.options for r in sent),
        "random": sum(r.options["temperature"] > 0 for r in sent),
        "seeded": sum("seed" in r.options for r in sent),
        "structured": sum(r.form is not None for r in sent),
        "too long, refused": sum(r.is_refused for r in sent),
        "prefix cache resets": run.resets,
        "sleeps and wakes": run.pauses,
        "memory, MiB": " ".join(map(str, run.memory)),
    }


async def compare(options: argparse.Namespace, runs: list[Run]) -> list[dict[str, Any]]:
    """The same greedy requests to the default backend, which has room: rows for each run. Where it
    finds a token too unlikely, its rounding may be why: then it is asked in float32, too."""
    given = common_options(options)
    if not options.gpu:  # where pages have 128 tokens
        given += ["--num-gpu-blocks-override", str(max(64, 4 * options.max_model_len // 128))]
    asked = [pair for run in runs for pair in run.greedy]
    verdicts = await judge_all(options.model, given, asked)
    own = max((verdict.own for verdict in verdicts), default=0.0)
    near_tie = max(options.near_tie, own)
    if suspects := [place for place, v in enumerate(verdicts) if (v.gap or 0) > near_tie]:
        exact = [*given, "--dtype", "float32"]
        found = await judge_all(options.model, exact, [asked[place] for place in suspects])
        for place, other in zip(suspects, found, strict=True):
            verdicts[place].gap = min(verdicts[place].gap, other.gap or 0.0)  # None: as we did
    rows = []
    for run in runs:
        found, verdicts = verdicts[: len(run.greedy)], verdicts[len(run.greedy) :]
        rows.append(compared_rows(run, found, near_tie) | {"the default's own": f"{own:.3f}"})
    return rows


def compared_rows(run: Run, verdicts: list[Verdict], near_tie: float) -> dict[str, Any]:
    gaps = [verdict.gap for verdict in verdicts]
    near = sorted(gap for gap in gaps if gap is not None and gap <= near_tie)
    wrong = 0
    for (request, answer), found in zip(run.greedy, gaps, strict=True):
        if found is not None and found > near_tie:
            wrong += 1
            what = f"prompt of {len(request.prompt)}, {request.form or request.options}"
            run.problems.append(
                f"a token of {len(answer.tokens)} is {found:.3f} too unlikely: {what}"
            )
    return {
        "compared": len(gaps),
        "near ties": " ".join([str(len(near)), *(f"{gap:.3f}" for gap in near[-3:])]),
        "mismatches": wrong,
    }


async def soak(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """A table's column for each number of drafts, and what is wrong."""
    runs, columns = [], []
    for drafts in options.drafts:
        run, column = await send_traffic(options, drafts)
        runs.append(run)
        columns.append(column)
    crashes = [len(run.problems) for run in runs]
    found = await compare(options, runs)
    columns = [
        column | {"crashes and wrong replies": count} | more
        for column, count, more in zip(columns, crashes, found, strict=True)
    ]
    return columns, [problem for run in runs for problem in run.problems]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--minutes", type=float, default=3.0, help="how long requests are sent")
    parser.add_argument("--drafts", type=int, nargs="+", default=[0], help="a server for each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--page-size", type=int, help="64 on a GPU, else 16: more preemptions")
    parser.add_argument(
        "--backend", default="FFA_FP8FP8", help="that takes the traffic: whose fault is it?"
    )
    parser.add_argument("--options", type=json.loads, default=EXACT, help="of FFA_FP8FP8, JSON")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and graphs")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.3)
    parser.add_argument(
        "--shared-gpu", action="store_true", help="others use the GPU: do not judge its memory"
    )
    parser.add_argument("--near-tie", type=float, default=NEAR_TIE)
    parser.add_argument("--json", type=Path, help="writes the table to this file")
    options = parser.parse_args()
    options.gpu = Path("/dev/nvidiactl").exists()
    options.page_size = options.page_size or (64 if options.gpu else 16)
    options.eager |= not options.gpu  # compiling takes longer than it saves there
    try:
        columns, problems = asyncio.run(soak(options))
    except Failure as failure:
        columns, problems = [{"crashes and wrong replies": 1}], [str(failure)]
    width = max(map(len, columns[0]))
    for name in columns[0]:
        print(f"| {name:<{width}} | {' | '.join(str(column[name]) for column in columns)} |")
    print(*problems, sep="\n")
    if options.json:
        options.json.write_text(json.dumps({"columns": columns, "problems": problems}))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())

"""What a server answered to a request, and whether another's answer is as right."""

import asyncio
import contextlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from soaking.server import Failure, Server, serve
from soaking.traffic import FORMS, TOP, Request

PATH = "/v1/completions"
COMPARED_AT_ONCE = 8
CLOSE = 1.0
"""Logprobs of tokens that lie further apart say little of what rounding can change."""


@dataclass
class Answer:
    """One choice: its tokens and, where they were asked for, the best tokens' logprobs."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    best: list[dict[int, float]] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, choice: dict[str, Any]) -> None:
        self.tokens += choice.get("token_ids") or []
        self.text += choice.get("text") or ""
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        for step in (choice.get("logprobs") or {}).get("top_logprobs") or []:
            self.best.append({int(k.removeprefix("token_id:")): v for k, v in step.items()})


async def ask(server: Server, request: Request) -> list[Answer]:
    """Its choices, none where the client dropped the connection or was rightly refused; raises
    Failure for any answer that is none."""
    answers = [Answer() for _ in range(request.options.get("n", 1))]
    if request.streams:
        async for chunk in server.stream(PATH, request.body, request.drop_after):
            for choice in chunk.get("choices", []):
                answers[choice["index"]].add(choice)
    else:
        status, body = await server.post(PATH, request.body)
        if status != (400 if request.is_refused else 200):
            raise Failure(f"{status} for {len(request.prompt)} tokens: {body}")
        for choice in body.get("choices", []):
            answers[choice["index"]].add(choice)
    if request.drop_after or request.is_refused:
        request.left_midway = bool(request.drop_after and not answers[0].finish_reason)
        return []
    for answer in answers:
        check(request, answer)
    return answers


def check(request: Request, answer: Answer) -> None:
    most = request.options["max_tokens"]
    if answer.finish_reason not in ("stop", "length") or not 0 < len(answer.tokens) <= most:
        raise Failure(f"{len(answer.tokens)} tokens, finished by {answer.finish_reason}")
    if request.options["ignore_eos"] and len(answer.tokens) != most:
        raise Failure(f"{len(answer.tokens)} tokens of {most}")
    if "logprobs" in request.options and len(answer.best) != len(answer.tokens):
        raise Failure(f"logprobs of {len(answer.best)} of {len(answer.tokens)} tokens")
    if request.form and answer.finish_reason == "stop":
        if not has_form(request.form, answer.text.strip()):
            raise Failure(f"no {request.form}: {answer.text!r}")


def has_form(form: str, text: str) -> bool:
    rule = FORMS[form]
    if form == "regex":
        return re.fullmatch(rule["regex"], text) is not None
    if form == "choice":
        return text in rule["choice"]
    with contextlib.suppress(json.JSONDecodeError):
        return list(json.loads(text)) == rule["json"]["required"]
    return False


@dataclass
class Verdict:
    """How another server judges an answer, in logprobs.

    `gap`: how much less likely our first other token is than the one that it takes there; None
    where all are the same, infinite where ours is not among its best. `own`: how much closer or
    further apart it finds the best two tokens of a place where they are CLOSE when what precedes is
    a prompt than when it decodes. It rounds otherwise then, so two right answers may be as far
    apart.
    """

    gap: float | None
    own: float


async def judge(server: Server, request: Request, ours: Answer) -> Verdict:
    """By `server`'s answer to the same request. A token is as likely as in the kinder of its two
    readings."""
    options = request.options | {"logprobs": TOP}
    (theirs,) = await ask(server, Request(request.prompt, options, form=request.form))
    parted = place = first_difference(ours.tokens, theirs.tokens)
    leads = [lead(*pair, rival(*pair)) for pair in zip(theirs.best, theirs.tokens, strict=True)]
    if parted is None:
        place = leads.index(min(leads))
    elif parted == min(len(ours.tokens), len(theirs.tokens)):
        return Verdict(float("inf"), 0.0)
    again = Request(request.prompt + theirs.tokens[:place], options | {"max_tokens": 1})
    (read,) = await ask(server, again)
    readings, taken = (theirs.best[place], read.best[0]), theirs.tokens[place]
    own = abs(leads[place] - lead(readings[1], taken, rival(readings[0], taken)))
    own = own if abs(leads[place]) < CLOSE and own < float("inf") else 0.0
    if parted is None:
        return Verdict(None, own)
    return Verdict(min(max(0.0, lead(b, taken, ours.tokens[place])) for b in readings), own)


async def judge_all(
    model: str, given: list[str], asked: list[tuple[Request, Answer]]
) -> list[Verdict]:
    """Of each, beside a server of the model with such options."""
    free = asyncio.Semaphore(COMPARED_AT_ONCE)

    async def verdict_of(request: Request, answer: Answer) -> Verdict:
        async with free:
            return await judge(server, request, answer)

    async with serve(model, *given) as server:
        return await asyncio.gather(*(verdict_of(*pair) for pair in asked))


def first_difference(tokens: list[int], others: list[int]) -> int | None:
    """Where lists part, or the shorter one ends; None where they are the same."""
    pairs = enumerate(zip(tokens, others, strict=False))
    parted = next((place for place, (one, other) in pairs if one != other), None)
    if parted is None and len(tokens) != len(others):
        return min(len(tokens), len(others))
    return parted


def rival(best: dict[int, float], token: int) -> int:
    """The likeliest of the others."""
    return max((other for other in best if other != token), key=best.__getitem__, default=token)


def lead(best: dict[int, float], token: int, other: int) -> float:
    """Of the first over the other, infinite where one is not among the best."""
    if token not in best or other not in best:
        return float("inf")
    return best[token] - best[other]

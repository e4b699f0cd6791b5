"""Requests of all lengths and kinds, some with the start of others, in any order."""

from dataclasses import dataclass, field
from random import Random
from typing import Any

NUM_DOCUMENTS = 2
BURST = 8
TOP = 20
"""Tokens a place whose logprobs are asked for."""
FORMS: dict[str, dict[str, Any]] = {
    "regex": {"regex": "code [0-9]{5}"},
    "choice": {"choice": ["kept", "skipped", "drawn"]},
    "json": {
        "json": {
            "type": "object",
            "properties": {"kept": {"type": "boolean"}, "rule": {"enum": ["threshold", "share"]}},
            "required": ["kept", "rule"],
            "additionalProperties": False,
        }
    },
}


@dataclass
class Request:
    """`drop_after`: chunks of the stream after which the client is gone; None: it stays. `form`:
    which of FORMS the answer has. `left_midway`: whether the client was gone before the end."""

    prompt: list[int]
    options: dict[str, Any]
    streams: bool = False
    drop_after: int | None = None
    form: str | None = None
    is_refused: bool = False
    left_midway: bool = False

    @property
    def body(self) -> dict[str, Any]:
        """For /v1/completions."""
        ids = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        form = {"structured_outputs": FORMS[self.form]} if self.form else {}
        return {"model": "model", "prompt": self.prompt} | ids | form | self.options

    @property
    def is_compared(self) -> bool:
        return self.options["temperature"] == 0 and not (self.drop_after or self.is_refused)


@dataclass
class Traffic:
    """`tokens`: of the documents. `has_random`, `has_seeds`: whether requests that are not greedy,
    and seeded ones, may run beside others."""

    tokens: list[int]
    max_model_len: int
    max_batched_tokens: int
    has_random: bool
    has_seeds: bool
    seed: int
    pick: Random = field(init=False)

    def __post_init__(self):
        self.pick = Random(self.seed)

    def burst(self) -> int:
        """How many requests come at once."""
        return self.pick.choice([1] * 8 + [2, 3, BURST])

    def pause(self) -> float:
        """Seconds until the next come."""
        return self.pick.expovariate(4)

    def prompt(self, longest: int) -> list[int]:
        pick = self.pick
        some = (int(longest ** pick.random()), pick.randint(longest // 8, longest // 2), longest)
        (length,) = pick.choices(some, (4, 5, 1))
        if pick.random() < 0.6:  # the start of a document that others start with, too
            start = pick.randrange(NUM_DOCUMENTS) * self.max_model_len
        else:
            start = pick.randrange(len(self.tokens) - length)
        return self.tokens[start : start + length]

    def request(self) -> Request:
        pick = self.pick
        max_tokens = pick.choice([1, 8, 24, 48, 128])
        prompt = self.prompt(self.max_model_len - max_tokens)
        options = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        request = Request(prompt, options, streams=pick.random() < 0.6)
        kind = pick.random()
        if kind < 0.3:
            options["logprobs"] = TOP
        elif kind < 0.4:
            options |= {"ignore_eos": False, "stop": ["\n\n", "def "]}
        elif kind < 0.5:
            request.form = pick.choice(list(FORMS))
            request.prompt = prompt[: self.max_model_len - 48]
            options |= {"ignore_eos": False, "max_tokens": 48}
        elif kind < 0.52:
            request.prompt = self.tokens[: self.max_model_len + 1]
            request.is_refused, request.streams = True, False
        elif kind < 0.62 and self.has_random:
            options |= {"temperature": 1.0, "n": 2}
        elif kind < 0.72 and self.has_random:
            options |= {"temperature": 0.8, "top_p": 0.9, "logprobs": TOP}
            if self.has_seeds:
                options["seed"] = pick.randrange(1 << 20)
        if request.streams and pick.random() < 0.4:
            request.drop_after = pick.randrange(1, max_tokens + 1)
        return request

    def seeded(self) -> list[Request]:
        """Two alike that fit a step together."""
        longest = min(self.max_model_len, self.max_batched_tokens) // 2 - 16
        options = {"max_tokens": 8, "temperature": 1.0, "ignore_eos": True}
        options |= {"seed": self.pick.randrange(1 << 20), "logprobs": TOP}
        prompt = self.prompt(longest)
        return [Request(prompt, dict(options)) for _ in range(2)]

"""The soak: what it sends and what it takes for wrong; on a GPU minutes of it."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import GPU
from processes import MODEL, environment

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from soaking.answers import Answer, ask, first_difference, has_form, judge  # noqa: E402
from soaking.server import Failure  # noqa: E402
from soaking.traffic import FORMS, Request, Traffic  # noqa: E402

LONGEST = 300


def traffic(**changes) -> Traffic:
    options = {"has_random": True, "has_seeds": True, "seed": 1} | changes
    return Traffic(list(range(4 * LONGEST)), LONGEST, 512, **options)


def test_traffic_has_all_kinds_up_to_the_models_limit():
    some = traffic()
    requests = [some.request() for _ in range(600)]
    bodies = [request.body for request in requests]
    for name in ("logprobs", "stop", "structured_outputs", "n", "seed", "top_p"):
        assert 10 < sum(name in body for body in bodies) < 300, name
    assert {request.form for request in requests} == {None, *FORMS}
    assert 50 < sum(request.drop_after is not None for request in requests) < 200
    for request, body in zip(requests, bodies, strict=True):
        assert request.drop_after is None or request.streams
        total = len(request.prompt) + body["max_tokens"]
        assert (total > LONGEST) == request.is_refused
    lengths = [len(request.prompt) for request in requests if not request.is_refused]
    assert min(lengths) == 1 and max(lengths) == LONGEST - 1
    starts = [tuple(request.prompt[:20]) for request in requests if len(request.prompt) >= 20]
    assert len(set(starts)) < len(starts) / 2  # prefixes are shared


def test_a_cpu_gets_nothing_random_beside_drafts():
    some = traffic(has_random=False)
    assert all(some.request().options["temperature"] == 0 for _ in range(300))
    one, other = some.seeded()
    assert one == other and one.body["seed"] is not None


class Canned:
    """Answers in turn, of one choice each."""

    def __init__(self, *choices: dict, status: int = 200):
        self.choices, self.status = list(choices), status

    async def post(self, path: str, body: dict) -> tuple[int, dict]:
        choice = {"index": 0, "text": "", "finish_reason": "length"} | self.choices.pop(0)
        return self.status, {"choices": [choice]}


def choice(tokens: list[int], *best: dict[int, float]) -> dict:
    steps = [{f"token_id:{token}": logprob for token, logprob in step.items()} for step in best]
    return {"token_ids": tokens, "logprobs": {"top_logprobs": steps}}


def request(max_tokens: int, **options) -> Request:
    sampling = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return Request([1, 2], sampling | options)


def judged(tokens: list[int], *choices: dict) -> tuple[float | None, float]:
    verdict = asyncio.run(judge(Canned(*choices), request(2), Answer(tokens)))
    return verdict.gap, verdict.own


def test_a_token_is_as_likely_as_in_the_kinder_of_two_readings():
    decoded = choice([5, 6], {5: -0.1, 9: -3.0}, {6: -0.5, 7: -0.7})
    read = choice([6], {6: -0.6, 7: -0.61})
    assert judged([5, 7], decoded, read) == (pytest.approx(0.01), pytest.approx(0.19))
    assert judged([5, 7], decoded, choice([6], {6: -0.1})) == (pytest.approx(0.2), 0.0)
    assert judged([5, 8], decoded, read)[0] == float("inf")
    assert judged([5], decoded) == (float("inf"), 0.0)


def test_equal_answers_show_what_rounding_does_where_it_matters_most():
    decoded = choice([5, 6], {5: -0.1, 9: -3.0}, {6: -0.5, 7: -0.7})
    assert judged([5, 6], decoded, choice([7], {7: -0.5, 6: -0.6})) == (None, pytest.approx(0.3))
    decided = choice([5, 6], {5: -0.1, 9: -3.0}, {6: -0.5, 7: -1.6})
    assert judged([5, 6], decided, choice([6], {6: -0.1, 7: -2.0})) == (None, 0.0)


def test_parted_answers():
    assert first_difference([1, 2], [1, 2, 3]) == 2


@pytest.mark.parametrize("answered, asked", [
    (choice([5]), request(2)),
    ({"token_ids": [5, 6], "finish_reason": "abort"}, request(2)),
    (choice([5, 6], {5: -0.1}), request(2, logprobs=1)),
])  # fmt: skip
def test_half_an_answer_is_a_failure(answered, asked):
    with pytest.raises(Failure):
        asyncio.run(ask(Canned(answered), asked))


def test_what_is_too_long_has_to_be_refused():
    too_long = request(2)
    too_long.is_refused = True
    with pytest.raises(Failure, match="200 for 2 tokens"):
        asyncio.run(ask(Canned(choice([5, 6])), too_long))
    assert asyncio.run(ask(Canned({}, status=400), too_long)) == []


@pytest.mark.parametrize("form, right, wrong", [
    ("regex", "code 12345", "code 1234"),
    ("choice", "kept", "keep"),
    ("json", '{"kept": true, "rule": "share"}', '{"kept": true}'),
])  # fmt: skip
def test_forms(form, right, wrong):
    assert has_form(form, right) and not has_form(form, wrong)


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize("drafts", ["0", "4", "7"])
def test_two_minutes_of_traffic_on_a_gpu(tmp_path, drafts):
    file = tmp_path / "table.json"
    command = [sys.executable, SCRIPTS / "soak.py", "--model", MODEL, "--json", file]
    command += ["--minutes", "2", "--max-model-len", "20000", "--drafts", drafts]
    command += ["--shared-gpu", "--gpu-memory-utilization", str(GPU["gpu_memory_utilization"])]
    process = subprocess.run(command, env=environment(), capture_output=True, text=True)
    print(process.stdout[-6000:])
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-3000:]
    (column,) = json.loads(file.read_text())["columns"]
    for name in ("preemptions", "prefix hits, tokens", "sleeps and wakes", "structured", "seeded"):
        assert column[name] > 0, name

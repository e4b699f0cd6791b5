"""Whether answers are right: the codes asked for, or another backend's greedy tokens; and whether
drafts were verified as they should be."""

from typing import Any

from jobs import NUM_DRAFTS
from processes import Run

from vllm_ffa_fp8fp8.commands.demo_prompts import Question

NEAR_TIE = 0.05  # between the best logits
NOISE = 0.15  # of the best token's logprob


def check_codes(answers: list[dict[str, Any]], questions: list[Question]) -> None:
    wrong = [
        f"{question.word}: {answer['text']!r} is not {question.code}"
        for question, answer in zip(questions, answers, strict=True)
        if not question.is_answered_by(answer["text"])
    ]
    assert not wrong


def check_same_tokens(run: Run, expected: Run, near_tie: float = NEAR_TIE) -> None:
    """Every answer of `run` is the one of `expected` up to a near tie, which is printed, with
    nearly the same logprobs."""
    for answers, references in zip(run.batches, expected.batches, strict=True):
        for answer, reference in zip(answers, references, strict=True):
            check_same_answer(answer, reference, near_tie)


def check_same_answer(
    answer: dict[str, Any], reference: dict[str, Any], near_tie: float = NEAR_TIE
) -> None:
    length = answer["num_prompt_tokens"]
    assert length == reference["num_prompt_tokens"]
    place = first_difference(answer["tokens"], reference["tokens"])
    for best, reference_best in list(zip(answer["best"], reference["best"], strict=False))[:place]:
        assert abs(best[0][0] - reference_best[0][0]) < NOISE, (length, best, reference_best)
    if place is None:
        assert len(answer["tokens"]) == len(reference["tokens"])
        return
    ours, theirs = (
        f"{run['tokens'][place]} (the best, with logprobs: {run['best'][place]})"
        for run in (answer, reference)
    )
    difference = f"prompt of {length} tokens: output token {place} is {ours} instead of {theirs}"
    print(difference)
    (best, _), *_ = reference["best"][place]
    near = [token for logprob, token in reference["best"][place] if best - logprob <= near_tie]
    assert answer["tokens"][place] in near, difference


def first_difference(tokens: list[int], reference: list[int]) -> int | None:
    pairs = enumerate(zip(tokens, reference, strict=False))
    return next((place for place, (ours, theirs) in pairs if ours != theirs), None)


def check_drafts_are_decoded(run: Run) -> None:
    """Several query tokens a request, and fewer for some than for others of their step. No request
    is too short for decode and yet a prefill, once it is past its prompt."""
    most = 1 + NUM_DRAFTS
    assert run.facts["accepted_tokens"] > 0
    assert run.decode_query_lens.count(most) > 5
    assert max(max(decodes) for decodes, _ in run.decode_steps) == most
    assert all(query_len > most for _, prefills in run.decode_steps for query_len in prefills)
    uneven = [decodes for decodes, _ in run.decode_steps if len({*decodes} - {0}) > 1]
    assert len(uneven) > 5, run.decode_steps

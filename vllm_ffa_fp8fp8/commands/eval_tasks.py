"""What lm-eval's tasks in configs/lm_eval ask, made from text that is on every machine, and how
answers are scored.

A dataset's function gets the task's `metadata` and lm-eval's `model_args`; a document names the
length whose score it counts for.
"""

import functools
import importlib.metadata
import random
import re
from collections.abc import Callable, Iterable
from typing import Any

from vllm_ffa_fp8fp8.commands.demo_model import max_positions, model_folder, token_counter
from vllm_ffa_fp8fp8.commands.demo_prompts import (
    NOTE,
    QUESTION,
    draw_words,
    hide,
    is_code,
    lines_that_fit,
    make_questions,
    source_lines,
)

NOTES = 10
LOOKALIKES = 3
DISPUTED = 4
"""Words of a text whose codes most of their notes agree about."""
AGREEING, OTHERS = 8, 4
"""Notes of such a word."""
ITEMS = 24
ITEM = '    "{}",\n'
ANSWER_ROOM = 192
"""Tokens after a prompt, more than what the tasks' `max_gen_toks` say."""
MARGIN = 0.005
"""Fraction of a length that prompts are aimed below it."""
LEAST_PROSE = 2_000
"""Characters of a description that is more than a note."""

CountTokens = Callable[[str], int]
Document = dict[str, Any]
Make = Callable[[int, CountTokens, float, int], Iterable[Document]]
"""Documents of about so many tokens, of text from a fraction of all on, and a seed."""


def retrieval(**arguments: Any) -> dict[str, Any]:
    return dataset(functools.partial(ask_codes, lookalikes=0), **arguments)


def distractors(**arguments: Any) -> dict[str, Any]:
    return dataset(functools.partial(ask_codes, lookalikes=LOOKALIKES), **arguments)


def majority(**arguments: Any) -> dict[str, Any]:
    return dataset(ask_majority, **arguments)


def repetition(**arguments: Any) -> dict[str, Any]:
    return dataset(ask_list, **arguments)


def source(**arguments: Any) -> dict[str, Any]:
    return dataset(functools.partial(cut_text, lines=source_lines()), **arguments)


def prose(**arguments: Any) -> dict[str, Any]:
    return dataset(functools.partial(cut_text, lines=prose_lines()), **arguments)


def dataset(
    make: Make,
    lengths: Iterable[int],
    texts: int,
    pretrained: str = "",
    tokenizer: str = "",
    max_model_len: int | None = None,
    max_length: int | None = None,
    **others: Any,
) -> dict[str, Any]:
    """A `test` split of `texts` texts a length, of the lengths that the model takes. Raises
    ValueError where it takes none."""
    from datasets import Dataset

    model = tokenizer or pretrained
    if not model:
        raise ValueError("Name the model, whose tokens are counted: --model_args pretrained=MODEL")
    folder = model_folder(model)
    most = max_model_len or max_length or max_positions(folder)
    fitting = fitting_lengths(lengths, most)
    count = token_counter(folder)
    documents = []
    for seed in range(texts):
        asked = [of_length(make, length, count, seed / texts, seed) for length in fitting]
        for row in zip(*asked, strict=True):  # the first few are of all lengths
            named = zip(fitting, row, strict=True)
            documents += [{"length": str(length)} | document for length, document in named]
    return {"test": Dataset.from_list(documents)}


def of_length(
    make: Make, tokens: int, count: CountTokens, begin: float, seed: int
) -> Iterable[Document]:
    """Made twice: lines are counted one by one, which are fewer tokens together."""
    first = next(iter(make(tokens, count, begin, seed)))["prompt"]
    return make(int(tokens * (2 - MARGIN)) - count(first), count, begin, seed)


def fitting_lengths(lengths: Iterable[int], most: float) -> list[int]:
    """The lengths of prompts that a model of `most` tokens takes. Raises ValueError."""
    lengths = sorted(lengths)
    fitting = [length for length in lengths if length + ANSWER_ROOM <= most]
    if not fitting:
        raise ValueError(
            f"The shortest prompt, {lengths[0]:,} tokens and {ANSWER_ROOM} for the answer, is too "
            f"long for the model, which takes {most:,}: give shorter lengths"
        )
    return fitting


def ask_codes(
    tokens: int, count: CountTokens, begin: float, seed: int, lookalikes: int
) -> Iterable[Document]:
    """A question for each of the codes in one file, which begins at the fraction `begin` of the
    source; in an order in which the first few ask all over it."""
    questions = make_questions(
        tokens,
        count,
        asked=NOTES,
        notes=NOTES,
        seed=seed,
        lookalikes=lookalikes,
        first_line=int(begin * len(source_lines())),
    )
    random.Random(seed).shuffle(questions)
    return ({"prompt": question.prompt, "answer": question.code} for question in questions)


def ask_majority(tokens: int, count: CountTokens, begin: float, seed: int) -> Iterable[Document]:
    """A question for each of a few words, which stand in many notes: most have one code, the others
    one with another end. So no block has a large share of what decides about the end."""
    rng = random.Random(seed)
    words, codes, notes = draw_words(DISPUTED, rng), [], []
    for word in words:
        digits = "".join(rng.sample("0123456789", 7))
        codes.append(digits[:5])
        notes += [NOTE.format(word=word, code=digits[:5])] * AGREEING
        notes += [NOTE.format(word=word, code=digits[:3] + digits[5:])] * OTHERS
    rng.shuffle(notes)
    room = tokens - sum(map(count, notes)) - count(QUESTION.format(word=words[0]))
    lines = lines_that_fit(room, count, int(begin * len(source_lines())))
    depths = [(place + rng.random()) / len(notes) for place in range(len(notes))]
    file = hide(list(zip(depths, notes, strict=True)), lines)
    for word, code in zip(words, codes, strict=True):
        yield {"prompt": file + QUESTION.format(word=word), "answer": code}


def ask_list(tokens: int, count: CountTokens, begin: float, seed: int) -> Iterable[Document]:
    """A list ahead of a long file, and its first item again behind it."""
    words = draw_words(ITEMS, random.Random(seed))
    first, *others = (ITEM.format(word) for word in words)
    head, tail = f"WORDS = [\n{first}{''.join(others)}]\n\n\n", f"\n\nWORDS = [\n{first}"
    room = tokens - count(head) - count(tail)
    filling = lines_that_fit(room, count, int(begin * len(source_lines())))
    yield {"prompt": head + "".join(filling) + tail, "answer": "".join(others)}


def cut_text(
    tokens: int, count: CountTokens, begin: float, seed: int, lines: list[str]
) -> Iterable[Document]:
    text = "".join(lines_that_fit(tokens, count, int(begin * len(lines)), lines))
    yield {"prompt": text, "tokens": count(text)}


@functools.cache
def prose_lines() -> list[str]:
    """The descriptions of the installed packages, one after another. Raises ValueError where there
    are none."""
    packages = sorted(importlib.metadata.distributions(), key=lambda package: package.name or "")
    texts = dict.fromkeys(package.metadata.get_payload() for package in packages)
    lines = [
        line
        for text in texts
        if isinstance(text, str) and len(text) >= LEAST_PROSE
        for line in text.splitlines(keepends=True)
    ]
    if not lines:
        raise ValueError("no installed package has a description to read")
    return lines


def code_score(document: Document, answers: list[str]) -> dict[str, float]:
    return {document["length"]: float(is_code(document["answer"], answers[0]))}


def list_score(document: Document, answers: list[str]) -> dict[str, float]:
    """The fraction of the items that are right, each at its place."""
    wanted, found = (re.findall(r'"(\w+)"', text) for text in (document["answer"], answers[0]))
    right = sum(item == other for item, other in zip(wanted, found, strict=False))
    return {document["length"]: right / len(wanted)}


def loss_score(document: Document, log_likelihoods: list[float]) -> dict[str, float]:
    """Nats a token."""
    return {document["length"]: -log_likelihoods[0] / document["tokens"]}

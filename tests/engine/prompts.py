"""Prompts of exact lengths, and questions whose answers are known."""

import functools

from processes import MODEL
from tokenizers import Tokenizer

from vllm_ffa_fp8fp8.commands.demo_prompts import Question, make_questions, source_lines


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def count_tokens(text: str) -> int:
    return len(tokenizer().encode(text).ids)


@functools.cache
def source_tokens() -> tuple[int, ...]:
    """About 60,000 tokens of Python source."""
    return tuple(tokenizer().encode("".join(source_lines()[:5000])).ids)


def source_prompt(length: int, start: int = 0) -> list[int]:
    tokens = list(source_tokens()[start : start + length])
    assert len(tokens) == length
    return tokens


def questions(length: int, asked: int) -> list[Question]:
    """Prompts of about `length` tokens, which differ in their last line only."""
    return make_questions(length, count_tokens, asked=asked, seed=length)


def recall_prompts(length: int, asked: int) -> list[list[int]]:
    """The tokens of `questions`: unlike plain source, they need what lies far back."""
    return [tokenizer().encode(question.prompt).ids for question in questions(length, asked)]

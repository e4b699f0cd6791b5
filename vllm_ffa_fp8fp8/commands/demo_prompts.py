"""Questions with known answers: codes hidden in a long file of Python's own source."""

import functools
import random
import re
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
NOTE = "# note: the code of {word} is {code}.\n"
QUESTION = "\n# recall: the code of {word} is"


@dataclass(frozen=True)
class Question:
    prompt: str
    word: str
    code: str
    depth: float  # where the note stands: 0 is the prompt's first line, 1 its last

    def is_answered_by(self, answer: str) -> bool:
        return is_code(self.code, answer)


def is_code(code: str, answer: str) -> bool:
    """Whether the answer's first word is the code, with or without its full stop."""
    return re.match(rf"\s*{code}\.?(\s|$)", answer) is not None


@functools.cache
def source_lines() -> list[str]:
    """The standard library's top-level modules, one after another."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))
    return [line for path in modules for line in path.read_text("utf-8").splitlines(keepends=True)]


def make_questions(
    tokens: int,
    count_tokens: Callable[[str], int],
    asked: int = 4,
    notes: int = 16,
    seed: int = 0,
    lookalikes: int = 0,
    first_line: int = 0,
) -> list[Question]:
    """`asked` prompts of about `tokens` tokens, which differ in their last line only.

    Each note has `lookalikes` beside it: notes of words that differ from its own in a syllable,
    anywhere in the file. The file begins with the source's `first_line`. Raises ValueError.
    """
    if not 0 < asked <= notes:
        raise ValueError(f"asked={asked}: ask for 1 to {notes} codes, as many as there are notes")
    rng = random.Random(seed)
    words = draw_words(notes, rng)
    codes = [draw_code(rng) for _ in words]
    inserts = [NOTE.format(word=word, code=code) for word, code in zip(words, codes, strict=True)]
    others = [
        NOTE.format(word=word, code=draw_code(rng))
        for word in draw_lookalikes(words, lookalikes, rng)
    ]
    least = sum(map(count_tokens, inserts + others)) + count_tokens(QUESTION.format(word=words[0]))
    if tokens < least:
        raise ValueError(
            f"--tokens {tokens} is too short: the notes and the question alone take {least}"
        )
    lines = lines_that_fit(tokens - least, count_tokens, first_line)
    # One note in each of equal stretches of the file, anywhere in it, and none in its last tenth.
    depths = [0.9 * (place + rng.random()) / notes for place in range(notes)]
    places = list(zip(depths, inserts, strict=True)) + [(0.9 * rng.random(), o) for o in others]
    file = hide(places, lines)
    picks = [(2 * place + 1) * notes // (2 * asked) for place in range(asked)]
    return [
        Question(file + QUESTION.format(word=words[pick]), words[pick], codes[pick], depths[pick])
        for pick in picks
    ]


def hide(places: list[tuple[float, str]], lines: list[str]) -> str:
    """The lines with notes among them; a place is a depth, 0 to 1, and its note."""
    for depth, note in sorted(places, reverse=True):
        lines.insert(round(depth * len(lines)), note)
    return "".join(lines)


def draw_code(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(5))


def draw_words(count: int, rng: random.Random) -> list[str]:
    words: dict[str, None] = {}  # a set would not keep the order
    while len(words) < count:
        words["".join(rng.choice(SYLLABLES) for _ in range(3))] = None
    return list(words)


def draw_lookalikes(words: list[str], each: int, rng: random.Random) -> list[str]:
    """New words, `each` for a word, which differ from it in one syllable."""
    taken = dict.fromkeys(words)
    for word in words * each:
        other = word
        while other in taken:
            place = 2 * rng.randrange(3)
            other = word[:place] + rng.choice(SYLLABLES) + word[place + 2 :]
        taken[other] = None
    return list(taken)[len(words) :]


def lines_that_fit(
    tokens: int,
    count_tokens: Callable[[str], int],
    first_line: int = 0,
    lines: list[str] | None = None,
) -> list[str]:
    """As many of the `lines` (the source's) from `first_line` on, and from the first one behind the
    last one, as take that many tokens. Raises ValueError where they are too few."""
    lines = source_lines() if lines is None else lines
    first_line %= len(lines)
    fitting: list[str] = []
    for line in lines[first_line:] + lines[:first_line]:
        # A tokenizer joins a newline with the indentation after it.
        tokens -= count_tokens("\n" + line.rstrip("\n"))
        if tokens < 0:
            return fitting
        fitting.append(line)
    raise ValueError("the text at hand is too short for so many tokens: use fewer --tokens")

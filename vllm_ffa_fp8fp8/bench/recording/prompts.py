"""Prompts from the user's files, in the model's tokens."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

HIDDEN = ("steps", "all", "none")
"""Of which tokens hidden states are recorded."""


def read_prompts(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """Name and text of each prompt: a file's whole text, or each line of a .jsonl file, a JSON
    string or an object with "prompt" or "text". Raises ValueError."""
    prompts = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise ValueError(f"{path} cannot be read: {reason}") from error
        if path.suffix == ".jsonl":
            lines = list(filter(str.strip, text.splitlines()))
            prompts += [(f"{path}:{n}", _of_line(line, path, n)) for n, line in enumerate(lines, 1)]
        else:
            prompts.append((str(path), text))
    if empty := [name for name, text in prompts if not text.strip()]:
        raise ValueError(f"{empty[0]} has no text")
    if not prompts:
        raise ValueError(f"{', '.join(map(str, paths))}: no prompt in it")
    return prompts


def _of_line(line: str, path: Path, number: int) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        value = None
    if isinstance(value, dict):
        value = value.get("prompt", value.get("text"))
    if not isinstance(value, str):
        raise ValueError(
            f'{path}, line {number}: neither a JSON string nor an object with "prompt" or "text"'
        )
    return value


def cut_prompts(
    prompts: Sequence[tuple[str, str]],
    lengths: Sequence[int],
    encode: Callable[[str], list[int]],
) -> tuple[list[str], list[list[int]]]:
    """Sources and tokens: of each prompt its first N tokens for each N of `lengths`, or all of it
    without any. Raises ValueError for a text that is too short."""
    sources, tokens = [], []
    for name, text in prompts:
        ids = list(encode(text))
        for length in lengths or [len(ids)]:
            if len(ids) < length:
                raise ValueError(
                    f"{name} is too short: {len(ids):,} tokens, and --tokens asks for {length:,}"
                )
            sources.append(name)
            tokens.append(ids[:length])
    return sources, tokens

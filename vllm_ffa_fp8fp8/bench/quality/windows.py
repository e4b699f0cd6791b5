"""Windows of the user's texts, over which `calibrate` averages."""

from collections.abc import Sequence

from vllm_ffa_fp8fp8.bench.quality.plan import Texts

PAGE_STEP = 16
"""vLLM's pages are multiples of this."""


def cut_windows(
    texts: Sequence[tuple[str, list[int]]],
    opening: Sequence[int],
    *,
    count: int,
    tokens: int,
    last: int,
) -> Texts:
    """`count` windows of `tokens` tokens or one less, spread evenly over all texts, of which no
    two end in the same `last` tokens.

    Args:
        texts: name and tokens of each.
        opening: tokens that every text begins with, as windows will.

    Raises ValueError where a text is too short.
    """
    if (tokens - last - 1) % PAGE_STEP == 1:
        tokens -= 1  # a prompt of whole pages and one token, which would be decoded, pruned
    windows = Texts([], [])
    for number, (name, ids) in enumerate(texts):
        mine = count // len(texts) + (number < count % len(texts))
        needed = tokens + (mine - 1) * last
        if len(ids) < needed:
            raise ValueError(
                f"{name} is too short: {len(ids):,} tokens, and {mine} windows of {tokens:,} "
                f"need {needed:,} or, better, {mine * tokens:,}. Give more text, or fewer "
                "--tokens or --windows"
            )
        begin = list(ids[: len(opening)]) if list(ids[: len(opening)]) == list(opening) else []
        for window in range(mine):
            start = window * (len(ids) - tokens) // max(mine - 1, 1)
            windows.sources.append(f"{name} from token {start:,}")
            windows.tokens.append(begin + list(ids[start + len(begin) : start + tokens]))
    return windows

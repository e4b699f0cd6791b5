"""The model in float32, computed by transformers: the judge of runs in the model's own dtype.

Two backends that are both right round differently, and where two tokens are likely alike each may
choose another. How much is rounding depends on the CPU: so it is measured, on the default backend.
"""

import copy
import functools
from typing import Any

import torch
from processes import MODEL, Run
from transformers import AutoModelForCausalLM

MARGIN = 1.25


@functools.cache
def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@functools.cache
def read(folder: str, prompt: tuple[int, ...]) -> tuple[torch.Tensor, Any]:
    """Logits of the token after `prompt`, `[1, vocab_size]`, and the cache."""
    output = load(folder)(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    return output.logits[0], output.past_key_values


@torch.inference_mode()
def logprobs(folder: str, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Of every token after `prompt`, given those before it, `[len(tokens), vocab_size]`."""
    first, cache = read(folder, tuple(prompt))
    output = load(folder)(torch.tensor([tokens]), past_key_values=copy.deepcopy(cache))
    return torch.cat([first, output.logits[0, :-1]]).log_softmax(-1)


def errors(
    run: Run, batches: list[list[list[int]]], folder: str = str(MODEL)
) -> tuple[torch.Tensor, torch.Tensor]:
    """By how much the logprobs of the two best tokens are off, and by how much the tokens chosen
    are less likely than the best ones; natural units, over all answers of a run."""
    off, regret = [], []
    for prompts, answers in zip(batches, run.batches, strict=True):
        for prompt, answer in zip(prompts, answers, strict=True):
            exact = logprobs(folder, prompt, answer["tokens"])
            for row, token, best in zip(exact, answer["tokens"], answer["best"], strict=True):
                off += [logprob - float(row[other]) for logprob, other in best[:2]]
                regret.append(float(row.max() - row[token]))
    return torch.tensor(off), torch.tensor(regret)


def check_as_exact(run: Run, expected: Run, batches: list[list[list[int]]]) -> None:
    """`run` is as near to float32 as `expected`, and so are its tokens: none is worse than the
    best one by more than two logprobs of `expected` are off."""
    (ours, regret), (theirs, _) = errors(run, batches), errors(expected, batches)
    print(f"rms error {rms(ours):.4f} beside {rms(theirs):.4f}, regret {float(regret.max()):.4f}")
    assert rms(ours) <= MARGIN * rms(theirs)
    assert regret.max() <= 2 * theirs.abs().max()


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())

"""A logits processor that forces a text's tokens and compares their distributions in the worker:
whole distributions do not travel."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

PROCESSOR = "vllm_ffa_fp8fp8.bench.quality.judge:TextJudge"
EXTRA_ARG = "judged_text"
FIGURES = ("kl", "agrees", "loss")
"""Of a token: KL divergence from the reference, nats; 1 where both have the same best token, else
0; what the text's token costs, nats."""


@dataclass(frozen=True)
class JudgedText:
    """What one request is forced to say. Without `figures` it is not judged.

    Args:
        tokens: all tokens that the request generates. Prefill gives the first, which is not
            judged; decode gives the others.
        prompt_tokens: how many there are before them.
        figures: file of float64 `[len(tokens) - 1, len(FIGURES)]`, written.
        log_probs: file of float32 `[len(tokens) - 1, vocab_size]`, natural logarithms: the
            reference; written where `is_reference`.
    """

    tokens: list[int]
    prompt_tokens: int
    figures: str | None = None
    log_probs: str | None = None
    is_reference: bool = False

    def sampling_params(self) -> SamplingParams:
        return SamplingParams(
            temperature=0,
            max_tokens=len(self.tokens),
            ignore_eos=True,
            detokenize=False,
            extra_args={EXTRA_ARG: asdict(self)},
        )


class TextJudge(V1LogitsProcessor, V2LogitsProcessor):
    """For both of vLLM's model runners, whose interfaces differ."""

    def __init__(self, vllm_config: Any, *state: Any):
        self._requests: dict[int, _Request] = {}  # by row with V1, by slot with V2

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """V1: which requests the rows are of."""
        process_dict_updates(
            self._requests, batch_update, lambda params, _, output: _Request.of(params, output)
        )

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: which request has the slot."""
        request = _Request.of(sampling_params)
        self._requests.pop(req_idx, None)
        if request is not None:
            self._requests[req_idx] = request
        return request is not None

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        for row, request, index in self._rows(ctx):
            if index >= 0:  # not one of a prompt that is not all read yet
                request.judge(index, logits[row])
        return logits

    def _rows(self, ctx: Any) -> Iterator[tuple[int, "_Request", int]]:
        """Rows of logits, their requests, and which of its output tokens is due."""
        if ctx is None:
            for row, request in self._requests.items():
                yield row, request, len(request.output)
            return
        for row, slot in enumerate(ctx.idx_mapping_np.tolist()):
            if request := self._requests.get(slot):
                seq_len = int(ctx.seq_lens_upper_bound_np[row])  # exact without drafts
                yield row, request, seq_len - request.text.prompt_tokens


class _Request:
    def __init__(self, text: JudgedText, output: list[int] | None):
        self.text, self.output = text, output  # V1 adds to its list
        if text.figures is not None:
            rows = len(text.tokens) - 1
            mode = "r+" if text.is_reference else "r"
            self.figures = np.memmap(text.figures, np.float64, "r+").reshape(rows, -1)
            self.log_probs = np.memmap(text.log_probs, np.float32, mode).reshape(rows, -1)

    @classmethod
    def of(cls, params: SamplingParams, output: list[int] | None = None) -> "_Request | None":
        extra = (params.extra_args or {}).get(EXTRA_ARG)
        return None if extra is None else cls(JudgedText(**extra), output)

    def judge(self, index: int, logits: torch.Tensor) -> None:
        """Takes the figures of output token `index` from `logits`, float32 `[vocab_size]`, and
        leaves the text's token as the only one that can be sampled."""
        text, token = self.text, self.text.tokens[index]
        if text.figures is not None and index > 0:
            log_probs = log_softmax(logits)
            if text.is_reference:
                self.log_probs[index - 1] = log_probs.cpu().numpy()
            reference = torch.tensor(self.log_probs[index - 1], device=logits.device)
            kl, agrees = compare(reference, log_probs)
            self.figures[index - 1] = kl, agrees, -float(log_probs[token])
        logits.fill_(float("-inf"))
        logits[token] = 0.0


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Rounded to float32 at the end only, so that equal logits have a divergence of 0."""
    return logits.double().log_softmax(-1).float()


def compare(reference: torch.Tensor, log_probs: torch.Tensor) -> tuple[float, bool]:
    """KL divergence of `log_probs` from `reference`, natural logarithms `[vocab_size]`, in nats,
    and whether a best token of one is a best token of the other."""
    reference, log_probs = reference.double(), log_probs.double()
    terms = reference.exp() * (reference - log_probs)
    kl = terms.where(reference > float("-inf"), 0.0).sum()
    best = (reference == reference.max()) & (log_probs == log_probs.max())
    return float(kl), bool(best.any())

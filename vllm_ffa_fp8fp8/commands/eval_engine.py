"""`ffa-fp8fp8 eval`'s job in an engine's own process: tasks of lm-eval, a length at a time."""

from collections.abc import Callable
from importlib import resources
from typing import Any

from vllm_ffa_fp8fp8.integration.compat import backend_names

TASKS = "lm_eval"
"""The folder in configs/."""
TOGETHER = 50
"""Documents that are asked at a time: those of one text are next to each other, and find its pages
in the prefix cache."""


def evaluate(job: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """Scores of every part.

    Args:
        job: `llm` (arguments of lm-eval's model `vllm`), `parts` (`[task, length]` each), `limit`
            (documents of a part, or None for all), `texts` (of a part, or None for the task's).
    """
    tell("importing vLLM and lm-eval")
    from vllm.platforms import current_platform

    tell("loading the model")
    usual = {"enforce_eager": current_platform.is_cpu(), "disable_log_stats": True}
    model = model_class()(batch_size="auto", **usual | job["llm"])
    return {
        "backend": model.model.collective_rpc(backend_names)[0],
        "parts": [evaluate_part(model, job, part, tell) for part in job["parts"]],
    }


def model_class() -> type:
    """lm-eval's model `vllm`, which asks a few documents at a time: lm-eval sorts by length what it
    is given at once, and has the texts of all of it in use."""
    from lm_eval.models.vllm_causallms import VLLM

    class InTurn(VLLM):
        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            answers: list[str] = []
            for first in range(0, len(requests), TOGETHER):
                answers += super().generate_until(requests[first : first + TOGETHER], disable_tqdm)
            return answers

    return InTurn


def evaluate_part(
    model: Any, job: dict[str, Any], part: tuple[str, int], tell: Callable[[str], None]
) -> dict[str, Any]:
    """`scores` of a task at a length, a document each, `kept` of its decode steps (None where
    nothing was counted) and whether `higher_is_better`."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    task, length = part
    tell(f"{task}, {length:,} tokens")
    metadata = {key: job["llm"][key] for key in ("pretrained", "max_model_len")}
    if job["texts"] is not None:
        metadata["texts"] = job["texts"]
    manager = TaskManager(
        include_path=str(resources.files("vllm_ffa_fp8fp8.configs") / TASKS),
        include_defaults=False,
        metadata=metadata | {"lengths": [length]},
    )
    read_kept(model, job)
    result = simple_evaluate(
        model, tasks=[task], task_manager=manager, limit=job["limit"], bootstrap_iters=0
    )
    samples = sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
    return {
        "task": task,
        "length": length,
        "scores": [sample[str(length)] for sample in samples],
        "higher_is_better": result["higher_is_better"][task].get(str(length), True),
        "kept": read_kept(model, job),
    }


def read_kept(model: Any, job: dict[str, Any]) -> float | None:
    """Since the last reading."""
    if "worker_extension_cls" not in job["llm"]:
        return None
    from vllm_ffa_fp8fp8.attention.stats import sum_skip_stats

    return sum_skip_stats(model.model.collective_rpc("ffa_skip_stats"))["kept"]

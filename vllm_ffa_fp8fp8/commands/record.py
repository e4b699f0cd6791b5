"""`ffa-fp8fp8 record`: what a model's attention layers see on the user's prompts, on disk."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from vllm_ffa_fp8fp8.bench.recording.prompts import HIDDEN, read_prompts
from vllm_ffa_fp8fp8.commands.engine_options import run_with_engines
from vllm_ffa_fp8fp8.commands.engine_process import run_engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="a model's folder or name")
    add(
        "--prompts", required=True, nargs="+", type=Path, metavar="FILE",
        help="text files, a prompt each, or .jsonl files, a prompt a line",
    )  # fmt: skip
    add("--out", required=True, type=Path, metavar="DIR", help="folder for the recording")
    add(
        "--layers", type=layer_list, metavar="0,8,16",
        help="layers to record (default: all that FFA_FP8FP8 can run)",
    )  # fmt: skip
    add(
        "--steps", type=int, default=16, metavar="N",
        help="decode steps of each prompt (default: %(default)s)",
    )  # fmt: skip
    add(
        "--tokens", nargs="+", type=int, default=[], metavar="N",
        help="take only the first N tokens of each prompt; several N: each prompt at each length",
    )  # fmt: skip
    add(
        "--hidden", choices=HIDDEN, default="steps",
        help="of which tokens to keep the hidden states before the projection: decode steps, all "
        "(as large as the keys and values of many heads), or none (default: %(default)s)",
    )  # fmt: skip


def layer_list(text: str) -> list[int] | None:
    if text == "all":
        return None
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        layers = [-1]
    if min(layers) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not `all` or layers such as 0,8,16")
    return layers


def run(options: argparse.Namespace) -> int:
    return run_with_engines(lambda: record(options), lambda: what_is_kept(options.out))


def record(options: argparse.Namespace) -> int:
    """Raises ValueError for what the user can mend."""
    console = Console(highlight=False)
    result = watch(console, make_job(options))
    if result is None:
        tell(console, what_is_kept(options.out))
        return 1
    tell_result(console, options.out, result)
    return 0


def make_job(options: argparse.Namespace) -> dict[str, Any]:
    """What `record_layers` takes. Raises ValueError."""
    if options.steps < 1:
        raise ValueError(f"--steps is 1 or more, not {options.steps}: bench layers needs queries")
    if options.tokens and min(options.tokens) < 1:
        raise ValueError(f"--tokens is 1 or more, not {min(options.tokens)}")
    return {
        "model": options.model,
        "folder": str(options.out),
        "prompts": read_prompts(options.prompts),
        "lengths": options.tokens,
        "layers": options.layers,
        "steps": options.steps,
        "hidden": options.hidden,
        "llm": {},
    }


def watch(console: Console, job: dict[str, Any]) -> dict[str, Any] | None:
    """Runs the job in a process of its own and shows how far it is; its log only if it fails.
    Raises ValueError for what the user can mend."""
    from vllm_ffa_fp8fp8.bench.recording.engine import record_layers

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "vllm.log")
        bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
        try:
            with bar:
                task = bar.add_task("starting", total=None)
                for kind, value in run_engine(job, str(log), record_layers):
                    if kind == "result":
                        return value
                    bar.update(
                        task, description=value["text"],
                        completed=value.get("done", 0), total=value.get("of"),
                    )  # fmt: skip
                    if not console.is_terminal:
                        tell(console, value["text"])
        except RuntimeError as error:
            kind, _, text = str(error).partition(": ")
            if kind == "ValueError":
                raise ValueError(text) from error
            console.print(Text(log.read_text(errors="replace")[-6000:], style="dim"))
            console.print(Text.assemble(("recording failed", "red"), f": {error}"))
    return None


def what_is_kept(folder: Path) -> str:
    """Also removes what was being written."""
    from vllm_ffa_fp8fp8.bench.recording.store import Recording

    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)
    try:
        layers = Recording.open(folder).layers
    except ValueError:
        return f"No layer was finished, so {folder} holds none."
    names = ", ".join(map(str, layers))
    return f"{folder} keeps the finished layers: {names}. The same command records the others."


def tell_result(console: Console, folder: Path, result: dict[str, Any]) -> None:
    lengths = ", ".join(f"{tokens:,}" for tokens in result["prompt_tokens"])
    layers = ", ".join(map(str, result["layers"]))
    tell(console, f"{folder}: layers {layers}; prompts of {lengths} tokens.")
    if result["reused"]:
        tell(console, f"{result['reused']} of these layers were there already.")
    if result["left_out"]:
        layer, reason = next(iter(result["left_out"].items()))
        names = ", ".join(map(str, result["left_out"]))
        tell(console, f"Left out: {names}, as layer {layer}: {reason}")
    tell(console, f"Next: ffa-fp8fp8 bench layers --data {folder}")


def tell(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=True)

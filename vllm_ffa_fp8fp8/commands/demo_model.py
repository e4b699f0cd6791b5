"""Which model is asked: its folder, how it counts tokens, how many it takes."""

import json
import math
from collections.abc import Callable
from pathlib import Path

MODEL = Path("tests", "assets", "recall-9m")
NO_MODEL = (
    f"The usual model, {MODEL}, is part of the repository, and neither what is installed nor the "
    "current folder is a clone of it: run this in a clone, or name a model with --model FOLDER."
)
OTHER_MODEL = "restore the file, or name another model with --model FOLDER."
NEEDED = ("config.json", "tokenizer.json")


def find_model() -> str | None:
    """The model of the clone that this is installed from (`pip install -e`), or that it runs in."""
    for clone in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (clone / MODEL).is_dir():
            return str(clone / MODEL)
    return None


def model_folder(model: str | None) -> str:
    """The folder of a model, which is a folder, the name of one that was downloaded before, or,
    for None, the clone's. Raises ValueError where it is not there or not whole."""
    model = find_model() if model is None else model
    if model is None:
        raise ValueError(NO_MODEL)
    folder = model if Path(model).is_dir() else downloaded_folder(model)
    missing = [name for name in NEEDED if not Path(folder, name).is_file()]
    if missing:
        raise ValueError(f"No model in {folder}: it has no {' and no '.join(missing)}.")
    return folder


def downloaded_folder(name: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError):
        raise ValueError(
            f"{name} is neither a model's folder nor the name of a model that was downloaded: "
            f"`hf download {name}` would, if there is one of that name."
        ) from None


def max_positions(folder: str) -> float:
    """How many tokens the model takes, infinite where it does not say. Raises ValueError."""
    file = Path(folder, "config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return 0 + config.get("text_config", config).get("max_position_embeddings", math.inf)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is no model's configuration ({error}): {OTHER_MODEL}") from error


def token_counter(folder: str) -> Callable[[str], int]:
    """What counts the tokens of a text. Raises ValueError for a broken tokenizer.json."""
    from tokenizers import Tokenizer

    file = Path(folder, "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{file} is no tokenizer ({error}): {OTHER_MODEL}") from error
    return lambda text: len(tokenizer.encode(text).ids)

"""`make serve`: what scripts/serve.sh tells vLLM and the user."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from vllm_ffa_fp8fp8.config import FFAConfig

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "tests" / "assets" / "recall-9m" / "tokenizer.json"


def tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def serve(folder: Path, **variables: str) -> str:
    """What the script prints with a `vllm` that prints how it is called."""
    tool(folder, "vllm", 'echo "vllm $* [$VLLM_ATTENTION_BACKEND]"')
    inherited = {key: value for key, value in os.environ.items() if key != "ARGS"}
    own = {"BIN": str(folder), "PORT": "8000", "VLLM_ATTENTION_BACKEND": "ANOTHER"}
    command = ["bash", str(ROOT / "scripts" / "serve.sh"), "some-model"]
    answer = subprocess.run(
        command, env=inherited | own | variables, capture_output=True, text=True, check=True
    )
    return answer.stdout


@pytest.mark.parametrize(
    "choice, name, options",
    [
        ({}, "FFA_FP8FP8", " --attention-backend FFA_FP8FP8"),
        ({"BACKEND": "CPU_ATTN"}, "CPU_ATTN", " --attention-backend CPU_ATTN"),
        ({"BACKEND": ""}, "the default backend", ""),
    ],
)
def test_the_backend_is_named_to_vllm(tmp_path, choice, name, options):
    told = serve(tmp_path, **choice)
    assert f"with {name}." in told
    called = told.splitlines()[-1].replace(" --enforce-eager", "")
    served = "vllm serve some-model --served-model-name some-model --port 8000"
    assert called == f"{served}{options} []"


def test_the_example_is_long_enough_to_be_pruned(tmp_path):
    """Its text is run as it stands; who waits for vLLM's own line is not fooled by it."""
    told = serve(tmp_path)
    assert "startup complete" not in told
    tool(tmp_path, "curl", "cat")
    example = told[told.index("python3 -c") : told.rindex("\nvllm")]
    variables = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    sent = subprocess.run(
        ["bash", "-c", example], env=variables, capture_output=True, text=True, check=True
    )
    body = json.loads(sent.stdout)
    assert body["model"] == "some-model"
    first, *_, last = body["prompt"].splitlines()
    assert first == "# note: the code of tamiro is 48213." and last.startswith("# recall: ")
    tokens = len(Tokenizer.from_file(str(TOKENIZER)).encode(body["prompt"]).ids)
    assert tokens > 2 * FFAConfig().min_context

"""Nothing is left to compile while serving, and nothing is compiled that no step launches."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launched_variants import ENGINES

from vllm_ffa_fp8fp8.attention import warmup
from vllm_ffa_fp8fp8.attention.backend import FFAFP8FP8Backend

SCRIPT = Path(__file__).with_name("launched_variants.py")


def test_the_warmup_compiles_what_steps_launch():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr[-3000:]
    engines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(engines) == len(ENGINES)
    for kernels in engines:
        assert "'decode_kernel': " in kernels or "'draw_kernel': " in kernels


@pytest.mark.parametrize("user_size, page_size", [(None, 64), (32, 32)])
@pytest.mark.parametrize("fails", [False, True])
def test_compilation_begins_with_the_last_layer(monkeypatch, user_size, page_size, fails):
    """And what fails in the thread is left to the caller that waits for it."""
    compiled = []

    def compile_kernels(impl, planes):
        compiled.append((impl.name, planes))
        if fails:
            raise RuntimeError

    def make_layer(name):
        impl = SimpleNamespace(name=name, is_loaded=False, planes_to_be=lambda size: size)
        return SimpleNamespace(impl=impl, get_attn_backend=lambda: FFAFP8FP8Backend)

    monkeypatch.setattr(warmup, "compile_kernels", compile_kernels)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    layers = {name: make_layer(name) for name in ("first", "last")}
    cache_config = SimpleNamespace(
        block_size=user_size or 16,
        user_specified_block_size=user_size is not None,
        DEFAULT_BLOCK_SIZE=16,
    )
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers),
        cache_config=cache_config,
    )
    for name, layer in layers.items():
        assert not compiled
        layer.impl.is_loaded = True
        warmup.compile_early(config)
        if name == "first":
            warmup.wait_for_early()
    warmup.wait_for_early()
    assert compiled == [(name, page_size) for name in ("first", *([] if fails else ["last"]))]

"""Settings that must stand before anything imports triton or vLLM."""

import os
import subprocess

import pytest


def has_gpu() -> bool:
    try:
        return subprocess.run(["nvidia-smi"], capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


if not has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # tensors are small, and threads that wait for others of their operation spin
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items):
    if has_gpu():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


class ShowFailuresAtOnce:
    """GPU time can run out before the summary."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        if report.failed:
            reporter = self.config.pluginmanager.get_plugin("terminalreporter")
            reporter.write_line(f"\n{report.nodeid}\n{report.longreprtext[-6000:]}", flush=True)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: not in make test-fast, such as engines")
    if "gpu" in config.option.markexpr and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ShowFailuresAtOnce(config))

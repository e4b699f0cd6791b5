"""`VLLM_ATTENTION_BACKEND=FFA_FP8FP8 vllm serve`, whose engine and workers are spawned: what it
answers, what it shows of its requests at `/metrics`, and what it lets them choose."""

import contextlib
import json
import math
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from agreement import check_codes
from processes import Server, serve
from prometheus_client.parser import text_string_to_metric_families
from prompts import questions, recall_prompts
from vllm.platforms import current_platform

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build"),
]

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana-dashboard.json"
OPTIONS = {"delta": 2.0, "metrics": True, "min_request_delta": 1.0}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    options = json.dumps({"ffa_fp8fp8": OPTIONS})
    arguments = ("--enforce-eager", "--max-model-len", "4096", "--additional-config", options)
    arguments += ("--no-enable-prefix-caching",)
    variables = {"VLLM_ATTENTION_BACKEND": "FFA_FP8FP8", "VLLM_LOG_STATS_INTERVAL": "1"}
    variables |= {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    with serve(*arguments, **variables) as server:
        name = f"ffa_fp8fp8_metrics_{server.process.pid}_*"
        assert len(list(Path(tempfile.gettempdir()).glob(name))) == 1
        yield server
        assert server.stop() == 0 and not server.has_processes()
        assert not list(Path(tempfile.gettempdir()).glob(name))


def ask(server: Server, prompt: list[int], xargs: dict | None = None, **more) -> tuple[int, dict]:
    """Status and body of the answer."""
    body = {"model": "recall-9m", "prompt": prompt, "temperature": 0, "max_tokens": 4, **more}
    body |= {} if xargs is None else {"vllm_xargs": xargs}
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def series(server: Server) -> dict[str, float]:
    """Our series at /metrics, less `vllm:ffa_`."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        families = text_string_to_metric_families(response.read().decode())
    samples = [sample for family in families for sample in family.samples]
    ours = [s for s in samples if s.name.startswith("vllm:ffa_") and s.name.endswith("_total")]
    assert {(s.labels["model_name"], s.labels["engine"]) for s in ours} <= {("recall-9m", "0")}
    names = [s.name.removeprefix("vllm:ffa_").removesuffix("_total") for s in ours]
    assert len(set(names)) == len(names)
    return dict(zip(names, (s.value for s in ours), strict=True))


def test_it_answers(server):
    (question,) = questions(1500, 1)
    answer = server.complete(question.prompt, max_tokens=8)
    check_codes([{"text": answer.split("\n")[0]}], [question])
    assert "Using AttentionBackendEnum.FFA_FP8FP8 backend." in server.log
    assert "Unknown vLLM environment variable" not in server.log


def test_series_move_with_requests(server):
    (long,) = recall_prompts(1500, 1)
    before = series(server)
    assert ask(server, long)[0] == 200
    after = settled(server)
    assert after["total_blocks"] > before.get("total_blocks", 0)
    kept = after["kept_blocks"] / after["total_blocks"]
    read = after["read_bytes"] / after["dense_bytes"]
    assert 0 < kept < 0.9 and 0.25 < read < 0.9
    assert after["short_requests"] == 0
    assert ask(server, long[:40])[0] == 200
    last = settled(server)
    assert last["short_requests"] == 1
    assert last["short_blocks"] > after["short_blocks"]
    assert last["total_blocks"] == after["total_blocks"]


def test_requests_of_one_batch_choose_their_delta(server):
    """With the V1 model runner, and each as it is alone."""
    prompts, deltas = recall_prompts(1600, 3), (1, None, 30.5)

    def ask_with_delta(prompt, delta) -> str:
        xargs = None if delta is None else {"ffa_delta": delta}
        status, answer = ask(server, prompt, xargs, max_tokens=24, ignore_eos=True)
        assert status == 200, answer
        return answer["choices"][0]["text"]

    alone, kept, total, steps = [], [], [], num_steps(server)
    for prompt, delta in zip(prompts, deltas, strict=True):
        before = settled(server)
        alone.append(ask_with_delta(prompt, delta))
        after = settled(server)
        for counts, name in ((kept, "kept_blocks"), (total, "total_blocks")):
            counts.append(after[name] - before[name])
    assert kept[0] < 0.9 * kept[1] < 0.9 * 0.9 * kept[2] and kept[2] == total[2]
    steps = num_steps(server) - steps, num_steps(server)
    with ThreadPoolExecutor() as pool:
        together = list(pool.map(ask_with_delta, prompts, deltas))
    after_all = settled(server)
    assert num_steps(server) - steps[1] < 0.7 * steps[0]
    assert together == alone
    assert after_all["total_blocks"] - after["total_blocks"] == sum(total)
    assert after_all["kept_blocks"] - after["kept_blocks"] == pytest.approx(sum(kept), rel=0.02)


@pytest.mark.parametrize("xargs, said", [
    ({"ffa_delta": "six"}, "'ffa_delta' = 'six' (str)"),
    ({"ffa_delta": 0.5}, ">= 1"),
    ({"ffa_delta": math.nan}, "'ffa_delta' = nan"),
    ({"ffa_tau": 0.1}, "send 'ffa_delta' instead"),
])  # fmt: skip
def test_what_requests_may_not_choose_is_a_400(server, xargs, said):
    status, answer = ask(server, [1, 2, 3], xargs)
    assert status == 400 and said in json.dumps(answer), answer
    assert ask(server, [1, 2, 3])[0] == 200


def test_the_log_sums_up(server):
    assert "Engine 000: FFA_FP8FP8 kept: " in server.log
    assert "% of 16-bit dense" in server.log


def test_the_dashboard_names_series_that_are_there(server):
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        text = response.read().decode()
    there = set(re.findall(r"^(vllm:\w+)", text, re.MULTILINE))
    named = set(re.findall(r"vllm:\w+", " ".join(panel_queries().values())))
    assert named - there == {"vllm:ffa_skipped_mass_total"}  # by share only


def panel_queries() -> dict[str, str]:
    """The dashboard's queries as Grafana sends them, by panel and letter."""
    queries = {}
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "20s")
            query = query.replace("$model_name", ".+").replace("$engine", ".+")
            queries[f"{panel['title']} {target['refId']}"] = query
    return queries


@contextlib.contextmanager
def prometheus(server: Server, folder: Path) -> Iterator[str]:
    """The address of a Prometheus that reads the server's /metrics every second."""
    scrape = {"targets": [server.url.removeprefix("http://")]}
    jobs = [{"job_name": "vllm", "scrape_interval": "1s", "static_configs": [scrape]}]
    (folder / "prometheus.yml").write_text(json.dumps({"scrape_configs": jobs}))  # is YAML, too
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yml"]
    command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Prometheus")
def test_the_dashboard_finds_its_series_in_prometheus(server, tmp_path):
    (long,) = recall_prompts(1500, 1)
    with prometheus(server, tmp_path) as url:
        for _ in range(5):
            time.sleep(2)
            assert ask(server, long)[0] == ask(server, long[:40])[0] == 200
        time.sleep(2)
        found = {}
        for name, query in panel_queries().items():
            query = urllib.parse.urlencode({"query": query})
            with urllib.request.urlopen(f"{url}/api/v1/query?{query}", timeout=30) as response:
                found[name] = json.load(response)["data"]["result"]
    assert not found.pop("Skipped mass A")  # by share only
    values = {}
    for name, results in found.items():
        (result,) = results
        assert result["metric"] == {"model_name": "recall-9m", "engine": "0"}, name
        values[name] = float(result["value"][1])
    assert 0 < values["Kept fraction A"] < 1
    assert values["Requests below min_context A"] == pytest.approx(0.5, abs=0.2)
    assert 0 < values["Cache bytes read A"] < values["Cache bytes read B"]


def num_steps(server: Server) -> int:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        text = response.read().decode()
    (count,) = re.findall(r"^vllm:iteration_tokens_total_count\S* (\S+)", text, re.MULTILINE)
    return int(float(count))


def settled(server: Server) -> dict[str, float]:
    """The series once no worker adds to them: soon after the last request."""
    found, known = series(server), None
    while found != known:
        time.sleep(0.3)
        found, known = series(server), found
    return found

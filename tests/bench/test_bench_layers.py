"""`bench layers` on the CPU, on a small recording; `record` before and after its engine runs."""

import json
from pathlib import Path

import pytest
from recordings import LENGTHS, write_recording

from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.bench.layers import measure, tables
from vllm_ffa_fp8fp8.commands import bench_layers, record
from vllm_ffa_fp8fp8.commands.cli import main
from vllm_ffa_fp8fp8.settings import parse_setting

pytestmark = pytest.mark.skipif(
    environment.find_gpu() is not None, reason="this is about machines without a GPU"
)


@pytest.fixture
def bench(tmp_path, capsys):
    """Runs `bench layers`; returns exit code, what it printed, and the file's content."""
    data = tmp_path / "data"
    write_recording(data)

    def run(*arguments: str, folder=tmp_path / "plot"):
        code = main(["bench", "layers", "--data", str(data), "--folder", str(folder), *arguments])
        files = list(folder.glob("*.json"))
        content = json.loads(files[0].read_text()) if files else None
        return code, capsys.readouterr().out, content

    run.data, run.folder = data, tmp_path / "plot"
    return run


FAST = ("--lengths", "140", "--setting", "delta=3,min_context=0", "exact")


def test_errors_and_kept_fractions_without_a_gpu(bench):
    code, text, content = bench(*FAST)
    assert code == 0 and "Nothing is timed: this machine has none" in text
    assert "FA3's fp8 cache by rounding" in text and "140 tokens" in text
    assert (content["benchmark"], content["model"]) == ("layers", "models/small")
    assert content["environment"]["gpu"] == "CPU"
    assert content["shape"] == {"num_heads": 6, "num_kv_heads": 2, "head_size": 32}
    assert content["data"]["tokens"] == list(LENGTHS)
    figures = {(f["layer"], f["series"], f["setting"]): f for f in content["figures"]}
    names = [
        ("ours", "delta=3,min_context=0"),
        ("ours", "exact"),
        ("fa3-bf16", ""),
        ("fa3-fp8", ""),
    ]
    assert set(figures) == {(layer, *name) for layer in (0, 2) for name in names}
    for figure in figures.values():
        assert figure["us"] is None and figure["batch"] == 1 and figure["length"] == 140
    pruned, exact = figures[2, *names[0]], figures[2, *names[1]]
    assert 0 < pruned["kept"] < 1 == exact["kept"]
    assert pruned["kept"] == pytest.approx(sum(pruned["kept_by_head"]) / 2, abs=1e-4)
    assert pruned["dropped_mass"] > 0 == exact["dropped_mass"]
    bf16, fp8 = (figures[2, *name]["error"] for name in names[2:])
    assert exact["error"] == pytest.approx(bf16, rel=0.1)
    assert bf16 < fp8 and exact["error"] < pruned["error"]
    assert pruned["options"]["delta"] == 3.0 and pruned["code"]


def test_figures_are_reused_until_data_or_code_change(bench, monkeypatch):
    bench(*FAST)
    _, text, _ = bench(*FAST)
    assert "to measure" not in text and "come from earlier runs" in text
    _, text, content = bench(*FAST[:2], "--delta", "2")
    assert "layer 0, 140 tokens: 1 of 3 to measure" in text
    assert len(content["figures"]) == 2 * 5
    _, text, _ = bench(*FAST, "--fresh")
    assert "layer 0, 140 tokens: 4 of 4 to measure" in text
    monkeypatch.setattr(measure, "fingerprint", lambda *a, **k: "other")
    _, text, _ = bench(*FAST)
    assert "layer 0, 140 tokens: 4 of 4 to measure" in text


def test_variants_of_every_setting(bench):
    _, _, content = bench(
        "--lengths", "140", "--delta", "3", "--block-size", "16", "32", "--residual", "off",
        "--layers", "2", "--heads", "main",
    )  # fmt: skip
    ours = {f["setting"]: f for f in content["figures"] if f["series"] == "ours"}
    assert set(ours) == {f"delta=3,block_size={n},use_fp8_residual=false" for n in (16, 32)}
    options = ours["delta=3,block_size=16,use_fp8_residual=false"]["options"]
    assert (options["block_size"], options["use_fp8_residual"]) == (16, False)
    assert content["shape"] == {"num_heads": 32, "num_kv_heads": 8, "head_size": 128}
    assert {f["layer"] for f in content["figures"]} == {2}


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--layers", "1"), "has no layer 1; recorded are: 0, 2"),
        (("--lengths", "4000"), "no prompt has 4,000 tokens, the longest has 170"),
        (("--batch", "0"), "--batch and --lengths are 1 or more"),
        (("--setting", "dense_layers=[9]"), "the model has no layer 9"),
    ],
)
def test_what_cannot_be_is_said(bench, arguments, says):
    code, text, content = bench(*arguments)
    assert (code, content) == (2, None) and says in text


def test_a_damaged_recording_is_said(bench):
    layer = bench.data / "layer-002.safetensors"
    layer.write_bytes(layer.read_bytes()[:-10])
    code, text, content = bench(*FAST)
    assert code == 2 and "layer-002.safetensors is damaged" in text
    assert {f["layer"] for f in content["figures"]} == {0}
    (bench.data / "recording.json").write_text("{}")
    code, text, _ = bench(*FAST)
    assert code == 2 and "recording.json is no recording's index" in text


def test_a_foreign_file_of_figures_is_left_alone(bench):
    bench(*FAST)
    (path,) = bench.folder.glob("*.json")
    path.write_text('{"benchmark": "decode"}')
    code, text, _ = bench(*FAST)
    assert code == 2 and "it is of decode" in text
    assert path.read_text() == '{"benchmark": "decode"}'


def test_ctrl_c_keeps_the_layers_that_are_finished(bench, monkeypatch):
    choose = measure.choose_steps

    def interrupted(layer, length):
        if layer.index == 2:
            raise KeyboardInterrupt
        return choose(layer, length)

    monkeypatch.setattr(measure, "choose_steps", interrupted)
    code, text, content = bench(*FAST)
    assert code == 130 and "keeps what was finished" in text
    assert {f["layer"] for f in content["figures"]} == {0}
    assert not list(bench.folder.glob(".*.part"))


def test_a_failed_check_has_no_time_and_fails_the_command(bench, monkeypatch):
    def failed(steps, configs, peers, batches):
        for batch, name, figure in simulated(steps, configs, peers, batches):
            yield batch, name, figure | ({"failed": "off"} if name in configs else {"us": 5.0})

    simulated = measure.simulated
    monkeypatch.setattr(measure, "simulated", failed)
    code, text, _ = bench(*FAST, "--layers", "0")
    assert code == 1 and "check failed" in text
    assert "Check failed, so there is no time: layer 0, 1 x 140, exact: off" in text


def test_means_of_layers_have_no_time_where_one_has_none():
    figures = [
        {"series": "ours", "setting": "a", "us": us, "kept": 0.5, "kept_by_head": [0.4, 0.6],
         "dropped_mass": 0.1, "error": error, "failed": None}
        for us, error in ((2.0, 3.0), (4.0, 4.0))
    ]  # fmt: skip
    (mean,) = tables.means(figures)
    assert (mean["us"], mean["kept"]) == (3.0, 0.5)
    assert mean["error"] == pytest.approx((12.5) ** 0.5)
    (mean,) = tables.means([figures[0], figures[1] | {"us": None, "failed": "x"}])
    assert (mean["us"], mean["failed"]) == (None, "x")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--steps", "0"), "--steps is 1 or more, not 0"),
        (("--tokens", "0"), "--tokens is 1 or more, not 0"),
        (("--prompts", "nowhere.txt"), "nowhere.txt cannot be read"),
    ],
)
def test_record_refuses_before_an_engine_starts(tmp_path, capsys, monkeypatch, arguments, says):
    text = tmp_path / "text.txt"
    text.write_text("some text")
    monkeypatch.setattr(record, "run_engine", lambda *a: pytest.fail("an engine was started"))
    asked = {"--model": "m", "--prompts": str(text), "--out": str(tmp_path / "out")}
    asked |= dict([arguments])
    code = main(["record", *(part for pair in asked.items() for part in pair)])
    assert code == 2 and says in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["record", "--model", "m", "--prompts", str(text), "--out", "o", "--layers", "0,x"])
    assert "'0,x' is not `all` or layers such as 0,8,16" in capsys.readouterr().err


@pytest.fixture
def recorded(tmp_path, monkeypatch, capsys):
    """Runs `record` with `engine(folder)` in the engine's place; exit code and what it printed."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("some text")

    def run(engine):
        monkeypatch.setattr(record, "run_engine", lambda job, log, work: engine(out, Path(log)))
        code = main(["record", "--model", "m", "--prompts", str(text), "--out", str(out)])
        return code, capsys.readouterr().out, out

    return run


def test_ctrl_c_keeps_recorded_layers(recorded):
    def engine(folder, log):
        write_recording(folder, (0, 1))
        (folder / ".layer-002.safetensors.part").write_bytes(b"half")
        yield "phase", {"text": "writing layer 2", "done": 2, "of": 5}
        raise KeyboardInterrupt

    code, text, folder = recorded(engine)
    assert code == 130 and "keeps the finished layers: 0, 1." in text
    assert not list(folder.glob(".*"))
    code, text, _ = recorded(lambda folder, log: iter([("result", None)]))
    assert code == 1 and "finished layers: 0, 1." in text


def test_what_the_user_can_mend_is_told_without_the_log(recorded):
    def engine(folder, log):
        log.write_text("a long log")
        yield "phase", {"text": "loading the model"}
        raise RuntimeError("ValueError: the model has no attention layer 7; it has: 0, 1")

    code, text, _ = recorded(engine)
    assert code == 2 and "no attention layer 7; it has: 0, 1" in text and "a long log" not in text


def test_an_engine_that_breaks_shows_its_log(recorded):
    def engine(folder, log):
        log.write_text("a long log")
        yield "phase", {"text": "loading the model"}
        raise RuntimeError("OSError: no such model")

    code, text, _ = recorded(engine)
    assert code == 1 and "a long log" in text and "recording failed: OSError" in text
    assert "No layer was finished" in text


def test_settings_vary_in_the_order_that_is_asked_for():
    class Options:
        block_size, v_cache_dtype, residual = [16], ["auto", "fp8"], None

    names = [s.name for s in bench_layers.varied([parse_setting("exact")], Options)]
    assert names == [f"exact,block_size=16,v_cache_dtype={dtype}" for dtype in ("auto", "fp8")]

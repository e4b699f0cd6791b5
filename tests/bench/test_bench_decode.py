"""The decode benchmark without a GPU: arithmetic, kept figures, tables, plots and refusals."""

import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.bench import report
from vllm_ffa_fp8fp8.bench import store as store_module
from vllm_ffa_fp8fp8.bench.bars import BARS, LARGE, MAIN_SHAPE, bar_cells, judge
from vllm_ffa_fp8fp8.bench.cells import (
    EXACT,
    FA3_BF16,
    FA3_FP8,
    OURS,
    PEERS,
    Cell,
    Figure,
    Geometry,
    Shape,
    over,
    plan_cells,
)
from vllm_ffa_fp8fp8.bench.files import Records
from vllm_ffa_fp8fp8.bench.store import Store, code_fingerprint, read_figures
from vllm_ffa_fp8fp8.commands import bench_decode, cli
from vllm_ffa_fp8fp8.environment import GPU

PLOT = Path(__file__).parents[2] / "plot"
MAIN = Geometry()
ENVIRONMENT = {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.11", "triton": "3.6", "vllm": "0.32.0"}
BANDWIDTH = 3.1e6  # bytes per microsecond
FASTEST = 0.95  # of the floor


def fake_figure(cell: Cell, fraction: float = FASTEST) -> Figure:
    """A figure at so much of the floor; peers are at all of theirs."""
    kept = cell.shape.kept_blocks(cell.kept) / cell.shape.pages if cell.series == OURS else 1.0
    floor = cell.floor_bytes(kept) / BANDWIDTH
    return Figure(floor / (1.0 if cell.series in PEERS else fraction), floor, kept, 1e-3, "code")


def fake_figures(cells, fraction: float = FASTEST):
    return {cell: fake_figure(cell, fraction) for cell in cells}


@pytest.fixture
def result_file(tmp_path):
    store = Store(tmp_path, ENVIRONMENT)
    shapes = [Shape(MAIN, *s) for s in ((1, 8192), (8, 8192), (8, 32_768), (8, 131_072))]
    for cell in plan_cells(shapes, [1.0, 0.1], ["auto", "fp8"], ["", "waves=8"]):
        store.put(cell, fake_figure(cell))
    store.save(MAIN)
    return store.path(MAIN)


@pytest.mark.parametrize(
    "kept, value_bytes, bytes_an_element",
    [(0.0, 2, 1), (0.1, 2, 1.3), (0.1, 1, 1.2), (1.0, 2, 4), (1.0, 1, 3)],
)
def test_floor_bytes(kept, value_bytes, bytes_an_element):
    shape = Shape(MAIN, 8, 32_768)
    elements = 8 * 32_768 * 8 * 128
    assert shape.elements == elements
    assert shape.floor_bytes(kept, value_bytes) == pytest.approx(elements * bytes_an_element)
    cell = Cell(shape, OURS, "auto" if value_bytes == 2 else "fp8")
    assert cell.floor_bytes(kept) == shape.floor_bytes(kept, value_bytes)
    assert Cell(shape, FA3_BF16).floor_bytes(kept) == 4 * elements
    assert Cell(shape, FA3_FP8).floor_bytes(kept) == 2 * elements


def test_kept_blocks_include_the_first_and_the_last():
    shape = Shape(MAIN, 1, 1000)
    assert shape.pages == 16
    assert [shape.kept_blocks(kept) for kept in (0.0, 0.1, 0.5, 1.0)] == [2, 2, 8, 16]
    assert Shape(MAIN, 1, 60).kept_blocks(0.5) == 1


def test_peers_are_planned_once_a_shape_and_equal_fractions_once():
    short, long = Shape(MAIN, 1, 1024), Shape(MAIN, 8, 32_768)
    cells = plan_cells([short, long], [1.0, 0.1, 0.03], ["auto", "fp8"], [""])
    assert len(cells) == len(set(cells))
    assert sum(cell.series in PEERS for cell in cells) == 4
    assert [c.kept for c in cells if c.shape == short and c.series == OURS] == [1.0, 0.1] * 2
    assert [c.kept for c in cells if c.shape == long and c.series == OURS] == [1.0, 0.1, 0.03] * 2
    assert not [c for c in plan_cells([long], [1.0], ["auto"], [""], False) if c.series in PEERS]


def test_over_is_the_peers_time_by_ours():
    cell = Cell(Shape(MAIN, 8, 32_768), OURS, kept=0.1)
    figures = {cell: Figure(100.0, 90.0, 0.1, 0.0, "")}
    assert over(figures, cell, FA3_BF16) is None
    figures[Cell(cell.shape, FA3_BF16)] = Figure(300.0, 290.0, 1.0, 0.0, "")
    assert over(figures, cell, FA3_BF16) == 3.0


def test_default_sweep_and_bars_cover_every_bar():
    options = parse([])
    sweep = bench_decode.wanted_cells(options, ["auto", "fp8"], peers=True)
    for verdict in judge(fake_figures(bar_cells(["auto", "fp8"]))):
        assert verdict.figure is not None, verdict.bar.what
    own = [v for v in judge(fake_figures(sweep)) if v.bar.against != MAIN_SHAPE]
    own = [v for v in own if v.bar.at_least is not None]
    assert all(verdict.figure is not None for verdict in own)


def test_bars_take_the_worst_figure():
    cells = bar_cells(["auto", "fp8"])
    passed = judge(fake_figures(cells))
    assert {v.word for v in passed if v.bar.at_least} == {"PASS", "miss"}
    floor = [v for v in passed if v.bar.at_least == 0.9 and v.bar.against not in PEERS]
    assert [v.word for v in floor] == ["PASS", "PASS"]
    assert floor[0].figure == pytest.approx(FASTEST)
    figures = fake_figures(cells)
    slow = Cell(Shape(MAIN, 32, 8192), OURS, kept=0.5)
    assert slow.shape.tokens == LARGE
    figures[slow] = fake_figure(slow, 0.8)
    worst = judge(figures)[0]
    assert (worst.word, worst.cell, worst.bar) == ("miss", slow, BARS[0])
    assert worst.figure == pytest.approx(0.8)


def test_bars_compare_with_the_right_peer():
    figures = fake_figures(bar_cells(["auto", "fp8"]), fraction=1.0)
    by_bar = {(v.bar.what, v.bar.against): v for v in judge(figures)}
    tenth = Shape(MAIN, 8, 32_768)
    kept = tenth.kept_blocks(0.1) / tenth.pages
    assert by_bar["8 x 32,768, kept 0.1", FA3_BF16].figure == pytest.approx(4 / (1 + 3 * kept))
    assert by_bar["8 x 32,768, kept 0.1", FA3_FP8].figure == pytest.approx(2 / (1 + 3 * kept))
    fp8 = by_bar["8 x 32,768, kept 0.1, V fp8", FA3_FP8]
    assert fp8.figure == pytest.approx(2 / (1 + 2 * kept))
    assert by_bar["256k tokens and more, exact", FA3_BF16].figure == pytest.approx(1.0)


def test_bars_ignore_tuning_variants_and_say_what_is_missing():
    cell = Cell(Shape(MAIN, 8, 32_768), OURS, kept=0.1)
    assert {verdict.word for verdict in judge({cell: fake_figure(cell)})} > {"not measured"}
    for variant in ({"tuning": "waves=8"}, {"hot": "newest"}, {"ahead": "write"}):
        other = dataclasses.replace(cell, **variant)
        assert {verdict.word for verdict in judge({other: fake_figure(other)})} == {"not measured"}


def test_hot_blocks_at_two_places_are_two_cells(tmp_path):
    options = parse(["--shapes", "8x32768", "--kept", "0.1", "--hot", "spread", "newest"])
    cells = bench_decode.wanted_cells(options, ["auto"], peers=False)
    assert [c.hot for c in cells if c.series == OURS] == ["spread", "newest"]
    store = Store(tmp_path, ENVIRONMENT)
    for cell in cells:
        store.put(cell, fake_figure(cell))
    store.save(MAIN)
    ((_, figures),) = read_figures([store.path(MAIN)])
    assert set(figures) == set(cells)
    screen = report.console()
    with screen.capture() as captured:
        report.show_table(screen, report.figure_tables(figures)[0])
    assert captured.get().count("0.10 newest") == 1


def test_what_runs_ahead_is_timed_with_the_peers_too(tmp_path):
    options = parse(["--shapes", "1x8192", "--kept", "0.1", "--ahead", "nothing", "write"])
    cells = bench_decode.wanted_cells(options, ["auto"], peers=True)
    assert [c.ahead for c in cells if c.series == FA3_BF16] == ["nothing", "write"]
    figures = fake_figures(cells)
    alone, behind = (c for c in cells if c.series == OURS)
    peer = Cell(behind.shape, FA3_BF16, ahead="write")
    figures[peer] = dataclasses.replace(figures[peer], us=3 * figures[behind].us)
    assert over(figures, behind, FA3_BF16) == pytest.approx(3.0)
    assert over(figures, alone, FA3_BF16) != pytest.approx(3.0)
    store = Store(tmp_path, ENVIRONMENT)
    for cell, figure in figures.items():
        store.put(cell, figure)
    store.save(MAIN)
    assert set(read_figures([store.path(MAIN)])[0][1]) == set(cells)
    screen = report.console()
    with screen.capture() as captured:
        report.show_table(screen, report.figure_tables(figures)[0])
    rows = [line for line in captured.get().splitlines() if "0.10 with write" in line]
    assert len(rows) == 1 and rows[0].split("|")[-3].strip() == "3.00"


def test_planted_scores_take_settings_or_kept_fractions(tmp_path, capsys):
    arguments = ["--shapes", "8x32768", "--planted", "sink", "needle"]
    cells = wanted(*arguments)
    assert [c.setting for c in cells if c.series == OURS] == ["tau=0.012", "tau=0.05"] * 2
    assert {c.planted for c in cells if c.series == FA3_FP8} == {"sink", "needle"}
    cells += wanted(*arguments, "--kept", "0.1", "--delta", "2")
    ours = [c for c in cells if c.series == OURS][4:]
    assert [(c.setting, c.kept) for c in ours[:2]] == [("delta=2.0", 1.0), ("", 0.1)]
    store = Store(tmp_path, ENVIRONMENT)
    for cell in cells:
        found = 3.5 if cell.series == OURS and not cell.setting else None
        figure = dataclasses.replace(fake_figure(cell), exact_error=0.125, delta=found)
        store.put(cell, figure)
    store.save(MAIN)
    ((_, figures),) = read_figures([store.path(MAIN)])
    assert set(figures) == set(cells)
    assert all(figures[c].delta == (None if c.setting else 3.5) for c in ours)
    assert bench("--report", store.path(MAIN)) == 0
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    (row,) = (r for r in rows if r.startswith("| needle | 8 x 32,768 | delta=3.50 for 0.1 |"))
    assert row.count("| 1.2e-01 |") == 3 and "Errors of planted scores" in " ".join(rows)
    assert {verdict.word for verdict in judge(figures)} == {"not measured"}


def test_other_geometries_are_compared_with_the_main_one():
    figures = fake_figures(bar_cells(["auto"]))
    narrow = Cell(Shape(Geometry(head_size=64), 8, 32_768), OURS, kept=0.1)
    figures[narrow] = fake_figure(narrow, FASTEST / 2)
    verdicts = [v for v in judge(figures) if v.cell == narrow and v.bar.against not in PEERS]
    assert [v.figure for v in verdicts] == [pytest.approx(-FASTEST / 2)]
    assert verdicts[0].word == "miss"
    figures[narrow] = fake_figure(narrow, FASTEST - 0.14)
    assert {v.word for v in judge(figures) if v.bar.against == MAIN_SHAPE} == {"PASS"}


def test_store_reuses_figures_of_the_same_code_only(tmp_path):
    cell = Cell(Shape(MAIN, 8, 32_768), OURS, kept=0.1)
    figure = dataclasses.replace(fake_figure(cell), code="one")
    first = Store(tmp_path, ENVIRONMENT)
    assert first.get(cell, "one") is None
    first.put(cell, figure)
    first.save(MAIN)
    assert not first.get(cell, "one").cached
    found = Store(tmp_path, ENVIRONMENT).get(cell, "one")
    assert found.cached and found.us == pytest.approx(figure.us, abs=0.01)
    assert Store(tmp_path, ENVIRONMENT).get(cell, "two") is None
    assert Store(tmp_path, ENVIRONMENT, fresh=True).get(cell, "one") is None
    for name in ("torch", "triton", "vllm"):
        assert Store(tmp_path, ENVIRONMENT | {name: "9.9"}).get(cell, "one") is None
    other_gpu = Store(tmp_path, ENVIRONMENT | {"gpu": "NVIDIA L40S"})
    assert other_gpu.path(MAIN) != first.path(MAIN)
    other_stack = Store(tmp_path, ENVIRONMENT | {"triton": "3.8.0", "vllm": "0.33.0+cu130"})
    assert [store.path(MAIN).name for store in (first, other_stack)] == [
        "decode-nvidia-h100-80gb-hbm3-vllm-0.32.0-triton-3.6-h32-kv8-d128-p64.json",
        "decode-nvidia-h100-80gb-hbm3-vllm-0.33.0-triton-3.8.0-h32-kv8-d128-p64.json",
    ]


def test_figures_name_the_commit_they_are_of(tmp_path):
    cells = [Cell(Shape(MAIN, 8, 32_768), OURS, kept=kept) for kept in (0.1, 0.5)]
    for cell, commit in zip(cells, ("abc1234", "def5678"), strict=True):
        store = Store(tmp_path, ENVIRONMENT, commit=commit)
        assert store.put(cell, fake_figure(cell)).commit == commit
        store.save(MAIN)
    ((_, figures),) = read_figures([store.path(MAIN)])
    assert [figures[cell].commit for cell in cells] == ["abc1234", "def5678"]
    told = report.footnotes(ENVIRONMENT, figures)[0]
    assert told == (
        "NVIDIA H100 80GB HBM3; torch 2.11, Triton 3.6, vLLM 0.32.0 (not a stack that pip "
        "installs); commit abc1234, def5678."
    )


def test_fresh_figures_replace_old_ones_and_keep_the_others(tmp_path):
    cells = [Cell(Shape(MAIN, 8, 32_768), OURS, kept=kept) for kept in (0.1, 0.5)]
    first = Store(tmp_path, ENVIRONMENT)
    for cell in cells:
        first.put(cell, fake_figure(cell))
    first.save(MAIN)
    again = Store(tmp_path, ENVIRONMENT, fresh=True)
    again.put(cells[0], fake_figure(cells[0], 0.5))
    again.save(MAIN)
    ((_, figures),) = read_figures([again.path(MAIN)])
    assert figures.keys() == set(cells)
    assert figures[cells[0]].floor_fraction == pytest.approx(0.5, abs=1e-3)


def test_code_fingerprints():
    assert code_fingerprint(OURS) == code_fingerprint(EXACT) != code_fingerprint(FA3_BF16)
    assert set(store_module.OUR_FILES + store_module.PEER_FILES) <= {
        file.name for file in store_module.resources.files("vllm_ffa_fp8fp8.bench").iterdir()
    }


def parse(arguments):
    parser = bench_decode.argparse.ArgumentParser()
    bench_decode.add_arguments(parser)
    return parser.parse_args(arguments)


def wanted(*arguments):
    return bench_decode.wanted_cells(parse(list(arguments)), ["auto"], peers=True)


def bench(*arguments) -> int:
    return cli.main(["bench", "decode", *map(str, arguments)])


def test_report_shows_tables(result_file, tmp_path, capsys):
    assert bench("--report", result_file, "--folder", tmp_path / "plots") == 0
    shown = capsys.readouterr().out
    assert "8 x 131,072" in shown and "0.10 waves=8" in shown and "exact" in shown
    assert "NVIDIA H100 80GB HBM3; torch 2.11" in shown and "3.10 TB/s" in shown
    assert "PASS" in shown and "not measured" in shown
    assert "figures come from earlier runs" in shown
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    row = next(line for line in lines if line.startswith("| 8 x 131,072 | auto | 0.10 |"))
    assert f"({FASTEST})" in row and row.count("*") == 4
    assert not (tmp_path / "plots").exists()


def test_bars_alone(result_file, capsys):
    assert bench("--report", result_file, "--bars") == 0
    shown = capsys.readouterr().out
    assert "PASS" in shown and "microseconds" not in shown


def test_result_files_are_small(result_file):
    assert result_file.stat().st_size < 20_000
    assert json.loads(result_file.read_text())["environment"] == ENVIRONMENT


def test_report_takes_every_file_that_the_benchmarks_keep(tmp_path, capsys):
    projection = tmp_path / "projection.json"
    Records(projection, "kproj", ENVIRONMENT).save()
    files = sorted(PLOT.glob("*.json"))
    assert bench("--report", *files, projection, "--folder", tmp_path / "plots") == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "is skipped" in line]
    others = [path for path in (*files, projection) if not path.name.startswith("decode")]
    assert [note.partition(" is skipped")[0] for note in notes] == list(map(str, others))
    for path, note in zip(others, notes, strict=True):
        kind = path.stem.partition("-")[0]
        assert note.endswith(f"figures of {kind.replace('projection', 'kproj')}.")
    assert bench("--report", projection) == 2
    assert "no figures to show" in capsys.readouterr().out


RECORD = {
    "batch": 1, "seq_len": 8192, "series": "ours", "value_dtype": "auto", "kept": 1.0,
    "tuning": "", "hot": "spread", "ahead": "nothing", "commit": "",
    "us": 9.0, "floor_us": 8.0, "measured_kept": 1.0, "error": 0.0, "code": "",
}  # fmt: skip


@pytest.mark.parametrize(
    "change, words",
    [
        ({"geometry": None}, "the entry 'geometry' cannot be None"),
        ({"geometry": {"num_heads": 32}}, "an entry 'num_kv_heads' is missing"),
        ({"environment": {}}, "an entry 'gpu' is missing"),
        ({"figures": [{"batch": 1}]}, "an entry 'seq_len' is missing"),
        ({"figures": [RECORD | {"us": "fast"}]}, "the entry 'us' cannot be 'fast'"),
        ({"figures": [1]}, "an entry 'batch' is missing"),
    ],
)
def test_report_says_what_is_wrong_with_a_file(tmp_path, capsys, change, words):
    content = {
        "benchmark": "decode",
        "environment": ENVIRONMENT,
        "geometry": dataclasses.asdict(MAIN),
        "figures": [RECORD],
    }
    path = tmp_path / "some.json"
    path.write_text(json.dumps(content))
    assert bench("--report", path, "--bars") == 0
    path.write_text(json.dumps(content | change))
    assert bench("--report", path) == 2
    assert f"some.json holds no figures of decode: {words}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, words",
    [
        (b"{}", "an entry 'benchmark' is missing"),
        (b"[1]", "it is not a JSON object"),
        (b'{"figures":\n[1,', "it is not JSON, see line 2"),
        (b"\xff\xfe", "it is not text"),
        (None, "No such file"),
    ],
)
def test_report_says_why_it_cannot_read_a_file(tmp_path, capsys, content, words):
    path = tmp_path / "some.json"
    if content is not None:
        path.write_bytes(content)
    assert bench("--report", path) == 2
    assert f"some.json holds no figures of decode: {words}" in capsys.readouterr().out


def test_files_of_two_gpus_are_not_mixed(result_file, tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text(result_file.read_text().replace("H100", "H200").replace("3.6", "3.8"))
    assert bench("--report", result_file, other, "--bars") == 0
    shown = capsys.readouterr().out
    assert shown.count("NVIDIA H100 80GB HBM3; torch 2.11, Triton 3.6") == 1
    assert shown.count("NVIDIA H200 80GB HBM3; torch 2.11, Triton 3.8") == 1
    assert shown.count("Every output was checked first") == 2


def test_a_folder_that_is_a_file_is_told_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_decode, "missing_gpu", lambda: None)
    path = tmp_path / "file"
    path.touch()
    assert bench("--folder", path) == 2
    assert "cannot be a folder for figures: File exists" in capsys.readouterr().out


def shown_tables(figures, width: int, terminal: bool) -> str:
    screen = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    for table in (*report.figure_tables(figures), report.bar_table(figures)):
        report.show_table(screen, table)
    return screen.file.getvalue()


def words_of(tables: str) -> list[str]:
    return sorted(re.sub(r"-{2,}|[|─]", " ", tables).split())


@pytest.mark.parametrize("width", [80, 120])
def test_tables_are_whole_on_narrow_terminals(result_file, width):
    ((_, figures),) = read_figures([result_file])
    shown = shown_tables(figures, width, terminal=True)
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    assert words_of(shown) == words_of(shown_tables(figures, 40, terminal=False))


def test_tables_are_markdown_where_there_is_no_terminal(result_file):
    ((_, figures),) = read_figures([result_file])
    lines = [line for line in shown_tables(figures, 40, terminal=False).splitlines() if "|" in line]
    assert all(line.startswith("|") and line.endswith("|") for line in lines)
    assert "…" not in "".join(lines)


def test_bars_are_explained(result_file, capsys):
    assert bench("--report", result_file, "--bars") == 0
    assert capsys.readouterr().out.startswith("Bars: targets set in vllm_ffa_fp8fp8/bench/bars.py")


@pytest.mark.parametrize(
    "gpu, words", [(None, "this machine has none"), (GPU("NVIDIA A100", (8, 0)), "has no FP8")]
)
def test_without_a_gpu_it_says_so(monkeypatch, capsys, gpu, words):
    monkeypatch.setattr(environment, "find_gpu", lambda: gpu)
    assert bench() == 1
    shown = capsys.readouterr().out
    assert words in shown and "--report" in shown


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--shapes", "8by100"], "BATCHxTOKENS"),
        (["--heads", "32"], "QUERY:KV"),
        (["--heads", "32:5"], "cannot share 5 KV heads"),
        (["--kept", "1.5"], "between 0 and 1"),
        (["--heads", "0:8"], "1 to 16 query heads share a KV head, not 0"),
        (["--heads", "40:1"], "1 to 16 query heads share a KV head, not 40"),
        (["--head-sizes", "100"], "multiples of 16 up to 256, not 100"),
        (["--page-size", "0"], "16, 32, 64, 128 tokens, not 0"),
        (["--delta", "5"], "settings are for --planted"),
        (["--planted", "sink", "--hot", "newest"], "for hot blocks, not for --planted"),
        (["--planted", "sink", "--setting", "block_size=128"], "need pages of as many"),
        (["--planted", "sink", "--shapes", "1x100"], "too short to plant scores in: 512 tokens"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        bench_decode.wanted_cells(parse(arguments), ["auto"], peers=True)


def test_wrong_arguments_are_told(monkeypatch, capsys):
    monkeypatch.setattr(bench_decode, "missing_gpu", lambda: None)
    assert bench("--vary", "wavs=3") == 2
    assert "no launch parameter 'wavs'" in capsys.readouterr().out

"""`ffa-fp8fp8 plot`: what is drawn from small files, and what is said of files that are none."""

import json
from pathlib import Path

import pytest

from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.bench.bars import MAIN
from vllm_ffa_fp8fp8.bench.cells import (
    EXACT,
    FA3_BF16,
    FA3_FP8,
    OURS,
    Cell,
    Figure,
    Shape,
    plan_cells,
)
from vllm_ffa_fp8fp8.bench.quality.plan import DEFAULT, FP8_CACHE, floor_name
from vllm_ffa_fp8fp8.bench.store import Store
from vllm_ffa_fp8fp8.commands import cli
from vllm_ffa_fp8fp8.settings import parse_setting

pytest.importorskip("matplotlib")

from vllm_ffa_fp8fp8.bench.pictures import canvas, draw, frontier, layers, quality  # noqa: E402
from vllm_ffa_fp8fp8.bench.pictures.sources import Options, read_layers, read_quality  # noqa: E402

ENVIRONMENT = {"gpu": "NVIDIA H100", "torch": "2.14.0", "triton": "3.8.0", "vllm": "0.33.0"}
SETTINGS = [
    parse_setting(text)
    for text in ("exact", "delta=10", "delta=5", "delta=2", "delta=5,block_size=16")
]
KEPT = dict(zip((s.name for s in SETTINGS), (1.0, 0.5, 0.15, 0.06, 0.08), strict=True))
PEER_US = {"fa3-bf16": 1 / 30, "fa3-fp8": 1 / 31}
"""Microseconds a token: names of lines so close must not overlap."""
KL = dict(zip(KEPT, (4e-4, 6e-4, 9e-3, 4e-2, 7e-3), strict=True))


def layer_record(layer, length, setting=None, **changes):
    name = setting.name if setting else ""
    kept = KEPT[name] if setting else 1.0
    record = {
        "layer": layer,
        "length": length,
        "batch": 8,
        "series": "ours",
        "setting": name,
        "options": setting.options if setting else {},
        "us": (1 + 3 * kept) * length / 100 + layer,
        "kept": kept,
        "kept_by_head": [kept, kept / 2 if kept < 1 else 1.0] if setting else [],
        "dropped_mass": 0.01,
        "error": 0.02 / kept if setting else 0.003,
        "commit": "abc1234",
        "code": "c0de",
    }
    return record | changes


def layers_content(lengths=(4096, 16_384), **changes):
    figures = []
    for layer in (0, 4):
        for length in lengths:
            figures += [layer_record(layer, length, s, **changes) for s in SETTINGS]
            for peer, us in PEER_US.items():
                figures.append(
                    layer_record(layer, length, **{"series": peer, "us": us * length} | changes)
                )
    return {
        "benchmark": "layers",
        "environment": ENVIRONMENT,
        "model": "some-model",
        "shape": {"num_heads": 14, "num_kv_heads": 2, "head_size": 64},
        "figures": figures,
    }


def quality_content():
    settings = [
        {"name": DEFAULT, "options": None, "kept": 1.0, "kl_mean": 0.0, "kl_max": 0.0},
        {"name": floor_name(4), "options": None, "kept": 1.0, "kl_mean": 5e-4, "kl_max": 0.01},
        {"name": FP8_CACHE, "options": None, "kept": 1.0, "kl_mean": 0.012, "kl_max": 0.2},
    ]
    for setting in SETTINGS:
        figures = {"kept": KEPT[setting.name], "kl_mean": KL[setting.name], "kl_max": 1.0}
        settings.append({"name": setting.name, "options": setting.options} | figures)
    head = {"benchmark": "quality", "environment": ENVIRONMENT, "model": "/models/some-model"}
    return head | {"text": "/a/b.txt", "tokens": 16_000, "last": 128, "settings": settings}


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def plot(*arguments) -> int:
    return cli.main(["plot", *map(str, arguments)])


def title_of(picture) -> str:
    return picture.get_suptitle()


def test_all_pictures_of_a_folder_are_written(tmp_path, capsys):
    write(tmp_path / "one.json", layers_content())
    write(tmp_path / "kl.json", quality_content())
    write(tmp_path / "other.json", {"benchmark": "serving"})
    assert plot(tmp_path, "--out", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path / 'other.json'} is skipped: it holds figures of serving" in shown
    names = ("frontier-4096", "frontier-16384", "kl-frontier-kl", "lengths", "kept-4096")
    stems = {f"one-{name}" for name in (*names, "lengths-blocks-of-16", "kept-16384")} | {"kl-kl"}
    files = sorted((tmp_path / "out").iterdir())
    assert {file.name for file in files} == {f"{s}.{t}" for s in stems for t in ("png", "svg")}
    assert all(str(file) in shown for file in files)
    for file in files:
        head = file.read_bytes()[:100]
        assert head.startswith(b"\x89PNG" if file.suffix == ".png" else b"<?xml")
        assert file.stat().st_size > 5000
    again = tmp_path / "again"
    assert plot(tmp_path / "kl.json", "--out", again) == 0
    same = [(folder / "kl-kl.svg").read_bytes() for folder in (again, tmp_path / "out")]
    assert same[0] == same[1]


def test_titles_say_what_is_shown(tmp_path):
    paths = [write(tmp_path / "one.json", layers_content())]
    paths.append(write(tmp_path / "kl.json", quality_content()))
    pictures = draw.draw_all(draw.read_all(paths, print), None)
    assert {stem.parent for stem in pictures} == {tmp_path}
    for picture in pictures.values():
        title = title_of(picture)
        assert title.startswith("some-model") and "NVIDIA H100; torch 2.14.0" in title


@pytest.fixture
def file(tmp_path):
    return read_layers(write(tmp_path / "one.json", layers_content()))


def curves(axes) -> dict[str, list]:
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def test_the_frontier_is_a_curve_a_family_of_means_over_layers(file):
    axes = frontier.draw_frontiers(file)[4096].axes[0]
    found = curves(axes)
    ours = found["FFA_FP8FP8"]
    assert [error for error, _ in ours] == pytest.approx([0.02, 0.04, 0.02 / 0.15, 0.02 / 0.06])
    assert [us for _, us in ours] == pytest.approx(
        [40.96 * (1 + 3 * k) + 2 for k in (1, 0.5, 0.15, 0.06)]
    )
    assert len(found["FFA_FP8FP8, blocks of 16"]) == 1
    peers = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() in "sD"]
    assert [[0.003, pytest.approx(4096 / 30)]] in peers
    words = {text.get_text() for text in axes.texts}
    assert {"exact", "delta 10", "delta 2", "FA3, bf16 cache", "FA3, fp8 cache"} <= words
    assert axes.get_xscale() == "log" and axes.get_ylabel() == "microseconds of a layer"


@pytest.mark.parametrize(
    "text, label, family",
    [
        ("balanced", "balanced", "FFA_FP8FP8, by share"),
        ("balanced,block_size=32", "balanced", "FFA_FP8FP8, by share, blocks of 32"),
        ("fast,delta=7,min_context=9", "delta 7", "FFA_FP8FP8"),
        ("delta=null,v_cache_dtype=fp8", "exact", "FFA_FP8FP8, FP8 V"),
        ("delta=2.5,precomputed_threshold=true", "delta 2.5", "FFA_FP8FP8, precomputed_threshold"),
    ],
)
def test_settings_are_named_by_family_and_value(text, label, family):
    setting = parse_setting(text)
    options = Options(setting.name, setting.options)
    assert options.label == label and options.family.startswith(family)


def test_a_setting_that_failed_in_a_layer_is_no_point(tmp_path):
    content = layers_content()
    failed = next(f for f in content["figures"] if f["setting"] == "delta=2" and f["layer"])
    failed["us"] = None
    file = read_layers(write(tmp_path / "one.json", content))
    lengths = {length: curves(p.axes[0]) for length, p in frontier.draw_frontiers(file).items()}
    assert [len(lengths[n]["FFA_FP8FP8"]) for n in (4096, 16_384)] == [3, 4]


def test_kl_is_joined_by_options_and_at_the_nearest_length(tmp_path, file):
    content = quality_content()
    content["settings"][5]["name"] = "delta=5.0"
    judged = read_quality(write(tmp_path / "kl.json", content))
    axes = frontier.draw_kl_frontier(file, judged).axes[0]
    assert axes.get_title() == "8 x 16,384 tokens" and "KL" in axes.get_xlabel()
    found = curves(axes)["FFA_FP8FP8"]
    assert [kl for kl, _ in found] == [4e-4, 6e-4, 9e-3, 4e-2]
    points = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "D"]
    assert [[0.012, pytest.approx(16_384 / 31)]] in points


def test_files_of_another_model_are_not_joined(tmp_path):
    paths = [write(tmp_path / "one.json", layers_content())]
    paths.append(write(tmp_path / "kl.json", quality_content() | {"model": "another"}))
    names = {stem.name for stem in draw.draw_all(draw.read_all(paths, print), None)}
    assert "kl-kl" in names and "one-kl-frontier-kl" not in names


def test_files_without_a_common_setting_are_told(tmp_path, capsys):
    content = quality_content()
    content["settings"] = content["settings"][:3]
    paths = [write(tmp_path / "one.json", layers_content()), write(tmp_path / "kl.json", content)]
    names = {stem.name for stem in draw.draw_all(draw.read_all(paths, print), None)}
    assert "one-kl-frontier-kl" not in names
    assert "kl.json share no setting" in capsys.readouterr().out


def test_without_times_kept_is_drawn_over_the_error(tmp_path):
    file = read_layers(write(tmp_path / "one.json", layers_content(us=None)))
    axes = frontier.draw_frontiers(file)[4096].axes[0]
    assert axes.get_ylabel() == "kept fraction"
    assert [kept for _, kept in curves(axes)["FFA_FP8FP8"]] == [1, 0.5, 0.15, 0.06]
    assert layers.draw_over_lengths(file) == {}
    judged = read_quality(write(tmp_path / "kl.json", quality_content()))
    (axes,) = frontier.draw_kl_frontier(file, judged).axes
    assert curves(axes)["FFA_FP8FP8"][0] == [4e-4, 1] and axes.get_ylabel() == "kept fraction"


def test_speedups_are_over_the_peers_of_the_same_length(file):
    picture = layers.draw_over_lengths(file)["FFA_FP8FP8"]
    times, over_bf16, over_fp8 = picture.axes
    for line in over_bf16.lines[:-1]:
        assert len(line.get_xydata()) == 2
    last = times.lines[-1]
    us = dict(last.get_xydata().tolist())
    ratios = dict(over_bf16.lines[-2].get_xydata().tolist())
    assert last.get_label() == "delta 2"
    assert ratios == pytest.approx({n: n / 30 / us[n] for n in us})
    assert [tick for tick in times.get_xticks()] == [4096, 16_384]


def test_heat_maps_show_each_layer_and_head(file):
    picture = layers.heat_maps(file)[4096]
    panels = {axes.get_title(): axes for axes in picture.axes if axes.get_title()}
    assert len(panels) == 4  # what keeps everything has none
    axes = panels["delta 5: kept 0.11"]
    assert axes.images[0].get_array().tolist() == [[0.15, 0.075]] * 2
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "4"]
    assert {text.get_text() for text in axes.texts} == {".15", ".07"}


def test_settings_by_share_have_curves_of_their_own(tmp_path):
    content = layers_content(lengths=(4096,))
    texts = [f"tau={tau}" for tau in (0.1, 0.05, 0.01)] + ["tau=0.05,block_size=64"]
    for place, text in enumerate(texts):
        kept = 0.02 * (place + 1)
        content["figures"] += [
            layer_record(layer, 4096) | {"kept": kept, "kept_by_head": [kept] * 2, "error": kept}
            | {"setting": text, "options": parse_setting(text).options}
            for layer in (0, 4)
        ]  # fmt: skip
    file = read_layers(write(tmp_path / "two.json", content))
    (axes,) = frontier.draw_frontiers(file)[4096].axes
    found = {name: len(points) for name, points in curves(axes).items()}
    assert found["FFA_FP8FP8, by share"] == 3 and found["FFA_FP8FP8, by share, blocks of 64"] == 1
    titles = [axes.get_title() for axes in layers.heat_maps(file)[4096].axes]
    shown = [title.partition(":")[0] for title in titles if title]
    assert len(shown) == 6  # some of each
    assert "tau 0.05, by share, blocks of 64" in shown and "tau 0.1, by share" in shown


def test_kl_and_skipped_fraction_over_delta(tmp_path):
    picture = quality.draw_quality(read_quality(write(tmp_path / "kl.json", quality_content())))
    above, below = picture.axes
    assert curves(above)["FFA_FP8FP8, mean"] == [[2, 4e-2], [5, 9e-3], [10, 6e-4]]
    assert below.lines[0].get_ydata().tolist() == pytest.approx([0.94, 0.85, 0.5])
    assert below.get_xlabel() == "delta, log2 units"
    assert any(line.get_ydata()[0] == 0.012 for line in above.lines)


def test_names_lie_on_nothing(file):
    for picture in frontier.draw_frontiers(file).values():
        picture.draw_without_rendering()
        for axes in picture.axes:
            boxes = [text.get_window_extent() for text in axes.texts]
            assert len(boxes) > 4
            pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
            assert not any(a.overlaps(b) for a, b in pairs)


def test_names_without_room_are_left_out():
    picture, ((axes,),) = canvas.new_picture(1, 1)
    axes.plot([1], [1], "o")
    canvas.put_labels(picture, axes, [canvas.Label(1, 1, "a long name")] * 30)
    assert 2 <= len(axes.texts) <= 6


@pytest.mark.parametrize("values, most", [((1, 2), 6), ((3e-4, 0.2), 6), ((1e-6, 1), 7)])
def test_logarithmic_axes_have_few_ticks(values, most):
    _, ((axes,),) = canvas.new_picture(1, 1)
    canvas.log_axis(axes.yaxis, values)
    low, high = axes.get_ylim()
    assert low < min(values) and high > max(values)
    assert 1 <= len(axes.get_yticks()) <= most


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"benchmark": "layers",', "bad.json cannot be drawn: it is not JSON, see line 1"),
        ({"benchmark": "serving"}, "it is of serving, not of decode, layers, quality"),
        ({"model": "x"}, "bad.json cannot be drawn: it is of no benchmark, not of decode"),
        ({"benchmark": "decode"}, "holds no figures of decode: an entry 'environment' is missing"),
        (layers_content() | {"figures": [{}]}, "holds no figures of layers: an entry 'series'"),
        (layers_content() | {"shape": {}}, "figures of layers: an entry 'num_heads' is missing"),
        (layers_content(us="fast"), "figures of layers: the entry 'us' cannot be 'fast'"),
        (layers_content(series="theirs"), "of layers: the entry 'series' cannot be 'theirs'"),
        (quality_content() | {"tokens": "9"}, "of quality: the entry 'tokens' cannot be '9'"),
        (quality_content() | {"environment": {}}, "of quality: an entry 'gpu' is missing"),
        (layers_content(lengths=()), "There is nothing to draw"),
    ],
)
def test_files_that_cannot_be_drawn_are_told(tmp_path, capsys, content, words):
    good = write(tmp_path / "good.json", quality_content())
    path = tmp_path / "bad.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    paths = [path] if "nothing" in words else [good, path]
    assert plot(*paths, "--out", tmp_path / "out") == 2
    assert words in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_is_told(tmp_path, capsys):
    assert plot(tmp_path / "none.json") == 2
    assert "none.json cannot be drawn: No such file" in capsys.readouterr().out


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "kl.json", quality_content())
    old = tmp_path / "kl-kl.png"
    old.write_text("older")

    def fill(picture, part, **options):
        Path(part).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fill)
    assert plot(path) == 2
    assert "kl-kl.png cannot be written: No space left on device" in capsys.readouterr().out
    assert old.read_text() == "older" and len(list(tmp_path.iterdir())) == 2


def test_without_matplotlib_it_says_what_to_install(monkeypatch, capsys):
    known = environment.version_of
    monkeypatch.setattr(
        environment, "version_of", lambda name: None if name == "matplotlib" else known(name)
    )
    assert plot("plot") == 1
    assert environment.install_command("bench") in capsys.readouterr().out


def keep(folder, cells):
    """Made-up figures of bench decode."""
    store = Store(folder, ENVIRONMENT, commit="abc1234")
    for cell in cells:
        kept = cell.kept if cell.series == OURS else 1.0
        us = cell.shape.seq_len / 100 * (1 + 3 * kept)
        store.put(cell, Figure(us, us / 2, kept, 1e-3, "code"))
    store.save(MAIN)
    return store.path(MAIN)


def test_pictures_of_decode(tmp_path):
    shapes = [Shape(MAIN, *size) for size in ((1, 8192), (8, 8192), (8, 32_768))]
    tunings = ["", "waves=8"]
    path = keep(tmp_path, plan_cells(shapes, [1.0, 0.1], ["auto", "fp8"], tunings))
    pictures = draw.draw_all(draw.read_all([path], print), None)
    by_name = {stem.name.removeprefix(path.stem): picture for stem, picture in pictures.items()}
    assert list(by_name) == ["-lengths", "-speedup", "-floor"]
    for picture in by_name.values():
        assert "32 heads over 8, head size 128" in title_of(picture)
        assert "NVIDIA H100" in title_of(picture) and "commit abc1234" in title_of(picture)
        picture.draw_without_rendering()
        (legend,), title = picture.legends, picture.texts[0]
        assert not title.get_window_extent().overlaps(legend.get_window_extent())
    times = by_name["-lengths"].axes[0]  # of batch 8: batch 1 has one length
    assert curves(times)["FFA_FP8FP8, kept 0.1"] == [
        [8192, pytest.approx(106.5, abs=0.1)],
        [32_768, pytest.approx(426, abs=0.1)],
    ]
    assert set(curves(times)) == {
        "FA3, bf16 cache",
        "FA3, fp8 cache",
        "FFA_FP8FP8, kept 0.1",
        "FFA_FP8FP8, kept 1",
    }
    speedups = curves(by_name["-speedup"].axes[0])
    assert speedups["1 x 8,192"] == [[0.1, pytest.approx(4 / 1.3, abs=0.01)], [1, 1]]


def test_no_pictures_of_lone_points(tmp_path, capsys):
    cell = Cell(Shape(MAIN, 8, 32_768), OURS, kept=0.1)
    others = [Cell(cell.shape, series) for series in (FA3_BF16, FA3_FP8, EXACT)]
    assert plot(keep(tmp_path, [cell, *others])) == 2
    assert "There is nothing to draw" in capsys.readouterr().out

"""The tables of README and docs are what the figures under plot/ say."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_ffa_fp8fp8.bench.bars import MAIN
from vllm_ffa_fp8fp8.bench.cells import FA3_BF16, OURS, Cell, Figure, Shape
from vllm_ffa_fp8fp8.bench.files import Records, file_name
from vllm_ffa_fp8fp8.bench.model_tables import TABLES
from vllm_ffa_fp8fp8.bench.published import SERVING, Published
from vllm_ffa_fp8fp8.bench.quality_tables import order_of
from vllm_ffa_fp8fp8.bench.store import DECODE, Store
from vllm_ffa_fp8fp8.bench.tables import MARKED, fill

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
OLD = {"gpu": "NVIDIA H200", "torch": "2.13.0", "triton": "3.7.1", "vllm": "0.32.0"}
NEW = {"gpu": "NVIDIA H100", "torch": "2.14.0", "triton": "3.10.0", "vllm": "0.33.0"}
CELL = Cell(Shape(MAIN, 8, 32_768), OURS, kept=0.1)


def keep(folder, environment, us, cell=CELL, peer_us=300.0):
    store = Store(folder, environment, commit="abc1234")
    store.put(cell, Figure(us, 90.0, 0.1, 0.0, "code"))
    store.put(cell.peer(FA3_BF16), Figure(peer_us, 290.0, 1.0, 0.0, "code"))
    store.save(MAIN)


def test_pages_hold_what_the_figures_say():
    published = Published(ROOT / "plot")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert fill(text, TABLES, published) == text, f"`make tables` changes {page.name}"


def test_every_table_stands_somewhere():
    marked = {name for page in PAGES for _, name, _ in MARKED.findall(page.read_text())}
    assert marked == set(TABLES)


def test_every_mark_is_closed():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- table:") == text.count("<!-- /table -->")
        assert text.count("<!-- table:") == len(MARKED.findall(text))


def test_the_newest_stack_is_shown_and_the_others_beside_it(tmp_path):
    keep(tmp_path, OLD, 140.0)
    keep(tmp_path, OLD | {"gpu": "NVIDIA H100"}, 130.0)
    keep(tmp_path, NEW, 120.0)
    published = Published(tmp_path)
    assert published.newest(DECODE).environment == NEW
    row = "| 8 x 32,768 | 0.10 | 120.0 | - | 300.0 | - |"
    assert row in TABLES["decode"](published)
    told = "NVIDIA H100; torch 2.14.0, Triton 3.10.0, vLLM 0.33.0 (not a stack that pip installs)"
    assert f"{told}; commit abc1234." in TABLES["decode"](published)
    stacks = TABLES["decode-stacks"](published)
    assert "| vLLM 0.33.0, Triton 3.10.0 | vLLM 0.32.0, Triton 3.7.1 | FA3 bf16 |" in stacks
    assert "| 8 x 32,768 | 0.10 | 120.0 | 130.0 | 300.0 | - |" in stacks


def test_of_two_cards_the_one_with_more_figures_is_shown(tmp_path):
    keep(tmp_path, NEW, 120.0)
    keep(tmp_path, NEW | {"gpu": "NVIDIA H200"}, 100.0)
    keep(tmp_path, NEW, 40.0, Cell(Shape(MAIN, 1, 32_768), OURS, kept=0.1))
    assert Published(tmp_path).newest(DECODE).environment == NEW


def test_a_table_that_a_newer_stack_lacks_is_the_older_ones(tmp_path):
    keep(tmp_path, OLD, 140.0, dataclasses.replace(CELL, ahead="write"))
    keep(tmp_path, NEW, 120.0)
    assert "Triton 3.7.1" in TABLES["decode-write"](Published(tmp_path))
    with pytest.raises(ValueError, match="no figures of decode"):
        TABLES["decode-hot"](Published(tmp_path))


def test_of_several_codes_the_last_is_shown(tmp_path):
    records = Records(tmp_path / file_name("serving", NEW, "m"), SERVING, NEW)
    for repeats, ms in ((3, 9.0), (5, 7.5)):
        key = {"variant": "FFA_FP8FP8", "batch": 8, "tokens": 32_000, "repeats": repeats}
        figures = {"ms": ms, "all_ms": [ms, ms * 1.1], "kept": 0.1, "commit": "abc1234"}
        records.put(key, figures)
    records.save()
    shown = TABLES["serving"](Published(tmp_path))
    assert "| 8 x 32,000 | 0.10 | 7.50 | - | - | - | - |" in shown
    assert "which lay up to 10% apart" in shown


def judged(folder, name, environment, model, tokens, **kept):
    settings = [{"name": n, "options": None, "kept": k, "kl_mean": k / 10, "kl_max": k}
                for n, k in {"default": 1.0, **kept}.items()]  # fmt: skip
    content = {"benchmark": "quality", "environment": environment | {"commit": name}}
    content |= {"model": f"some/{model}", "text": "a/x.py, b/y.txt, a/x.py", "tokens": tokens}
    file = folder / f"quality-{name}.json"
    file.write_text(json.dumps(content | {"last": 64, "settings": settings}))


def test_quality_of_all_models_stands_in_one_table(tmp_path):
    assert "No figures" in TABLES["quality"](Published(tmp_path))
    judged(tmp_path, "old", OLD, "small", 8000, fast=0.9)
    judged(tmp_path, "b", NEW, "small", 16_000, fast=0.15, slow=0.5)
    judged(tmp_path, "a", NEW, "small", 8000, fast=0.25)
    judged(tmp_path, "c", NEW | {"gpu": "NVIDIA H200"}, "big", 8000, slow=0.12)
    shown = TABLES["quality"](Published(tmp_path))
    for line in (
        "|  | big, 8,000 | small, 8,000 | small, 16,000 |",
        "| fast | - | 0.250, 2.5e-02 | 0.150, 1.5e-02 |",
        "| slow | 0.120, 1.2e-02 | - | 0.500, 5.0e-02 |",
        "Of the last 64 tokens of x.py, y.txt.",
    ):
        assert line in shown
    assert "H200" in shown and "commit a, b." in shown and "0.900" not in shown


def test_like_settings_stand_side_by_side():
    share = {"rule": "share", "block_size": None}
    options = {
        "default, batch of 4": {},
        "exact": {"rule": "threshold", "block_size": None, "delta": None},
        "tau=0.006": share | {"tau": 0.006},
        "balanced": share | {"tau": 0.012, "scan": "base"},
        "balanced,scan=int4": share | {"tau": 0.012, "scan": "int4"},
        "tau=0.012,block_size=64": share | {"tau": 0.012, "block_size": 64},
        "delta=2": {"rule": "threshold", "block_size": None, "delta": 2.0},
    }
    assert sorted(options, key=lambda name: order_of(options[name])) == list(options)


def timed(folder, environment, **figures):
    """`figures`: options, kept and microseconds, of two layers that take a little less and more."""
    records = [
        {"layer": layer, "length": 32_000, "batch": 8, "us": us + layer - 1, "kept": kept}
        | {"series": name if name.startswith("fa3") else "ours", "setting": name}
        | {"options": options, "kept_by_head": [], "error": 0.1, "commit": "bcd2345"}
        for name, (options, kept, us) in figures.items()
        for layer in (0, 2)
    ]
    shape = {"num_heads": 32, "num_kv_heads": 8, "head_size": 128}
    content = {"benchmark": "layers", "environment": environment, "model": "small"}
    (folder / "layers-a.json").write_text(
        json.dumps(content | {"shape": shape, "figures": records})
    )


def test_presets_stand_beside_both_caches(tmp_path):
    def share(tau, block_size=16):
        return {"rule": "share", "tau": tau, "block_size": block_size}

    judged(tmp_path, "a", NEW, "small", 8000, **{"fp8 cache": 1.0, "fine": 0.06, "coarse": 0.02})
    file = tmp_path / "quality-a.json"
    content = json.loads(file.read_text())
    for setting, tau in zip(content["settings"][2:], (0.012, 0.05), strict=True):
        setting["options"] = share(tau)
    file.write_text(json.dumps(content))
    peers = {"fa3-bf16": ({}, 1.0, 360.0), "fa3-fp8": ({}, 1.0, 180.0)}
    ours = {"near": (share(0.01, None), 0.065, 120.0), "pages": (share(0.01, 64), 0.02, 90.0)}
    timed(tmp_path, NEW, **peers, **ours)
    shown = TABLES["presets"](Published(tmp_path))
    (balanced,) = (line for line in shown.splitlines() if line.startswith("| `balanced`"))
    assert balanced.endswith("| 513 | 0.060, 6.0e-03 (0.06) | 120.0 (at 0.065) | 3.00 | 1.50 |")
    (fast,) = (line for line in shown.splitlines() if line.startswith("| `fast`"))
    assert fast.endswith("| 513 | 0.020, 2.0e-03 (0.02) | 120.0 (at 0.065) | 3.00 | 1.50 |")
    timed(tmp_path, NEW, **peers, less=(share(0.2), 0.01, 80.0))
    shown = TABLES["presets"](Published(tmp_path))
    assert shown.count("| not measured yet | - | - |") == 3  # exact, too
    assert "| vLLM's fp8 cache | 256 | 1, 1.0e-01 | 180.0 | 2.00 | 1.00 |" in shown
    assert "commit a. Decode: a layer of small" in shown and "commit bcd2345." in shown


def test_unknown_names_are_told():
    with pytest.raises(ValueError, match="no table is called 'decade'"):
        fill("<!-- table: decade -->\n<!-- /table -->", TABLES, Published(ROOT / "plot"))


def test_a_file_of_something_else_is_told(tmp_path):
    (tmp_path / "some.json").write_text(json.dumps({"benchmark": "x", "figures": []}))
    with pytest.raises(ValueError, match="some.json holds no figures of decode: it is of x"):
        Published(tmp_path)


def test_the_command_makes_a_stale_page_again(tmp_path):
    for name in ("README.md", "docs", "plot", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    page = tmp_path / "README.md"
    page.unlink()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    page.write_text(text.replace("| 8 x 131,072 |", "| 9 x 131,072 |"), encoding="utf-8")
    (tmp_path / "scripts").unlink()
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "make_tables.py"
    script.write_bytes((ROOT / "scripts" / "make_tables.py").read_bytes())

    def make(*arguments) -> int:
        return subprocess.run([sys.executable, script, *arguments], cwd=tmp_path).returncode

    assert make("--check") == 1 and "9 x 131,072" in page.read_text(encoding="utf-8")
    assert make() == 0 and page.read_text(encoding="utf-8") == text
    assert make("--check") == 0

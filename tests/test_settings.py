"""Settings of the command line: names and options, or an error that says what is wrong."""

import argparse
import json

import pytest

from vllm_ffa_fp8fp8.config import FFAConfig
from vllm_ffa_fp8fp8.settings import add_setting_arguments, parse_setting, settings_of


def settings(*words):
    parser = argparse.ArgumentParser()
    add_setting_arguments(parser)
    return settings_of(parser.parse_args(words))


@pytest.mark.parametrize(
    "text, options",
    [
        ("fast", {"preset": "fast"}),
        ("delta=5,block_size=16", {"delta": 5.0, "block_size": 16}),
        ("fast, v_cache_dtype = fp8", {"preset": "fast", "v_cache_dtype": "fp8"}),
        ("preset=exact,min_context=0", {"preset": "exact", "min_context": 0}),
        ("dense_layers=[0, -1],delta=1e-1", {"dense_layers": [0, -1], "delta": 0.1}),
        ("delta=null", {"delta": None}),
        ("delta=inf,use_fp8_residual=false", {"delta": None, "use_fp8_residual": False}),
        ("fused_kproj=off", {"fused_kproj": "off"}),
        ("fast,tau=3e-2", {"preset": "fast", "tau": 0.03}),
        ("rule=share,block_size=64", {"rule": "share", "block_size": 64}),
    ],
)
def test_a_setting_is_a_preset_and_options_on_top(text, options):
    setting = parse_setting(text)
    assert setting.name == text
    assert setting.options == FFAConfig.load(overrides=options).to_dict()
    assert FFAConfig(**json.loads(json.dumps(setting.options))) == setting.config


def test_settings_come_in_the_order_given_each_once(tmp_path, monkeypatch):
    file = tmp_path / "mine.yaml"
    file.write_text("delta: 3\nblock_size: 32\n")
    words = [
        "--preset",
        "fast",
        str(file),
        "--delta",
        "2",
        "5",
        "--setting",
        "delta=5,min_context=7",
    ]
    found = settings(*words, "--setting", "fast", "exact", "--delta", "2")
    names = ["fast", str(file), "delta=2", "delta=5", "delta=5,min_context=7", "exact"]
    assert [setting.name for setting in found] == names
    assert found[1].config == FFAConfig(rule="threshold", delta=3, block_size=32)
    limits = [setting.config.limit for setting in found]
    assert limits == [0.05, 3.0, 2.0, 5.0, 5.0, None]
    monkeypatch.setenv("FFA_FP8FP8_CONFIG", str(file))
    (pair,) = settings("--delta", "4")
    assert pair.config == FFAConfig(rule="threshold", delta=4, block_size=32)


def test_tau_is_a_short_form(monkeypatch):
    monkeypatch.delenv("FFA_FP8FP8_CONFIG", raising=False)
    found = settings("--tau", "0.1", "1e-3", "--delta", "5", "--tau", "null")
    assert [setting.name for setting in found] == ["tau=0.1", "tau=1e-3", "delta=5", "tau=null"]
    assert [setting.config.rule for setting in found] == ["share", "share", "threshold", "share"]
    assert [setting.config.limit for setting in found] == [0.1, 0.001, 5.0, None]


def test_without_any_setting_the_options_in_force_are_taken(monkeypatch):
    monkeypatch.delenv("FFA_FP8FP8_CONFIG", raising=False)
    assert [setting.name for setting in settings()] == ["balanced"]
    monkeypatch.setenv("FFA_FP8FP8_CONFIG", "exact")
    (in_force,) = settings()
    assert in_force.name == "exact" and not in_force.config.prunes
    monkeypatch.setenv("FFA_FP8FP8_CONFIG", "exakt")
    with pytest.raises(ValueError, match="did you mean 'exact'"):
        settings()


@pytest.mark.parametrize(
    "words, says",
    [
        (["--setting", "dleta=5"], "did you mean 'delta'"),
        (["--setting", "delta=5,fast"], "'fast'"),
        (["--setting", "delta=5,delta=6"], "'delta' twice"),
        (["--setting", "delta=,block_size=16"], "'delta='"),
        (["--setting", "delta=5,"], "such as balanced or tau=0.02,block_size=64"),
        (["--setting", "block_size=17"], "16, 32, 64, 128"),
        (["--preset", "fasst"], "did you mean 'fast'"),
        (["--preset", "none.yaml"], "cannot read"),
        (["--delta", "2", "-1"], "-1"),
        (["--tau", "2"], "a number between 0 and 1"),
        (["--setting", "tau=0.1,delta=5"], "'delta' and 'tau'"),
        (["--delta", "nan"], "a number >= 0"),
        (["--delta", "much"], "a number >= 0"),
    ],
)
def test_a_wrong_setting_is_an_error_that_says_what_is_wrong(words, says, capsys):
    with pytest.raises(SystemExit):
        settings(*words)
    assert says in capsys.readouterr().err

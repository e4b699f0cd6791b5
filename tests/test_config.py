"""Options: presets, precedence, and an error for everything that is wrong."""

import dataclasses
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest

from vllm_ffa_fp8fp8.config import FFAConfig, preset_names

BAD_OPTIONS = {
    "unknown key": (
        {"detla": 3.0},
        [
            "'detla' = 3.0",
            "did you mean 'delta'?",
            "rule, delta, tau, block_size",
        ],
    ),
    "unknown key unlike any": ({"xyz": 1}, ["'xyz' = 1", "allowed are rule"]),
    "delta negative": ({"delta": -1}, ["'delta' = -1 (int)", "a number >= 0"]),
    "delta not a number": ({"delta": math.nan}, ["'delta' = nan", "a number >= 0"]),
    "delta text": ({"delta": "10"}, ["'delta' = '10' (str)", "a number >= 0", "null"]),
    "delta beyond a float": ({"delta": 10**400}, ["'delta' = 1000000", "(int)", "a number >= 0"]),
    "delta bool": ({"delta": True}, ["'delta' = True (bool)", "a number >= 0"]),
    "rule unknown": ({"rule": "mass"}, ["'rule' = 'mass' (str)", "threshold or share"]),
    "tau zero": ({"tau": 0}, ["'tau' = 0 (int)", "a number between 0 and 1", "null"]),
    "tau one": ({"tau": 1.0}, ["'tau' = 1.0", "a number between 0 and 1"]),
    "tau negative": ({"tau": -0.1}, ["'tau' = -0.1", "a number between 0 and 1"]),
    "tau not a number": ({"tau": math.nan}, ["'tau' = nan", "a number between 0 and 1"]),
    "tau text": ({"tau": "0.1"}, ["'tau' = '0.1' (str)", "a share of the softmax"]),
    "tau bool": ({"tau": True}, ["'tau' = True (bool)", "a number between 0 and 1"]),
    "delta and tau": ({"delta": 5, "tau": 0.1}, ["'delta' and 'tau'", "leave out one"]),
    "delta by share": (
        {"rule": "share", "delta": 5},
        ["'delta' in additional_config", "belongs to rule 'threshold'", "set 'tau'"],
    ),
    "tau by threshold": (
        {"rule": "threshold", "tau": 0.1},
        ["'tau' in additional_config", "belongs to rule 'share'", "set 'delta'"],
    ),
    "thresholds by share": (
        {"tau": 0.1, "precomputed_threshold": True},
        ["'precomputed_threshold' = True", "set rule: threshold"],
    ),
    "block_size odd": ({"block_size": 48}, ["'block_size' = 48", "16, 32, 64, 128, or null"]),
    "block_size float": ({"block_size": 64.0}, ["'block_size' = 64.0 (float)", "16, 32, 64, 128"]),
    "block_size bool": ({"block_size": True}, ["'block_size' = True", "largest power of two"]),
    "use_fp8_residual int": ({"use_fp8_residual": 1}, ["'use_fp8_residual' = 1 (int)", "true or"]),
    "v_cache_dtype of vLLM": (
        {"v_cache_dtype": "fp8_e5m2"},
        ["'v_cache_dtype' = 'fp8_e5m2' (str)", "auto (the model's dtype) or fp8"],
    ),
    "v_cache_dtype int": ({"v_cache_dtype": 8}, ["'v_cache_dtype' = 8 (int)", "auto (the model's"]),
    "v_cache_dtype null": ({"v_cache_dtype": None}, ["'v_cache_dtype' = None", "or fp8"]),
    "precomputed_threshold text": (
        {"precomputed_threshold": "yes"},
        ["'precomputed_threshold' = 'yes' (str)", "true or false"],
    ),
    "record_skip_ratio null": (
        {"record_skip_ratio": None},
        ["'record_skip_ratio' = None", "true or false"],
    ),
    "fused_kproj unknown": ({"fused_kproj": "yes"}, ["'fused_kproj' = 'yes'", "'auto', 'on' or"]),
    "fused_kproj int": ({"fused_kproj": 1}, ["'fused_kproj' = 1 (int)", "'auto', 'on' or 'off'"]),
    "dense_layers int": ({"dense_layers": 3}, ["'dense_layers' = 3 (int)", "a list of layer"]),
    "dense_layers of bool": ({"dense_layers": [True]}, ["'dense_layers' = [True]", "a list of"]),
    "dense_layers of text": ({"dense_layers": ["0"]}, ["'dense_layers' = ['0']", "a list of"]),
    "min_context negative": ({"min_context": -5}, ["'min_context' = -5", "an integer >= 0"]),
    "min_context float": ({"min_context": 1.5}, ["'min_context' = 1.5 (float)", "an integer >= 0"]),
    "min_context beyond int32": ({"min_context": 2**31}, ["'min_context' = 2147", "< 2**31"]),
    "unknown preset": (
        {"preset": "balancd"},
        ["'balancd'", "did you mean 'balanced'?", "balanced, exact, fast", ".yaml"],
    ),
    "preset not a name": ({"preset": 5}, ["preset 5", "balanced, exact, fast"]),
    "preset false": ({"preset": False}, ["preset False", "balanced, exact, fast"]),
    "preset zero": ({"preset": 0}, ["preset 0", "balanced, exact, fast"]),
    "preset a list": ({"preset": []}, ["preset []", "balanced, exact, fast"]),
    "preset empty": ({"preset": ""}, ["preset ''", "balanced, exact, fast"]),
}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("FFA_FP8FP8_CONFIG", raising=False)


def write(path, text):
    path.write_text(text)
    return str(path)


def test_presets_are_the_documented_ones():
    assert preset_names() == ["balanced", "exact", "fast"]
    exact, balanced, fast = (FFAConfig.load(name) for name in ("exact", "balanced", "fast"))
    assert exact.delta == math.inf and not exact.prunes
    for config, tau in ((balanced, 0.012), (fast, 0.05)):
        assert (config.rule, config.tau, config.min_context) == ("share", tau, 1024)
        assert config.prunes and config.block_size_in(page_size=64) == 16
    assert exact.use_fp8_residual and balanced.use_fp8_residual and fast.use_fp8_residual
    assert {config.v_cache_dtype for config in (exact, balanced, fast)} == {"auto"}
    assert FFAConfig.load() == FFAConfig.load(overrides={"preset": None}) == balanced
    assert FFAConfig() == balanced  # what a file leaves out


@pytest.mark.parametrize("overrides, fragments", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_option_is_named(overrides, fragments):
    with pytest.raises(ValueError) as raised:
        FFAConfig.load(overrides=overrides)
    for fragment in fragments:
        assert fragment in str(raised.value)


def test_bad_option_names_its_source(tmp_path):
    with pytest.raises(ValueError, match=r"in additional_config\['ffa_fp8fp8'\]"):
        FFAConfig.load(overrides={"delta": -1})
    path = write(tmp_path / "mine.yaml", "delta: -1")
    with pytest.raises(ValueError, match=f"'delta' = -1 .*in preset '{path}'"):
        FFAConfig.load(path)
    with pytest.raises(ValueError, match="'delta' = -1 .*in FFAConfig"):
        FFAConfig(delta=-1)


@pytest.mark.parametrize(
    "text, fragment",
    [
        ("delta: [1", "cannot read its options"),
        ("- delta", "must be a mapping"),
        ("", "holds None"),
        ("detla: 1", "did you mean 'delta'?"),
        ("preset: fast", "Unknown option 'preset'"),
    ],
)
def test_bad_file(tmp_path, text, fragment):
    path = write(tmp_path / "bad.yaml", text)
    with pytest.raises(ValueError) as raised:
        FFAConfig.load(path)
    assert path in str(raised.value) and fragment in str(raised.value)


def test_missing_file(monkeypatch, tmp_path):
    monkeypatch.setenv("FFA_FP8FP8_CONFIG", str(tmp_path / "none.yaml"))
    with pytest.raises(ValueError, match="none.yaml.*No such file"):
        FFAConfig.load()


@pytest.mark.parametrize("overrides", [[1], "delta=3", 3])
def test_overrides_must_be_a_mapping(overrides):
    with pytest.raises(ValueError, match=r"additional_config\['ffa_fp8fp8'\] is .*mapping"):
        FFAConfig.load(overrides=overrides)


@pytest.mark.parametrize("text, value", [("off", "off"), ("on", "on"), ("auto", "auto")])
def test_yaml_reads_on_and_off_as_booleans(tmp_path, text, value):
    file = tmp_path / "options.yaml"
    file.write_text(f"fused_kproj: {text}")
    assert FFAConfig.load(preset=str(file)).fused_kproj == value


def test_precedence(monkeypatch, tmp_path):
    text = "delta: 7\nmin_context: 3\nblock_size: 32\nv_cache_dtype: fp8"
    mine = write(tmp_path / "mine.yaml", text)
    monkeypatch.setenv("FFA_FP8FP8_CONFIG", mine)
    expected = FFAConfig(
        rule="threshold", delta=7.0, min_context=3, block_size=32, v_cache_dtype="fp8"
    )
    assert FFAConfig.load() == expected
    overridden = FFAConfig.load(overrides={"delta": 8, "block_size": None, "v_cache_dtype": "auto"})
    assert overridden == FFAConfig(rule="threshold", delta=8.0, min_context=3)
    assert FFAConfig.load("fast").limit == 0.05
    assert FFAConfig.load("fast", {"preset": "exact"}).delta == math.inf
    fast = FFAConfig.load(overrides={"preset": "fast", "min_context": 0})
    assert fast == FFAConfig(tau=0.05, min_context=0)
    monkeypatch.setenv("FFA_FP8FP8_CONFIG", "fast")
    assert FFAConfig.load().limit == 0.05
    monkeypatch.setenv("FFA_FP8FP8_CONFIG", "")
    assert FFAConfig.load() == FFAConfig.load("balanced")


def test_stored_forms():
    config = FFAConfig.load(overrides={"delta": 3, "dense_layers": [0, 2]})
    assert type(config.delta) is float and config.dense_layers == (0, 2)
    assert FFAConfig.load(overrides={"delta": None}).delta == math.inf
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.delta = 1.0


def test_complete_options_need_no_preset(monkeypatch):
    options = {"dense_layers": [-1], "block_size": 16, "v_cache_dtype": "fp8"}
    config = FFAConfig.load("exact", options, num_layers=4)
    monkeypatch.setenv("FFA_FP8FP8_CONFIG", "/not/on/this/node.yaml")
    assert FFAConfig.load(overrides=json.loads(json.dumps(config.to_dict()))) == config


def test_dense_layers_of_a_model():
    config = FFAConfig.load(overrides={"dense_layers": [-1, 3, 0, -4]}, num_layers=4)
    assert config.dense_layers == (0, 3)
    for layer in (4, -5):
        with pytest.raises(ValueError, match=rf"'dense_layers'.* no layer {layer};.* -4 to 3"):
            FFAConfig.load(overrides={"dense_layers": [0, layer]}, num_layers=4)


def test_from_vllm_config():
    def vllm_config(additional_config):
        model_config = SimpleNamespace(get_total_num_hidden_layers=lambda: 4)
        return SimpleNamespace(model_config=model_config, additional_config=additional_config)

    options = {"ffa_fp8fp8": {"delta": 1, "dense_layers": [-1]}, "other": {"delta": -1}}
    config = FFAConfig.from_vllm_config(vllm_config(options))
    assert (config.delta, config.dense_layers) == (1.0, (3,))
    assert FFAConfig.from_vllm_config(vllm_config({})) == FFAConfig.load()
    assert FFAConfig.from_vllm_config(vllm_config(object())) == FFAConfig.load()
    with pytest.raises(ValueError, match="no layer 9"):
        FFAConfig.from_vllm_config(vllm_config({"ffa_fp8fp8": {"dense_layers": [9]}}))
    for key in ("ffa-fp8fp8", "FFA_FP8FP8", "ffa_fp8fp9", "ffa_fp8_fp8"):
        with pytest.raises(ValueError, match=f"Unknown key '{key}' .*under 'ffa_fp8fp8'"):
            FFAConfig.from_vllm_config(vllm_config({key: {"delta": 8.0}}))
    for key in ("fp8", "ffa", "delta", 3):  # another plugin's
        assert FFAConfig.from_vllm_config(vllm_config({key: {}})) == FFAConfig.load()


def test_importing_costs_little():
    code = (
        "import sys, vllm_ffa_fp8fp8.plugin, vllm_ffa_fp8fp8.config\n"
        "import vllm_ffa_fp8fp8.integration.patches\n"
        "assert not {'torch', 'vllm', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dense_layers_are_those_of_the_model_that_is_drafted_for():
    def model(num_layers):
        return SimpleNamespace(get_total_num_hidden_layers=lambda: num_layers)

    config = SimpleNamespace(
        model_config=model(1),  # the draft model's own configuration
        speculative_config=SimpleNamespace(target_model_config=model(4)),
        additional_config={"ffa_fp8fp8": {"dense_layers": [0, -1]}},
    )
    assert FFAConfig.from_vllm_config(config).dense_layers == (0, 3)


@pytest.mark.parametrize(
    "options, rule, limit",
    [
        ({"tau": 0.1}, "share", 0.1),
        ({"tau": None}, "share", None),
        ({"rule": "share"}, "share", FFAConfig.tau),
        ({"delta": 3}, "threshold", 3.0),
        ({"delta": None}, "threshold", None),
        ({"rule": "threshold"}, "threshold", FFAConfig.delta),
    ],
)
def test_the_rule_follows_the_limit_that_is_said(options, rule, limit):
    for preset in ({}, {"preset": "exact"}, {"preset": "balanced"}):
        config = FFAConfig.load(overrides=preset | options)
        assert config.rule == rule
        if options.keys() != {"rule"}:
            assert config.limit == limit and config.prunes == (limit is not None)
    assert FFAConfig(rule=rule, **{k: v for k, v in options.items() if k != "rule"}).limit == limit


def test_an_option_overrides_a_preset_of_the_other_rule(tmp_path):
    shares = write(tmp_path / "shares.yaml", "tau: 0.02\nblock_size: 32")
    thresholds = write(tmp_path / "thresholds.yaml", "delta: 4\nblock_size: 32")
    assert FFAConfig.load(shares) == FFAConfig(rule="share", tau=0.02, block_size=32)
    over = FFAConfig.load(shares, {"delta": 7})
    assert (over.rule, over.limit, over.block_size) == ("threshold", 7.0, 32)
    over = FFAConfig.load(thresholds, {"tau": 0.3})
    assert (over.rule, over.limit, over.block_size) == ("share", 0.3, 32)
    precomputed = write(tmp_path / "precomputed.yaml", "precomputed_threshold: true")
    with pytest.raises(ValueError, match="'precomputed_threshold' = True .*rule is 'share'"):
        FFAConfig.load(precomputed, {"tau": 0.3})
    with pytest.raises(ValueError, match=f"'delta' and 'tau' in preset '{tmp_path}/both.yaml'"):
        FFAConfig.load(write(tmp_path / "both.yaml", "delta: 4\ntau: 0.1"))


@pytest.mark.parametrize("options", [{"tau": 0.2, "dense_layers": [1]}, {"delta": 2.5}])
def test_workers_have_the_rule_of_the_engine(monkeypatch, options):
    config = FFAConfig.load(overrides=options)
    monkeypatch.setenv("FFA_FP8FP8_CONFIG", "/not/on/this/node.yaml")
    assert FFAConfig.load(overrides=json.loads(json.dumps(config.to_dict()))) == config

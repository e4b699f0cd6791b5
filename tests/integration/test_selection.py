"""Every way to choose the backend, and that nothing changes where it is not chosen.

Needs the package installed: vLLM finds the plugin through its entry points."""

import copyreg
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.cli.serve import make_arg_parser
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_ffa_fp8fp8 import plugin
from vllm_ffa_fp8fp8.attention.geometry import read_engine_config
from vllm_ffa_fp8fp8.config import FFAConfig
from vllm_ffa_fp8fp8.integration import compat, patches

MODEL = str(Path(__file__).parents[1] / "assets" / "recall-9m")
UNKNOWN = "Unknown vLLM environment variable detected: VLLM_ATTENTION_BACKEND"
on_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU platform")


class Records(logging.Handler):
    """The messages of vLLM's logger, which does not propagate."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())

    def warnings_about_variable(self):
        return [message for message in self.messages if message == UNKNOWN]

    def about_misplaced_options(self):
        return [message for message in self.messages if "does not read" in message]

    def options(self):
        return [message for message in self.messages if message.startswith("FFA_FP8FP8 options")]


@pytest.fixture(scope="module", autouse=True)
def configured_logging():
    """The first engine configuration resets the handlers of vLLM's logger."""
    engine_config()


@pytest.fixture
def log(monkeypatch):
    monkeypatch.delenv("VLLM_ATTENTION_BACKEND", raising=False)
    monkeypatch.delenv("FFA_FP8FP8_CONFIG", raising=False)
    records = Records()
    logging.getLogger("vllm").addHandler(records)
    yield records
    logging.getLogger("vllm").removeHandler(records)


def engine_config(**arguments):
    return EngineArgs(model=MODEL, **arguments).create_engine_config()


def chosen(vllm_config):
    backend = vllm_config.attention_config.backend
    return backend and backend.name


def serve_arguments(*arguments):
    parser = make_arg_parser(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", MODEL, *arguments]))


WAYS = {
    "attention_backend": lambda: engine_config(attention_backend="FFA_FP8FP8"),
    "attention_backend in lower case": lambda: engine_config(attention_backend="ffa_fp8fp8"),
    "attention_config": lambda: engine_config(attention_config={"backend": "FFA_FP8FP8"}),
    "serve --attention-backend": lambda: serve_arguments(
        "--attention-backend", "FFA_FP8FP8"
    ).create_engine_config(),
    "serve --attention-config": lambda: serve_arguments(
        "--attention-config", '{"backend": "FFA_FP8FP8"}'
    ).create_engine_config(),
}


@pytest.mark.parametrize("choose", WAYS.values(), ids=WAYS)
def test_argument_chooses(log, choose):
    vllm_config = choose()
    assert chosen(vllm_config) == "FFA_FP8FP8"
    (message,) = log.options()
    assert "rule=share, tau=0.012" in message and "min_context=1024" in message


@pytest.mark.parametrize("value", ["FFA_FP8FP8", "ffa_fp8fp8"])
def test_variable_chooses_without_warning(log, monkeypatch, value):
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", value)
    assert chosen(engine_config()) == "FFA_FP8FP8"
    assert chosen(serve_arguments().create_engine_config()) == "FFA_FP8FP8"
    assert not log.warnings_about_variable() and len(log.options()) == 2


@pytest.mark.parametrize(
    "arguments, backend",
    [
        ({"attention_backend": "CPU_ATTN"}, "CPU_ATTN"),
        ({"attention_config": {"backend": "CPU_ATTN"}}, "CPU_ATTN"),
        ({"attention_backend": "auto"}, None),
    ],
)
def test_argument_wins_over_variable(log, monkeypatch, arguments, backend):
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "FFA_FP8FP8")
    assert chosen(engine_config(**arguments)) == backend
    assert not log.warnings_about_variable() and not log.options()


def test_variable_leaves_the_arguments_alone(log, monkeypatch):
    engine_args = EngineArgs(model=MODEL)
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "FFA_FP8FP8")
    assert chosen(engine_args.create_engine_config()) == "FFA_FP8FP8"
    monkeypatch.delenv("VLLM_ATTENTION_BACKEND")
    assert chosen(engine_args.create_engine_config()) is None


@pytest.mark.parametrize("value", ["FLASH_ATTN", "FFA", ""])
def test_other_values_stay_vllms_business(log, monkeypatch, value):
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", value)
    assert chosen(engine_config()) is None
    assert log.warnings_about_variable() == [UNKNOWN] and not log.options()
    with pytest.raises(ValueError, match=UNKNOWN):
        engine_config(fail_on_environ_validation=True)


def test_not_chosen_changes_nothing(log, monkeypatch):
    monkeypatch.setenv("FFA_FP8FP8_CONFIG", "no such preset")
    given = {"ffa_fp8fp8": {"detla": 1}, "ffa-fp8fp8": {}, "delta": 8.0}
    vllm_config = engine_config(additional_config=given)
    assert chosen(vllm_config) is None and vllm_config.additional_config == given
    assert not log.warnings_about_variable() and not log.options()
    assert not log.about_misplaced_options()


def test_options_in_the_wrong_place_are_told_once(log):
    given = {"delta": 8.0, "other": 1, "preset": "fast"}
    for _ in range(2):
        engine_config(attention_backend="FFA_FP8FP8", additional_config=given)
    (message,) = log.about_misplaced_options()
    assert "'delta', 'preset' of additional_config" in message and "'ffa_fp8fp8'" in message
    with pytest.raises(ValueError, match="Unknown key 'ffa-fp8fp8'"):
        engine_config(attention_backend="FFA_FP8FP8", additional_config={"ffa-fp8fp8": {}})


@pytest.mark.parametrize(
    "attention_config",
    [{"backend": "FFA_FP8FP8"}, {"backend_per_kind": {"full_attention": "FFA_FP8FP8"}}],
)
def test_bad_options_stop_the_main_process(log, attention_config):
    for options, message in (
        ({"detla": 1}, "did you mean 'delta'"),
        ({"dense_layers": [4]}, "no layer 4.* -4 to 3"),
        ({"preset": "exakt"}, "did you mean 'exact'"),
    ):
        with pytest.raises(ValueError, match=message):
            engine_config(
                attention_config=attention_config, additional_config={"ffa_fp8fp8": options}
            )


NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}


def test_chosen_for_drafts_alone(log):
    """Its options are checked there, too."""
    drafts = NGRAM | {"attention_backend": "FFA_FP8FP8"}
    bad = {"ffa_fp8fp8": {"detla": 1}}
    assert chosen(engine_config(additional_config=bad, speculative_config=NGRAM)) is None
    with pytest.raises(ValueError, match="did you mean 'delta'"):
        engine_config(additional_config=bad, speculative_config=drafts)


@on_cpu
def test_engines_are_checked(log, monkeypatch):
    ours = {"attention_backend": "FFA_FP8FP8"}
    with pytest.raises(ValueError, match="does not support drafts of a separate model"):
        separate = {"method": "draft_model", "model": MODEL, "num_speculative_tokens": 2}
        engine_config(speculative_config=separate | ours, **ours)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="speculative decoding with batch invariance"):
        engine_config(speculative_config=NGRAM, **ours)


def test_bad_options_stop_serve(log):
    engine_args = serve_arguments(
        "--attention-backend=FFA_FP8FP8", '--additional-config={"ffa_fp8fp8": {"delta": -2}}'
    )
    with pytest.raises(ValueError, match="'delta' = -2"):
        engine_args.create_engine_config()


def test_unsupported_platform_stops_the_main_process(log, monkeypatch):
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: False)
    monkeypatch.setattr(type(current_platform), "is_xpu", lambda self: True)
    with pytest.raises(ValueError, match="FFA_FP8FP8 does not support the platform XPU"):
        WAYS["attention_backend"]()


def test_fp8_values_without_fp8_stop_the_main_process_and_the_workers(log, monkeypatch):
    arguments = {"attention_backend": "FFA_FP8FP8"}
    arguments["additional_config"] = {"ffa_fp8fp8": {"v_cache_dtype": "fp8"}}
    vllm_config = engine_config(**arguments)
    for module in ("attention.geometry", "environment"):
        monkeypatch.setattr(f"vllm_ffa_fp8fp8.{module}.fp8_available", lambda: False)
    with pytest.raises(ValueError, match="v_cache_dtype fp8 on a GPU without FP8"):
        engine_config(**arguments)
    with set_current_vllm_config(vllm_config):
        with pytest.raises(ValueError, match="leave v_cache_dtype at auto"):
            read_engine_config()


def test_options_travel_to_the_workers(log, monkeypatch):
    monkeypatch.setenv("FFA_FP8FP8_CONFIG", "fast")
    given = {"ffa_fp8fp8": {"dense_layers": [-1]}, "other": 1}
    vllm_config = engine_config(attention_backend="FFA_FP8FP8", additional_config=given)
    assert given == {"ffa_fp8fp8": {"dense_layers": [-1]}, "other": 1}
    assert vllm_config.additional_config["other"] == 1
    monkeypatch.setenv("FFA_FP8FP8_CONFIG", "exact")  # a worker's own environment
    config = FFAConfig.from_vllm_config(vllm_config)
    assert config == FFAConfig(rule="share", tau=0.05, min_context=1024, dense_layers=(3,))


def run_fresh(code, *arguments, **environment):
    """The output of a Python that has loaded nothing yet."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.splitlines()[-1]


def test_name_is_known_before_general_plugins_load():
    code = """if True:
        import json, sys
        import vllm.entrypoints.llm, vllm.plugins
        from vllm.config import AttentionConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        names = [AttentionConfig(backend="FFA_FP8FP8").backend.name]
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        names.append(parser.parse_args(["--attention-backend", "FFA_FP8FP8"]).attention_backend)
        config_loaded = "vllm_ffa_fp8fp8.config" in sys.modules
        print(json.dumps([names, vllm.plugins.plugins_loaded, config_loaded]))
    """
    names, plugins_loaded, config_loaded = json.loads(run_fresh(code))
    assert names == ["FFA_FP8FP8", "FFA_FP8FP8"]
    assert not plugins_loaded and not config_loaded


def test_config_unpickles_where_no_plugin_is_loaded(log, tmp_path):
    file = tmp_path / "vllm_config"
    file.write_bytes(pickle.dumps(WAYS["attention_backend"]()))
    code = """if True:
        import pickle, sys
        import vllm.config
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        assert "FFA_FP8FP8" not in AttentionBackendEnum.__members__
        vllm_config = pickle.load(open(sys.argv[1], "rb"))
        backend = vllm_config.attention_config.backend
        assert backend is AttentionBackendEnum["FFA_FP8FP8"]
        print(backend.get_path())
    """
    path = run_fresh(code, str(file), VLLM_PLUGINS="none")
    assert path == "vllm_ffa_fp8fp8.attention.backend.FFAFP8FP8Backend"


def test_other_backends_pickle_as_before(monkeypatch):
    for backend in AttentionBackendEnum:
        assert pickle.loads(pickle.dumps(backend)) is backend
    calls = []
    previous = lambda member: (calls.append(member), (type(member), (member.value,)))[1]  # noqa: E731
    monkeypatch.setitem(copyreg.dispatch_table, AttentionBackendEnum, previous)
    patches.make_backend_picklable()
    for backend in (AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum["FFA_FP8FP8"]):
        assert pickle.loads(pickle.dumps(backend)) is backend
    assert calls == [AttentionBackendEnum.CPU_ATTN]


def test_registering_again_changes_nothing():
    def state():
        return (
            list(AttentionBackendEnum.__members__),
            copyreg.dispatch_table[AttentionBackendEnum],
            EngineArgs.create_engine_config,
            type(current_platform).get_attn_backend_cls,
        )

    before = state()
    assert plugin.register_early() is None and plugin.register() is None
    assert state() == before


def test_module_that_vllm_has_not_loaded_is_patched_when_it_is():
    """Processes that never load it do not pay for it."""
    code = """if True:
        import sys
        import vllm.platforms
        from vllm_ffa_fp8fp8 import plugin

        plugin.register()
        plugin.register()
        loaded = "vllm.engine.arg_utils" in sys.modules
        from vllm.engine.arg_utils import EngineArgs

        patched = EngineArgs.create_engine_config
        plugin.register()
        print(loaded, patched.by_ffa_fp8fp8, patched is EngineArgs.create_engine_config,
              hasattr(patched.__wrapped__, "by_ffa_fp8fp8"))
    """
    assert run_fresh(code) == "False True True False"


def test_failure_leaves_vllm_running(log, monkeypatch):
    def fail():
        raise AttributeError("vLLM has changed")

    monkeypatch.setattr(patches, "apply", fail)
    plugin.register()
    assert log.messages == ["The attention backend FFA_FP8FP8 is not available."]


def test_unsupported_vllm_is_left_alone(log, monkeypatch):
    for version, supported in (((0, 31, 9), False), ((0, 33, 0, "dev1"), True), ((1, 0), False)):
        assert (compat.unsupported_vllm(version) is None) == supported
    monkeypatch.setattr("vllm.version.__version_tuple__", (0, 34, 0))
    monkeypatch.setattr("vllm.version.__version__", "0.34.0")
    monkeypatch.setattr(patches, "apply", lambda: pytest.fail("patched"))
    monkeypatch.setattr(patches, "make_backend_picklable", lambda: pytest.fail("patched"))
    plugin.register_early()
    assert not log.messages
    plugin.register()
    (message,) = log.messages
    assert "supports vLLM >=0.32,<0.34, but 0.34.0 is installed" in message


def layer(**changes):
    plain = dict(head_size=128, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=None)
    return AttentionSelectorConfig(**plain | changes)


@on_cpu
def test_cpu_platform_answers_our_class(log):
    backend = AttentionBackendEnum["FFA_FP8FP8"]
    path = current_platform.get_attn_backend_cls(backend, attn_selector_config=layer())
    assert path == "vllm_ffa_fp8fp8.attention.backend.FFAFP8FP8Backend"
    assert log.messages == ["Using AttentionBackendEnum.FFA_FP8FP8 backend."]


@on_cpu
def test_cpu_platform_refuses_like_cuda(log):
    backend = AttentionBackendEnum["FFA_FP8FP8"]
    config = layer(head_size=72, kv_cache_dtype="fp8", use_mla=True)
    with pytest.raises(ValueError, match="Selected backend .*FFA_FP8FP8 is not valid") as raised:
        current_platform.get_attn_backend_cls(backend, attn_selector_config=config)
    for what in ("head_size 72", "kv_cache_dtype 'fp8'", "MLA"):
        assert what in str(raised.value)


@on_cpu
@pytest.mark.parametrize("name", [None, "CPU_ATTN", "FLASH_ATTN"])
def test_cpu_platform_is_unchanged_for_others(log, name):
    backend = name and AttentionBackendEnum[name]
    path = current_platform.get_attn_backend_cls(backend, attn_selector_config=layer())
    assert path == AttentionBackendEnum.CPU_ATTN.get_path()
    refused = ["Cannot use AttentionBackendEnum.FLASH_ATTN backend on CPU."]
    assert log.messages == (refused if name == "FLASH_ATTN" else [])

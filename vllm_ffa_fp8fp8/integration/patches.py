"""Every change that this plugin makes to vLLM, one function each. All are idempotent, and leave
vLLM's behaviour alone wherever FFA_FP8FP8 is not the backend."""

import copyreg
import functools
import importlib.util
import sys
from collections.abc import Callable
from contextlib import contextmanager

from vllm_ffa_fp8fp8 import envs
from vllm_ffa_fp8fp8.integration import metric_files, serving_patches
from vllm_ffa_fp8fp8.integration.layer_kinds import (
    LAYERS,
    is_chosen,
    is_named,
    is_ours,
    leave_other_kinds_to_vllm,
    say_what_runs,
)
from vllm_ffa_fp8fp8.option_values import RULES
from vllm_ffa_fp8fp8.registry import BACKEND_NAME, FUSED_ATTENTION_OP, register_backend


def apply() -> None:
    """Applies the patches that choose and check the backend; called in each process that loads
    general plugins. The others wait for a layer that has our backend."""
    make_backend_picklable()
    _once_loaded("vllm.engine.arg_utils", choose_and_check_backend)
    offer_backend_on_cpu()
    _once_loaded(f"{LAYERS}.chunked_local_attention", leave_other_kinds_to_vllm)
    say_what_runs()
    serving_patches.apply(_once_loaded, is_chosen)


def make_backend_picklable() -> None:
    """Pickles our member of AttentionBackendEnum by name, through a function that registers it.

    Symptom without it: under spawn, `ValueError: '...FFAFP8FP8Backend' is not a valid
    AttentionBackendEnum` in the engine or worker process, which unpickles VllmConfig before it
    loads plugins. Can go when vLLM loads plugins first, or pickles registered backends by name.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    previous = copyreg.dispatch_table.get(AttentionBackendEnum)
    if getattr(previous, "by_ffa_fp8fp8", False):
        return

    def reduce_backend(member):
        if member.name == BACKEND_NAME:
            return register_backend, ()
        # Another plugin's reducer, or else Enum's own way.
        return previous(member) if previous else (type(member), (member.value,))

    reduce_backend.by_ffa_fp8fp8 = True
    copyreg.pickle(AttentionBackendEnum, reduce_backend)


def choose_and_check_backend() -> None:
    """Wraps EngineArgs.create_engine_config, the one way from a user's arguments to a VllmConfig
    (`LLM`, `vllm serve`): VLLM_ATTENTION_BACKEND=FFA_FP8FP8 chooses the backend, and where it is
    chosen, platform and options are checked and logged, and the options frozen for all workers.

    Symptom without it: vLLM warns that VLLM_ATTENTION_BACKEND is unknown and ignores it; a bad
    option fails in a worker process, after minutes of loading. Can go, in part, when vLLM lets
    plugins validate `additional_config`; the variable was dropped for good in vLLM 0.32.
    """
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config
    if getattr(original, "by_ffa_fp8fp8", False):
        return

    @functools.wraps(original)
    def create_engine_config(self, *args, **kwargs):
        with _chosen_by_environment(self):
            vllm_config = original(self, *args, **kwargs)
        if is_chosen(vllm_config):
            _check_and_freeze_options(vllm_config)
        elif vllm_config.additional_config:
            from vllm_ffa_fp8fp8.integration.start_checks import warn_about_unused_options

            warn_about_unused_options(vllm_config.additional_config)
        return vllm_config

    create_engine_config.by_ffa_fp8fp8 = True
    EngineArgs.create_engine_config = create_engine_config


def offer_backend_on_cpu() -> None:
    """Wraps the CPU platform's get_attn_backend_cls: for our name it validates the configuration
    and answers our class, as the CUDA platform does for every backend that the user names.

    Symptom without it: "Cannot use AttentionBackendEnum.FFA_FP8FP8 backend on CPU.", and CPU_ATTN
    runs. Can go when vLLM's CPU platform honours registered backends.
    """
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    platform_class = type(current_platform)
    original = platform_class.get_attn_backend_cls.__func__
    if getattr(original, "by_ffa_fp8fp8", False):
        return
    # Below "vllm." the record gets vLLM's handler and format.
    logger = init_logger(f"vllm.{__name__}")

    @functools.wraps(original)
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, *args, **kwargs):
        if not is_ours(selected_backend):
            return original(cls, selected_backend, attn_selector_config, *args, **kwargs)
        invalid_reasons = selected_backend.get_class().validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if invalid_reasons:
            raise ValueError(
                f"Selected backend {selected_backend} is not valid for this configuration. "
                f"Reason: {invalid_reasons}"
            )
        logger.info("Using %s backend.", selected_backend)
        return selected_backend.get_path()

    get_attn_backend_cls.by_ffa_fp8fp8 = True
    platform_class.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def note_attention_modules(impl_class: type) -> None:
    """Sets `impl.attention` of every impl of that class to the module that its layer becomes part
    of, by a hook of PyTorch's that sees modules become parts of others.

    Symptom without it: a layer cannot find the projection, the norms and the rotation that come
    before it. Can go when vLLM hands the module to `process_weights_after_loading`.
    """
    from torch.nn.modules.module import register_module_module_registration_hook

    if getattr(impl_class, "notes_attention_modules", False):
        return
    impl_class.notes_attention_modules = True

    def note(module, name, submodule):
        impl = getattr(submodule, "impl", None)
        if isinstance(impl, impl_class) and impl.attention is None:
            impl.attention = module

    register_module_module_registration_hook(note)


def fuse_forward(attention_class: type, fused_forward: Callable) -> None:
    """Wraps `attention_class.forward`: modules that have `fused_path` set run
    `fused_forward(module, positions, hidden_states)`, all others are left alone.

    Symptom without it: projection, norms, rotation and cache write are kernels of their own. Can
    go when vLLM lets a backend take over from the hidden states on.
    """
    original = attention_class.forward
    if getattr(original, "by_ffa_fp8fp8", False):
        return

    @functools.wraps(original)
    def forward(self, positions, hidden_states, *args, **kwargs):
        if getattr(self, "fused_path", None) is None:
            return original(self, positions, hidden_states, *args, **kwargs)
        return fused_forward(self, positions, hidden_states)

    forward.by_ffa_fp8fp8 = True
    attention_class.forward = forward


def split_graphs_at_fused_attention(compilation_config) -> None:
    """Lists our operator beside vLLM's attention operators where graphs are split at those. vLLM
    reads the list when it compiles, after weights are loaded.

    Symptom without it: a piecewise CUDA graph captures the operator with the slots and lengths
    of the capture, and later steps write to them. Can go with the operator.
    """
    operators = compilation_config.splitting_ops
    if operators and FUSED_ATTENTION_OP not in operators:
        operators.append(FUSED_ATTENTION_OP)


@contextmanager
def _chosen_by_environment(engine_args):
    """While VLLM_ATTENTION_BACKEND names us: vLLM knows the variable, and `engine_args` asks for
    our backend unless it asks for one already. Everything is as before afterwards."""
    import vllm.envs

    name = envs.attention_backend()
    if name is None or name.upper() != BACKEND_NAME:
        yield
        return
    given = engine_args.attention_backend
    if given is None and engine_args.attention_config.backend is None:
        engine_args.attention_backend = register_backend()
    known_variables = vllm.envs.environment_variables
    is_known = envs.ATTENTION_BACKEND_VARIABLE in known_variables
    known_variables.setdefault(envs.ATTENTION_BACKEND_VARIABLE, envs.attention_backend)
    try:
        yield
    finally:
        engine_args.attention_backend = given
        if not is_known:
            del known_variables[envs.ATTENTION_BACKEND_VARIABLE]


def _once_loaded(module_name: str, patch: Callable[[], None]) -> None:
    """Applies `patch` when the module is loaded: now, or when somebody first imports it. vLLM
    starts processes that never do, and importing it takes a second."""
    if module_name in sys.modules:
        patch()
        return

    if any(getattr(finder, "waits_for", None) == module_name for finder in sys.meta_path):
        return

    class Finder:
        waits_for = module_name

        @staticmethod
        def find_spec(name, path=None, target=None):
            if name != module_name:
                return None
            sys.meta_path.remove(Finder)
            spec = importlib.util.find_spec(name)
            load = spec.loader.exec_module

            def load_and_patch(module):
                load(module)
                patch()

            spec.loader.exec_module = load_and_patch
            return spec

    sys.meta_path.insert(0, Finder)


def _check_and_freeze_options(vllm_config) -> None:
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    from vllm_ffa_fp8fp8.config import ADDITIONAL_CONFIG_KEY, FFAConfig, misplaced_options
    from vllm_ffa_fp8fp8.environment import fp8_available
    from vllm_ffa_fp8fp8.integration.refusals import (
        check_batch_invariance,
        check_engine,
        check_options,
        check_platform,
        check_scan,
    )
    from vllm_ffa_fp8fp8.integration.start_checks import check_model

    check_platform(current_platform)
    check_engine(vllm_config)
    if is_named(vllm_config):  # for the model itself, not for drafts alone
        check_model(vllm_config, current_platform.get_device_capability())
    options = FFAConfig.from_vllm_config(vllm_config)
    check_options(options, fp8_available())
    check_scan(options, vllm_config)
    if envs.batch_invariant():
        check_batch_invariance(has_drafts=vllm_config.speculative_config is not None)
    # Workers read these, not their own environment or files, which may differ on another node.
    given = vllm_config.additional_config
    if isinstance(given, dict):
        vllm_config.additional_config = {**given, ADDITIONAL_CONFIG_KEY: options.to_dict()}
    if options.metrics:
        metric_files.share_directory()
    logger = init_logger(f"vllm.{__name__}")
    if misplaced := misplaced_options(given):
        logger.warning_once(
            "%s does not read %s of additional_config: its options belong under %r.",
            BACKEND_NAME,
            ", ".join(map(repr, misplaced)),
            ADDITIONAL_CONFIG_KEY,
        )
    known, limit = options.to_dict(), RULES[options.rule]
    shown = {"rule": options.rule, limit: known[limit]} | known  # what matters most is first
    logger.info(
        "%s options: %s", BACKEND_NAME, ", ".join(f"{name}={v}" for name, v in shown.items())
    )

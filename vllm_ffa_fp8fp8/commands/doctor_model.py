"""`ffa-fp8fp8 doctor MODEL`: what would run a model's layers, told from its config.json."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.commands.findings import MISSING, OK, WARNING, Finding
from vllm_ffa_fp8fp8.config import FFAConfig

SPREAD_TAU = 0.006
"""With which Gemma 3 270M, whose full layers have one KV head, was closer than an fp8 cache."""
VLLMS_CHOICE = "vLLM's choice of a backend"


def examine_model(model: str, capability: tuple[int, int] | None) -> Iterator[Finding]:
    """Of a folder or a name in the local cache of the Hub; `capability` of the GPU, None for the
    CPU."""
    from vllm_ffa_fp8fp8.integration.layer_kinds import check_full_attention
    from vllm_ffa_fp8fp8.integration.model_layers import layers_of_model

    try:
        config = read_model(model)
    except ValueError as error:
        advice = "give the folder of a config.json, or the name of a model that was downloaded"
        yield Finding("model", MISSING, str(error), advice)
        return
    yield Finding("model", OK, description(config))
    engine = {"kv_cache_dtype": "auto", "block_size": None, "device_capability": capability}
    found = layers_of_model(config, **engine)
    for of_kind in found:
        yield check_kind(of_kind)
    try:
        check_full_attention([of_kind.kind for of_kind in found])
    except ValueError as error:
        what, _, advice = str(error).rpartition(": ")
        yield Finding("full attention", MISSING, what, advice)
        return
    if found[0].reasons:
        return
    try:
        options = FFAConfig.load(num_layers=config.get_total_num_hidden_layers())
    except ValueError:  # doctor tells it elsewhere
        return
    yield check_cache(config, len(found[0].layers), options, capability)
    yield check_paying(config, options)
    yield from check_tau(config, options)


def read_model(model: str) -> Any:
    """vLLM's ModelConfig. Raises ValueError where there is none."""
    try:
        from vllm.engine.arg_utils import EngineArgs

        return EngineArgs(model=model, skip_tokenizer_init=True).create_model_config()
    except Exception as error:  # what can be wrong with files raises anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"{model} cannot be read: {' '.join(lines[:3])}") from error


def description(config: Any) -> str:
    layers, dtype = config.get_total_num_hidden_layers(), str(config.dtype).removeprefix("torch.")
    architectures = ", ".join(config.architectures)
    return f"{architectures}: {layers} layers, {dtype}, up to {config.max_model_len:,} tokens"


def check_kind(of_kind: Any) -> Finding:
    subject = of_kind.kind.replace("_", " ")
    found = f"{len(of_kind.layers)} layers ({ranges(of_kind.layers)})"
    if of_kind.size:
        found += f" of {of_kind.size:,} tokens"
    if of_kind.reasons:
        reasons = [reason.rpartition(": ") for reason in of_kind.reasons]
        what = "; ".join(what for what, _, _ in reasons)
        advice = "; ".join(dict.fromkeys(advice for _, _, advice in reasons))
        return Finding(subject, MISSING, f"{found}: {what}", advice)
    return Finding(subject, OK, f"{found}: {'FFA_FP8FP8' if of_kind.is_ours else VLLMS_CHOICE}")


def ranges(numbers: tuple[int, ...]) -> str:
    """Sorted numbers as text: 0-3, 5, or the first few and how far apart they are."""
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 2 and len(steps) == 1:
        step = "" if steps == {1} else f" by {steps.pop()}"
        return f"{numbers[0]}-{numbers[-1]}{step}"
    if len(numbers) > 8:
        return f"{', '.join(map(str, numbers[:6]))}, ..., {numbers[-1]}"
    return ", ".join(map(str, numbers))


def check_cache(
    config: Any, num_layers: int, options: FFAConfig, capability: tuple[int, int] | None
) -> Finding:
    """Bytes that a token takes in all layers of full attention, on all ranks together."""
    from vllm_ffa_fp8fp8.integration.model_layers import full_head_size
    from vllm_ffa_fp8fp8.kernels.cache.page_layout import PageLayout

    has_fp8 = capability is None or capability >= environment.FP8_CAPABILITY
    layout = PageLayout(
        full_head_size(config),
        config.dtype,
        fp8_key=has_fp8,
        residual=has_fp8 and options.use_fp8_residual,
        fp8_value=options.v_cache_dtype == "fp8",
        key_code=options.scans_codes,
    )
    heads = num_layers * config.get_total_num_kv_heads()
    ours = heads * layout.bytes_per_token
    fp8 = heads * 2 * full_head_size(config)
    return Finding(
        "cache",
        OK,
        f"{ours:,} bytes a token in full attention; {2 * fp8:,} as bf16, {fp8:,} as fp8",
        f"{ours / (2 * fp8):.2f} of a bf16 cache, {ours / fp8:.2f} of an fp8 cache; "
        f"{2**30 // ours:,} tokens a GiB",
    )


def check_tau(config: Any, options: FFAConfig) -> Iterator[Finding]:
    """A warning where the one measured model of this kind needed a smaller one."""
    if options.rule != "share" or not options.prunes or options.limit <= SPREAD_TAU:
        return
    if config.get_total_num_kv_heads() == 1:
        yield Finding(
            "tau",
            WARNING,
            f"{options.limit:g}, and the model has one KV head: Gemma 3 270M, which has one, too, "
            f"spread its attention and needed {SPREAD_TAU} to be closer than an fp8 cache",
            "`ffa-fp8fp8 calibrate` finds the value for this model and your text",
        )


def check_paying(config: Any, options: FFAConfig) -> Finding:
    """From which length on decode attention is faster, where that was measured."""
    from vllm_ffa_fp8fp8.bench.pays import KEPT, figures_of
    from vllm_ffa_fp8fp8.integration.model_layers import full_head_size

    subject, head_size = "pays", full_head_size(config)
    group = config.model_arch_config.total_num_attention_heads // config.get_total_num_kv_heads()
    clone = environment.find_clone()
    if clone is None:
        advice = "the figures lie in the repository; `ffa-fp8fp8 bench decode` times it here"
        return Finding(subject, WARNING, "from a length that is not known here", advice)
    figures = figures_of(clone / "plot", group, head_size)
    if figures is None or figures.first_tokens is None:
        shape = f"{group} query heads a KV head, of size {head_size}"
        advice = "`ffa-fp8fp8 bench decode` times a geometry on a Hopper GPU"
        return Finding(subject, WARNING, f"from a length that is not known: {shape}", advice)
    first = max(figures.first_tokens, options.min_context)
    rows = {row.tokens: row for row in reversed(figures.rows) if row.tokens >= first}
    listed = ", ".join(
        f"{row.batch} x {row.tokens:,}: {row.over_bf16:.1f}" for row in reversed(rows.values())
    )
    shorter = "" if len(figures.rows) > 1 else "; shorter ones were not timed"
    return Finding(
        subject,
        OK,
        f"from {first:,} tokens on where {KEPT:.0%} of the blocks are kept{shorter}. Times as fast "
        f"as FlashAttention 3 with a bf16 cache (requests x tokens): {listed}",
        f"decode attention alone, of a step; {figures.geometry.num_heads} over "
        f"{figures.geometry.num_kv_heads} heads, {figures.source.environment['gpu']}, "
        f"{figures.source.stack}, rule: threshold; by share it takes 6 to 47% longer where as much "
        "is kept, the shorter the more, and keeps less for the same error; how much your model "
        "keeps: `ffa-fp8fp8 quality`",
    )

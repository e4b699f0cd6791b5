"""The options of FFA_FP8FP8: a YAML preset, overridden by vLLM's `additional_config`."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vllm_ffa_fp8fp8 import envs
from vllm_ffa_fp8fp8 import option_values as values
from vllm_ffa_fp8fp8.option_values import RULES

ADDITIONAL_CONFIG_KEY = "ffa_fp8fp8"
DEFAULT_PRESET = "balanced"


@dataclass(frozen=True)
class FFAConfig:
    """Options of the backend, the same in every process. Construction raises ValueError, which
    names key, value and the allowed values."""

    rule: str = values.option("share", values.rule, " or ".join(RULES))
    """How blocks to read are chosen: by their best score (`delta`), or by their share of the
    softmax (`tau`). Where `delta` or `tau` is said, it follows."""

    delta: float = values.option(
        10.0, values.delta, "a number >= 0 (log2 units), or null (.inf in YAML) for no pruning"
    )
    """How far a block's best score may lie below that of the request's first and last tokens, in
    log2 units, and be kept."""

    tau: float | None = values.option(
        0.012,
        values.tau,
        "a number between 0 and 1 (a share of the softmax), or null to read everything",
    )
    """From which share of a query head's softmax on a block is read for sure, the largest share
    of a KV head's query heads counting. One with a smaller share w is read with probability
    w / tau, and counts tau / w times if it is.

    With o_b what attention to block b alone gives and o its mean by shares, the exact output, the
    error is to first order the sum over blocks of (x_b - 1) w_b (o_b - o), where x_b is tau / w_b
    with probability w_b / tau and else 0. Its mean is 0. With a draw a block its variance is
    sum (tau / w_b - 1) w_b^2 |o_b - o|^2 <= tau M D^2: M is the share of all blocks below tau
    together, D the largest |o_b - o|. So the error is at most sqrt(tau M) D, root mean square,
    whatever the keys and however long the context. Draws are systematic: a program's chunk that
    leaves M_c to its draw reads M_c / tau of these blocks, rounded up or down, and its variance is
    at most ceil(M_c / tau) tau M_c D^2 in any order of blocks; the first bound holds up to one
    draw a chunk, and the factor is reached only where values alternate in step with the draw.
    Shares are of the denominator that a program estimates: where it takes Z for c Z, tau stands
    for c tau. Blocks read in expectation, of a query head: at most 1 / tau and the first and
    newest ones, up to that estimate."""

    block_size: int | None = values.option(
        None,
        values.block_size,
        "one of 16, 32, 64, 128, or null: 16 by share, by threshold the largest power of two that "
        "divides vLLM's page, up to 128",
    )
    """Tokens that are kept or skipped together."""

    use_fp8_residual: bool = values.option(True, values.flag, "true or false")
    """Kept blocks are scored with base + residual; without it with the base alone."""

    v_cache_dtype: str = values.option(
        "auto", values.v_cache_dtype, "auto (the model's dtype) or fp8"
    )
    """How V is stored: as it is, or as E4M3 with an exponent per (token, KV head)."""

    precomputed_threshold: bool = values.option(False, values.flag, "true or false")
    """One kernel finds the threshold of a (request, KV head), instead of every split by itself."""

    scan: str = values.option("base", values.scan, "base or int4")
    """What the scan by share reads of every key: its FP8 base, or 4 bits, which the cache holds
    beside it."""

    dense_layers: tuple[int, ...] = values.option((), values.layers, "a list of layer indices")
    """Layers that run unpruned; negative indices count from the end."""

    min_context: int = values.option(1024, values.count, "an integer >= 0 and < 2**31 (tokens)")
    """Requests with fewer tokens run unpruned."""

    min_request_delta: float = values.option(
        0.0, values.delta, "a number >= 0 (log2 units), or null to refuse any"
    )
    """The smallest delta that a request may choose for itself (`ffa_delta`)."""

    max_request_tau: float = values.option(
        1.0, values.largest_tau, "a number from 0 to 1 (a share of the softmax)"
    )
    """The largest tau that a request may choose for itself (`ffa_tau`), itself below 1."""

    record_skip_ratio: bool = values.option(False, values.flag, "true or false")
    """Count kept and total blocks on the device."""

    metrics: bool = values.option(False, values.flag, "true or false")
    """Count them, and show them at `/metrics` and in vLLM's log."""

    fused_kproj: str = values.option("auto", values.fused_kproj, "'auto', 'on' or 'off'")
    """Projection, rotation and cache write in one kernel: for the batches where that is measured
    to be fastest, for all that the kernel takes, or never."""

    def __post_init__(self):
        for name, value in _checked(vars(self), "FFAConfig").items():
            object.__setattr__(self, name, value)
        values.check_together(self)

    @property
    def prunes(self) -> bool:
        """Whether any block can be skipped at all."""
        return self.limit is not None

    @property
    def scans_codes(self) -> bool:
        """Whether the cache holds keys in 4 bits, too."""
        return self.scan == "int4" and self.prunes

    @property
    def counts_blocks(self) -> bool:
        """Whether decode counts what it keeps."""
        return self.record_skip_ratio or self.metrics

    @property
    def limit(self) -> float | None:
        """`delta` or `tau`, as the rule has it; None: nothing is skipped."""
        if self.rule == "share":
            return self.tau
        return self.delta if math.isfinite(self.delta) else None

    def block_size_in(self, page_size: int) -> int:
        """Tokens that are kept or skipped together on pages of so many: the option, else 16 by
        share, and by threshold the largest power of two that divides the page, up to 128."""
        return self.block_size or math.gcd(page_size, 16 if self.rule == "share" else 128)

    def to_dict(self) -> dict[str, Any]:
        """Every option of the rule as plain JSON data, from which `load` rebuilds an object that
        does the same."""
        options = dataclasses.asdict(self)
        for rule, name in RULES.items():
            del options[name]
            if rule == self.rule:
                options[name] = self.limit
        options["dense_layers"] = list(self.dense_layers)
        if options["min_request_delta"] == math.inf:  # no JSON
            options["min_request_delta"] = None
        return options

    @classmethod
    def from_vllm_config(cls, vllm_config: Any) -> "FFAConfig":
        """The options for `vllm_config`'s model: `additional_config["ffa_fp8fp8"]` over a preset.
        Beside a draft model, `dense_layers` are those of the model it drafts for. Raises
        ValueError as `load` does, and for a key that looks like a misspelt "ffa_fp8fp8"."""
        model_config = vllm_config.model_config
        speculative_config = getattr(vllm_config, "speculative_config", None)
        if speculative_config is not None:  # `vllm_config` may be the draft model's
            model_config = speculative_config.target_model_config or model_config
        num_layers = model_config.get_total_num_hidden_layers() if model_config else None
        additional_config = vllm_config.additional_config
        if not isinstance(additional_config, Mapping):
            additional_config = {}
        _check_keys(additional_config)
        overrides = additional_config.get(ADDITIONAL_CONFIG_KEY)
        return cls.load(overrides=overrides, num_layers=num_layers)

    @classmethod
    def load(
        cls,
        preset: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        num_layers: int | None = None,
    ) -> "FFAConfig":
        """Options of a preset with `overrides` on top.

        `preset` (a preset's name or the path of a YAML file) is, in this order: the key "preset"
        of `overrides`, the argument, the variable FFA_FP8FP8_CONFIG, "balanced". Complete
        overrides without that key need no preset, and read none. With `num_layers`,
        `dense_layers` comes back sorted and non-negative.

        Raises ValueError for an unknown preset, an unreadable file, an unknown key, a wrong type
        or value.
        """
        source = f"additional_config[{ADDITIONAL_CONFIG_KEY!r}]"
        if not isinstance(overrides, Mapping | None):
            raise ValueError(
                f"{source} is {overrides!r} ({type(overrides).__name__}); "
                "it must be a mapping of options, such as {'tau': 0.012}"
            )
        overrides = dict(overrides or {})
        chosen = overrides.pop("preset", None)
        preset = preset if chosen is None else chosen
        options = _with_rule(_checked(overrides, source), source)
        if preset is None and len(options) < len(fields(cls)) - len(RULES) + 1:
            preset = envs.config() or DEFAULT_PRESET
        if preset is not None:
            options = read_preset(preset) | options
        config = cls(**options)
        if num_layers is None:
            return config
        return dataclasses.replace(config, dense_layers=_absolute(config.dense_layers, num_layers))


def misplaced_options(additional_config: Any) -> list[str]:
    """Keys of `additional_config` that are named like our options, which belong one level down.
    They may be another plugin's: the dict is shared."""
    if not isinstance(additional_config, Mapping):
        return []
    names = {"preset", *(field.name for field in fields(FFAConfig))}
    return [key for key in additional_config if key in names]


def preset_names() -> list[str]:
    """The names of the shipped presets, sorted."""
    files = resources.files("vllm_ffa_fp8fp8.configs").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def read_preset(preset: str) -> dict[str, Any]:
    """The validated options of a shipped preset or of the YAML file at that path; ValueError if
    there is none, or if it holds anything but options."""
    if preset in preset_names():
        file = resources.files("vllm_ffa_fp8fp8.configs") / f"{preset}.yaml"
    else:
        file = Path(str(preset)).expanduser()
        if file.suffix not in (".yaml", ".yml"):
            raise ValueError(
                f"Unknown FFA_FP8FP8 preset {preset!r}{_did_you_mean(preset, preset_names())}; "
                f"allowed are {', '.join(preset_names())}, or the path of a .yaml file"
            )
    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"FFA_FP8FP8 cannot read its options from {preset!r}: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(
            f"FFA_FP8FP8 options file {preset!r} holds {options!r}; "
            "it must be a mapping of options, such as 'tau: 0.012'"
        )
    source = f"preset {preset!r}"
    return _with_rule(_checked(options, source), source)


def _checked(options: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`options` with every value in its stored form; ValueError names the first bad one and the
    `source` it came from."""
    known = {field.name: field for field in fields(FFAConfig)}
    allowed = [*known, "preset"] if source.startswith("additional_config") else list(known)
    checked = {}
    for name, value in options.items():
        if name not in known:
            raise ValueError(
                f"Unknown option {name!r} = {value!r} in {source}{_did_you_mean(name, allowed)}; "
                f"allowed are {', '.join(allowed)}"
            )
        metadata = known[name].metadata
        try:
            checked[name] = metadata["check"](value)
        except (ValueError, OverflowError):
            raise ValueError(
                f"Option {name!r} = {value!r} ({type(value).__name__}) in {source} is not valid; "
                f"allowed: {metadata['allowed']}"
            ) from None
    return checked


def _with_rule(options: dict[str, Any], source: str) -> dict[str, Any]:
    """`options` with the rule that `delta` or `tau` among them stands for; ValueError where they
    do not go together."""
    said = [rule for rule, name in RULES.items() if name in options]
    rule = options.get("rule")
    if len(said) > 1:
        raise ValueError(
            f"Options 'delta' and 'tau' in {source} are of two rules; leave out one of them"
        )
    if said and rule not in (None, *said):
        raise ValueError(
            f"Option {RULES[said[0]]!r} in {source} belongs to rule {said[0]!r}, and the rule is "
            f"{rule!r}; set {RULES[rule]!r}, or rule: {said[0]}"
        )
    return options | {"rule": said[0]} if said else options


def _check_keys(additional_config: Mapping[Any, Any]) -> None:
    for key in additional_config:
        if not isinstance(key, str) or key == ADDITIONAL_CONFIG_KEY:
            continue
        spelt = key.lower().replace("-", "_")
        if get_close_matches(spelt, [ADDITIONAL_CONFIG_KEY], cutoff=0.85):
            raise ValueError(
                f"Unknown key {key!r} in additional_config: the options of FFA_FP8FP8 belong "
                f"under {ADDITIONAL_CONFIG_KEY!r}"
            )


def _did_you_mean(name: object, known: Any) -> str:
    matches = get_close_matches(str(name), known, n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _absolute(layers: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    for layer in layers:
        if not -num_layers <= layer < num_layers:
            raise ValueError(
                f"Option 'dense_layers' = {list(layers)}: the model has no layer {layer}; "
                f"allowed are {-num_layers} to {num_layers - 1}"
            )
    return tuple(sorted({layer % num_layers for layer in layers}))

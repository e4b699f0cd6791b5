"""Named sets of options, as commands take them: `--setting`, `--preset`, `--delta`, `--tau`."""

import argparse
import re
from dataclasses import dataclass
from typing import Any

import yaml

from vllm_ffa_fp8fp8 import envs
from vllm_ffa_fp8fp8.config import DEFAULT_PRESET, FFAConfig


@dataclass(frozen=True)
class Setting:
    """One point to measure.

    `name` is what the user wrote; `options` are all of FFAConfig's as plain JSON data, fit for
    `additional_config={"ffa_fp8fp8": options}`.
    """

    name: str
    options: dict[str, Any]

    @property
    def config(self) -> FFAConfig:
        return FFAConfig(**self.options)


def add_setting_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `settings_of` reads, in the order in which they are given."""
    common: dict[str, Any] = {"dest": "settings", "action": "extend", "nargs": "+"}
    parser.add_argument(
        "--setting", metavar="NAME_OR_PAIRS", type=_argument, **common,
        help="a preset, options of FFA_FP8FP8, or both: balanced | tau=0.02,block_size=64 | "
        "fast,v_cache_dtype=fp8; options that are not named are those in force "
        "(default: the options in force)",
    )  # fmt: skip
    parser.add_argument(
        "--preset", metavar="NAME", type=_argument, **common,
        help="short for --setting NAME: a preset or the path of a YAML file",
    )  # fmt: skip
    parser.add_argument(
        "--delta", metavar="DELTA", type=lambda text: _argument(f"delta={text}"), **common,
        help="short for --setting delta=DELTA: log2 units, null for no pruning",
    )  # fmt: skip
    parser.add_argument(
        "--tau", metavar="TAU", type=lambda text: _argument(f"tau={text}"), **common,
        help="short for --setting tau=TAU: a share of the softmax, null to read everything",
    )  # fmt: skip


def settings_of(arguments: argparse.Namespace) -> list[Setting]:
    """The settings that were asked for, each once; without any, the options in force: those of
    FFA_FP8FP8_CONFIG or `balanced`. Raises ValueError where these are none."""
    asked = arguments.settings or [parse_setting(envs.config() or DEFAULT_PRESET)]
    return list({setting.name: setting for setting in asked}.values())


def parse_setting(text: str) -> Setting:
    """The setting of `[PRESET,]KEY=VALUE,...`, values in YAML. Raises ValueError as
    `FFAConfig.load` does, and for text of another form."""
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", text)]
    options: dict[str, Any] = {}
    if "=" not in parts[0]:
        options["preset"] = parts.pop(0)
    for part in parts:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value) or key in options:
            problem = f"{key!r} twice" if key in options else f"{part!r}"
            raise ValueError(
                f"A setting is a preset, key=value pairs with commas between them, or both, such "
                f"as balanced or tau=0.02,block_size=64; {text!r} has {problem}"
            )
        options[key] = parse_value(value)
    return Setting(text.strip(), FFAConfig.load(overrides=options).to_dict())


def parse_value(text: str) -> Any:
    """What YAML makes of a value on the command line, and 1e-3 a number."""
    try:
        value = yaml.safe_load(text)
        return float(value) if isinstance(value, str) else value  # YAML has it as a string
    except (yaml.YAMLError, ValueError):
        return text


def _argument(text: str) -> Setting:
    try:
        return parse_setting(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error

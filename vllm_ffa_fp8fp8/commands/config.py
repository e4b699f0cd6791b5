"""`ffa-fp8fp8 config`: the options in force, those of a setting, and what each option is for."""

import argparse
import json
from dataclasses import asdict

import yaml
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_ffa_fp8fp8 import envs
from vllm_ffa_fp8fp8.config import DEFAULT_PRESET
from vllm_ffa_fp8fp8.option_docs import described_options
from vllm_ffa_fp8fp8.settings import parse_setting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "setting", nargs="?", metavar="SETTING",
        help="check and show this one: a preset or the path of a YAML file, options, or both: "
        "balanced | tau=0.02,block_size=64 | fast,v_cache_dtype=fp8 "
        "(default: the options in force)",
    )  # fmt: skip
    parser.add_argument(
        "--doc", action="store_true",
        help="what each option is for, what it takes, its default and its unit",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(options: argparse.Namespace) -> int:
    if options.doc:
        show_documentation(as_json=options.json)
        return 0
    try:
        setting = parse_setting(options.setting or envs.config() or DEFAULT_PRESET)
    except ValueError as error:
        print(error)
        return 2
    if options.json:
        print(json.dumps(setting.options))
    else:
        print(f"# {setting.name}\n{yaml.safe_dump(setting.options, sort_keys=False)}", end="")
    return 0


def show_documentation(as_json: bool) -> None:
    described = list(map(asdict, described_options()))
    if as_json:
        print(json.dumps(described, indent=1))
        return
    table = Table(*("option", "takes", "default", "unit", "meaning"), box=box.ROUNDED)
    table.show_lines = True
    for option in described:
        table.add_row(*(escape(text.replace("`", "")) for text in option.values()))
    Console().print(table)

"""Settings on the command line: reading them, and showing what there is."""

from __future__ import annotations

import argparse
from itertools import groupby
from pathlib import Path

from trainer.config import ENVIRONMENT_PREFIX, TrainerConfig, config_fields, load_config

_EPILOG_START = """\
Settings come from the command line, environment variables, the file, and defaults, in this order:
  --train.steps 20      {prefix}TRAIN__STEPS=20      train: {{steps: 20}}
"""


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Let a command take `--config FILE` and any setting as `--section.key VALUE`."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with settings")
    parser.set_defaults(settings=[])
    parser.usage = "%(prog)s [--config FILE] [--section.key VALUE ...]"
    parser.epilog = settings_help()


def read_settings(args: argparse.Namespace) -> TrainerConfig:
    """Read the configuration that the arguments of a command describe."""
    return load_config(args.config, args.settings)


def settings_help() -> str:
    """Every setting with type, default and meaning, section by section."""
    lines = [_EPILOG_START.format(prefix=ENVIRONMENT_PREFIX)]
    for section, fields in groupby(config_fields(), key=lambda field: field.name.partition(".")[0]):
        lines.append(f"{section}: {TrainerConfig.model_fields[section].description}")
        for field in fields:
            lines.append(f"  --{field.name} {field.type_name}  (default: {field.default})")
            lines.append(f"      {field.help}")
        lines.append("")
    return "\n".join(lines)

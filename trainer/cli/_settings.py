"""Settings on the command line: reading them, and showing what there is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config import (
    ENVIRONMENT_PREFIX,
    PRESETS,
    TrainerConfig,
    describe_preset,
    expand_home,
    fields_by_section,
    load_config,
    option_fields,
)
from trainer.errors import ConfigurationError

_EPILOG_START = """\
Settings come from the command line, environment variables, the file, and defaults, in this order:
  --train.steps 20      {prefix}TRAIN__STEPS=20      train: {{steps: 20}}
The first of them that names a setting wins. A preset (loss.preset) wins over settings
given in a later place, in all that it decides, and gives way to those in its own place and before.
"""


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Let a command take `--config FILE` and any setting as `--section.key VALUE`.

    Its `--help` lists the settings, those of the loss and the estimator on the command line included.
    """
    parser.add_argument("-h", "--help", action=_SettingsHelp, nargs=0, help="show this message and exit")
    parser.add_argument("--config", type=path_argument, metavar="FILE", help="YAML file with settings")
    parser.set_defaults(settings=[])
    parser.usage = "%(prog)s [--config FILE] [--section.key VALUE ...]"


class _SettingsHelp(argparse.Action):
    """Prints the help of a command that takes settings; made when asked for, as it may load others' code."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        words: Sequence[str] = parser.get_default("words") or ()
        try:
            parser.epilog = settings_help(words)
        except ConfigurationError as error:
            parser.error(str(error))
        parser.print_help()
        parser.exit()


def path_argument(text: str) -> Path:
    """A path as a user writes it; for argparse."""
    try:
        return Path(expand_home(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def read_settings(args: argparse.Namespace) -> TrainerConfig:
    """Read the configuration that the arguments of a command describe, and keep it in them."""
    config = load_config(args.config, args.settings)
    args.configuration = config
    return config


def settings_help(words: Sequence[str] = ()) -> str:
    """Every setting with type, default and meaning, section by section.

    Args:
        words: The command line; options of the loss and the estimator that it names are listed with ours.

    Raises:
        ConfigurationError: It names one that cannot be loaded.
    """
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--loss.name", dest="losses", action="append", default=[])
    named.add_argument("--data.advantage_estimator", dest="estimators", action="append", default=[])
    found, _ = named.parse_known_args(words)
    options = option_fields(found.losses, found.estimators)
    lines = [_EPILOG_START.format(prefix=ENVIRONMENT_PREFIX)]
    for section, description, fields in fields_by_section(options):
        lines.append(f"{section}: {description}")
        for field in fields:
            lines.append(f"  --{field.name} {field.type_name}  (default: {field.default})")
            lines.append(f"      {field.help}")
            if field.name == "loss.preset":
                lines += [f"        {name}: {describe_preset(name)}" for name in PRESETS]
        lines.append("")
    return "\n".join(lines)

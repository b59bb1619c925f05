"""Starts verl on Atropos batches: `python -m verl_integration.main config.yaml [key=value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
from verl.utils.device import auto_set_device

from trainer.errors import ConfigurationError
from verl_integration.settings import read_config


def main(words: Sequence[str]) -> int:
    """Hand a configuration over to verl; return 0 when the run is done, 2 where it cannot start."""
    if not words or words[0].startswith("-"):
        sys.stderr.write("usage: python -m verl_integration.main config.yaml [key=value ...]\n")
        return 2
    try:
        require_loaded()
        config = read_config(Path(words[0]), words[1:])
    except Exception as error:  # noqa: BLE001 - verl raises all kinds where it refuses a configuration
        sys.stderr.write(f"{words[0]} cannot be run: {error}\n")
        return 2
    auto_set_device(config)
    run_ppo(config, task_runner_class=TaskRunnerV1)
    return 0


def require_loaded() -> None:
    """See that verl has loaded our plugin by its entry point, as its workers must; nothing here imports it.

    Verl itself says nothing where a plugin cannot be imported.
    """
    if "verl_integration.plugin" not in sys.modules:
        raise ConfigurationError(
            "verl has not loaded atropos-trainer by its entry point in verl.plugins: install it into this "
            "environment (a path to it is not enough), leave VERL_USE_EXTERNAL_PLUGINS unset, and try "
            "python -c 'import verl_integration.plugin', which says what is wrong"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

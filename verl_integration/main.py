"""Starts verl on Atropos batches: `python -m verl_integration.main config.yaml [key=value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import ConfigurationError


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the configuration, see that verl knows us, and hand over to verl.

    Returns:
        0 when the run is done, 2 where it cannot start.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0].startswith("-"):
        sys.stderr.write("usage: python -m verl_integration.main config.yaml [key=value ...]\n")
        return 2
    # Here, because they take seconds to import.
    from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
    from verl.utils.device import auto_set_device

    from verl_integration.plugin import require_loaded
    from verl_integration.settings import read_config

    try:
        require_loaded()
        config, _ = read_config(Path(words[0]), words[1:])
    except ConfigurationError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    auto_set_device(config)
    run_ppo(config, task_runner_class=TaskRunnerV1)
    return 0


if __name__ == "__main__":
    sys.exit(main())

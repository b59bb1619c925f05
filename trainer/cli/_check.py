"""`atropos-train check`: probe every party of a run and say what is wrong."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from trainer.cli._logging import configure_logging, escape
from trainer.cli._settings import add_settings, read_settings
from trainer.config import TrainerConfig
from trainer.launch import launched_rank

if TYPE_CHECKING:
    from trainer.check import CheckResult

MARKS = {"ok": "[green]ok     [/]", "warning": "[yellow]warning[/]", "failed": "[red]failed [/]"}

# float32 weights, and two moments of the same size.
_CHECKPOINT_COPIES = 3


class CheckCommand:
    """Probes API, environments, inference servers, model and directories; see `Command`."""

    name = "check"
    help = "probe every party of a run and say what is wrong"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Take all settings, and `--publish`."""
        add_settings(parser)
        parser.usage = "%(prog)s [--publish] [--config FILE] [--section.key VALUE ...]"
        parser.add_argument(
            "--publish",
            action="store_true",
            help="also load the model, publish it twice unchanged, and see that nothing changes",
        )

    def run(self, args: argparse.Namespace) -> int:
        """Print one line a probe; returns 1 if any failed."""
        config = read_settings(args)
        configure_logging("ERROR")
        if launched_rank() != 0:  # it is counted; process 0 looks at everything else
            return 0 if all(result.status != "failed" for result in run_checks(config)) else 1
        console = Console(soft_wrap=True, highlight=False)
        any_failed = False
        for result in run_checks(config, publish=args.publish):
            found = escape(result.found, lines=True)
            console.print(f"{MARKS[result.status]}  {escape(result.name)}: {found}")
            if result.remedy:
                console.print(f"         -> {escape(result.remedy)}")
            any_failed |= result.status == "failed"
        console.print("Something failed." if any_failed else "A run can start.")
        return 1 if any_failed else 0


def run_checks(config: TrainerConfig, *, publish: bool = False) -> Iterator[CheckResult]:
    """Run all probes that this configuration calls for, one after the other.

    `publish`: also send the unchanged weights to the inference servers.
    """
    from transformers.utils import logging as transformers_logging

    from trainer.check import (
        check_api,
        check_inference_server,
        check_model,
        check_processes,
        check_publish,
        check_start,
        check_writable,
        weight_bytes,
    )

    yield check_processes(config)
    if launched_rank() != 0:
        return
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # its report of tensors, which ours names
    results, tokenizer = check_model(config)
    yield from results
    can_start = results[0].status != "failed"
    if can_start:
        start = check_start(config)
        can_start = start.status != "failed"
        yield start
    size = weight_bytes(Path(config.model.path))
    checkpoints = (config.checkpoint.keep + 1) * _CHECKPOINT_COPIES * size
    yield check_writable("output", config.train.output_dir, bytes_needed=checkpoints)
    yield from check_api(config)
    if config.publish.transport != "none":
        directory = config.publish.directory or config.train.output_dir / "published"
        yield check_writable("published weights", directory, bytes_needed=(config.publish.keep + 1) * size)
        for url in config.publish.servers:
            yield from check_inference_server(url, config, tokenizer)
    if publish and can_start:
        yield from check_publish(config)
